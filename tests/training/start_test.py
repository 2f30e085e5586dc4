"""A run that begins with another one's parameters, against layers counted by hand."""

import shutil
import types

import jax
import numpy as np
import pytest

from analysis.records import read as read_record
from models.layering import Layering
from parallel import mesh as meshes
from parallel.rules import spec
from tests import tiny
from tests.models.built import place as put
from training import carry, loop, resume, start
from training.checkpoint import Checkpoints
from training.program import described, parameters

# (prefix, pattern, suffix) of six layers, and of four; letters are names of layers' insides.
SIX = [
    ("", "a", ""),
    ("a", "a", "a"),
    ("aaa", "a", ""),
    ("", "aaa", ""),
    ("", "aa", "aa"),
    ("aa", "aa", "aa"),
    ("a", "aa", "a"),
    ("aaaa", "a", "aa"),
]
MIXED = [("", "ab", ""), ("", "abb", ""), ("b", "ba", "b"), ("bb", "b", "a"), ("a", "b", "")]


def model(prefix, pattern, suffix, layers):
    return {"prefix": prefix, "pattern": pattern, "suffix": suffix, "layers": layers}


def names(model):
    """The insides of every layer, first to last."""
    n = model["layers"] - len(model["prefix"]) - len(model["suffix"])
    return model["prefix"] + model["pattern"] * (n // len(model["pattern"])) + model["suffix"]


def place(model, layer):
    """The path of a layer: row numbers in a stack are in the order of layers."""
    before, rest = len(model["prefix"]), model["layers"] - len(model["suffix"])
    if before <= layer < rest:
        return f"blocks/{(layer - before) % len(model['pattern'])}"
    return f"prefix/{layer}" if layer < before else f"suffix/{layer - rest}"


def filled(model, offset=0):
    """Parameters as LM names them: x in every layer, y in those called b, and one of no layer."""
    rows = {}
    for layer, letter in enumerate(names(model)):
        for name in "xy" if letter == "b" else "x":
            value = np.full((2,), offset + 10 * layer + (name == "y"), np.float32)
            rows.setdefault(f"{place(model, layer)}/{name}", []).append(value)
    found = {path: np.stack(x) if path.startswith("blocks") else x[0] for path, x in rows.items()}
    return {"tokens": np.full((3, 2), offset + 7.0, np.float32)} | found


def by_layer(params, model):
    """{(layer, name): value}, counted along the model's layers."""
    rest = {path: list(x) if path.startswith("blocks") else [x] for path, x in params.items()}
    return {
        (layer, name): rest[f"{place(model, layer)}/{name}"].pop(0)
        for layer, letter in enumerate(names(model))
        for name in ("xy" if letter == "b" else "x")
    }


def carried(source, target):
    given, drawn = filled(source), filled(target, offset=-5000)
    shapes = lambda params: {path: x.shape for path, x in params.items()}
    plan = carry.match(shapes(given), Layering.of(source), shapes(drawn), Layering.of(target))
    with jax.set_mesh(meshes.make(jax.devices()[:1])):
        arrays = jax.device_put((given, drawn), spec())
        return plan, jax.device_get(plan.take(*arrays)), given, drawn


CASES = [(a, 6, b, 6) for a in SIX for b in SIX + MIXED]
CASES += [(a, 6, b, 6) for a in MIXED for b in [*MIXED, SIX[0]]]
CASES += [(SIX[0], 6, SIX[0], 4), (SIX[4], 4, SIX[3], 6), (MIXED[1], 6, ("a", "ba", "b"), 4)]


def legal(shape, layers):
    prefix, pattern, suffix = shape
    left = layers - len(prefix) - len(suffix)
    return left >= 0 and left % len(pattern) == 0


@pytest.mark.parametrize(("source", "n", "target", "m"), CASES)
def test_every_layer_goes_to_its_number(source, n, target, m):
    if not (legal(source, n) and legal(target, m)):
        pytest.skip("no such model")
    source, target = model(*source, n), model(*target, m)
    plan, taken, given, drawn = carried(source, target)
    there, here, before = by_layer(given, source), by_layer(taken, target), by_layer(drawn, target)
    for place, value in here.items():
        np.testing.assert_array_equal(value, there.get(place, before[place]), str(place))
    np.testing.assert_array_equal(taken["tokens"], given["tokens"])
    assert bool(plan.missing) == bool(set(here) - set(there))
    assert bool(plan.unused) == bool(set(there) - set(here))
    assert {path: x.shape for path, x in taken.items()} == {p: x.shape for p, x in drawn.items()}


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (
            {"blocks/0/x": (3, 2)},
            {"blocks/0/x": (3, 4)},
            r"blocks/0/x has .* \[2\] there and \[4\]",
        ),
        (
            {"blocks/0/x": (3, 2)},
            {"prefix/0/x": (4,)},
            r"prefix/0/x has the shape \[2\] there as blocks/0/x and \[4\] here;",
        ),
        ({"a": (2,), "b": (1,)}, {"c": (2,)}, "no parameter has a place here; it has a, b"),
    ],
)
def test_what_cannot_be_matched(source, target, expected):
    to = Layering(1, 1, 0, 0) if "prefix/0/x" in target else Layering(0, 1, 3, 0)
    with pytest.raises(ValueError, match=expected):
        carry.match(source, Layering(0, 1, 3, 0), target, to)


TEACHER = dict(model__layers=3, model__ffns__swiglu__width=32, model__mixers__attention__heads=2)
STUDENT = TEACHER | dict(
    model__prefix="attention",
    model__pattern="hedgehog",
    model__suffix="attention",
    model__mixers__hedgehog__heads=2,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def saved(root, folder, devices=1, **changes):
    """A checkpoint in the folder as a run of two steps leaves one, of random values."""
    built = tiny.setup(root, devices, **changes)
    normal = np.random.default_rng(0).normal
    draw = lambda x: np.float32(normal(size=x.shape))
    with jax.set_mesh(built.mesh):
        random = lambda tree: {path: put(draw(x), x) for path, x in tree.items()}
        state = built.program.init()
        aux = {name: random(tree) for name, tree in state.aux.items()}
        state = state._replace(step=state.step + 2, params=random(state.params), aux=aux)
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(state, {"header": tiny.run(built, folder).header})
    return built


@pytest.fixture(scope="module")
def teacher(root, tmp_path_factory):
    """Split over four devices, averaged, with a part of it that is not trained."""
    folder = tmp_path_factory.mktemp("teacher")
    own = dict(ema=0.5, zero="zero1", trainable="(?!tokens).*", mesh__data=2, mesh__fsdp=2)
    return saved(root, folder, 4, **TEACHER, **own), folder


EXACT = {"step": 2} | {part: {"count": 0, "some": []} for part in ("missing", "unused")}


def begun(root, workdir, devices=1, **changes):
    built = tiny.setup(root, devices, **changes)
    with jax.set_mesh(built.mesh):
        state, told = start.first(tiny.run(built, workdir))
        for leaf, like in zip(
            jax.tree.leaves(state), jax.tree.leaves(built.program.state), strict=True
        ):
            assert (leaf.shape, leaf.sharding) == (like.shape, like.sharding)
        return jax.device_get(state), told["start"], built


def effective(built, folder):
    with Checkpoints(folder) as checkpoints, jax.set_mesh(built.mesh):
        state, _ = checkpoints.restore(None, built.program.state)
        return jax.device_get(built.program.adapter.merged(parameters(state)))


@pytest.mark.parametrize("mesh", [{}, dict(mesh__tensor=2, mesh__fsdp=2)])
def test_averages_of_another_mesh_go_to_layers_elsewhere(mesh, root, teacher, tmp_path, capsys):
    built, folder = teacher
    devices = 4 if mesh else 1
    own = dict(start=folder, ema=0.9, trainable=".*q_map|suffix.*")
    state, told, _ = begun(root, tmp_path, devices, **STUDENT, **mesh, **own)
    given, got = effective(built, folder), parameters(state, averaged=False)
    with Checkpoints(folder) as checkpoints:
        averaged = checkpoints.restore_params(aux="ema")[0]["blocks/0/mixer/q"]
    np.testing.assert_array_equal(given["blocks/0/mixer/q"], averaged)
    for path in ("mixer/q", "mixer/kv", "ffn/up", "norms/1/scale"):
        for layer, part in enumerate(("prefix/0", "blocks/0", "suffix/0")):
            held = got[f"{part}/{path}"][0] if layer == 1 else got[f"{part}/{path}"]
            np.testing.assert_array_equal(held, given[f"blocks/0/{path}"][layer])
    np.testing.assert_array_equal(got["tokens"], given["tokens"])
    maps = ["blocks/0/mixer/k_map", "blocks/0/mixer/q_map"]
    np.testing.assert_array_equal(got[maps[0]][0], np.broadcast_to(np.eye(16), (2, 16, 16)))
    for path in state.params:
        np.testing.assert_array_equal(state.aux["ema"][path], state.params[path])
    assert told == {
        "folder": str(folder),
        "step": 2,
        "missing": {"count": 2, "some": maps},
        "unused": {"count": 0, "some": []},
    }
    err = capsys.readouterr().err.splitlines()
    assert err == [
        f"note: beginning with the parameters of {folder}, step 2",
        f"note: 2 parameters begin as usual, which it does not have ({', '.join(maps)})",
    ]


def test_an_adapter_is_worked_in_and_fewer_layers_are_told(root, teacher, tmp_path, capsys):
    lora = {"adapter.name": "lora", "adapter.lora.rank": 2, "optim.lr": 0.1}
    lora = {name.replace(".", "__"): value for name, value in lora.items()}
    source = saved(root, tmp_path / "lora", **TEACHER, **lora)
    own = TEACHER | dict(model__layers=2, start=tmp_path / "lora")
    state, told, _ = begun(root, tmp_path / "run", **own, **lora)
    given, got = effective(source, tmp_path / "lora"), parameters(state)
    with Checkpoints(tmp_path / "lora") as checkpoints:
        frozen, _ = checkpoints.restore_params(aux="frozen")
    assert np.any(given["blocks/0/mixer/q"] != frozen["blocks/0/mixer/q"])
    np.testing.assert_array_equal(got["blocks/0/mixer/q"], given["blocks/0/mixer/q"][:2])
    assert np.all(got["blocks/0/mixer/q/lora_b"] == 0)
    assert told["missing"]["count"] == 6
    assert told["unused"]["some"][0] == "blocks/0/ffn/down of layer 2"
    assert "parameters of it have no place here (blocks/0/ffn/down of" in capsys.readouterr().err
    table, adapter = described(source.config, source.data.vocab_size)
    assert table | adapter.table == source.program.table


def test_only_the_first_step_reads_it_and_the_header_keeps_it(teacher, tmp_path):
    """The source may be gone afterwards, and its corpus before."""
    folder = shutil.copytree(teacher[1], tmp_path / "teacher")
    built = tiny.setup(tiny.corpus(tmp_path / "other", 30), **TEACHER, start=folder)
    with jax.set_mesh(built.mesh), Checkpoints(tmp_path / "run") as checkpoints:
        job = tiny.run(built, tmp_path / "run")
        state, step, header = resume.begin(checkpoints, job)
        assert (step, header["start"]) == (0, EXACT | {"folder": str(folder)})
        checkpoints.save(state._replace(step=state.step + 1), {"header": header})
        checkpoints.wait()
        shutil.rmtree(folder)
        again, step, header = resume.begin(checkpoints, job)
    assert (step, header["start"]) == (1, EXACT | {"folder": str(folder)})
    np.testing.assert_array_equal(again.params["tokens"], state.params["tokens"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(start="nowhere"), "start=nowhere: no finished checkpoint in .*nowhere"),
        (dict(model__d_model=64), r"start=.*: blocks/0/ffn/down has the shape \[32 32\] there and"),
        (
            dict(model__base_d_model=16),
            "it has model.base_d_model=none and this run 16, .*; set model.base_d_model=none",
        ),
    ],
)
def test_refusals(changes, expected, root, teacher, tmp_path):
    own = TEACHER | dict(start=teacher[1]) | changes
    with pytest.raises(ValueError, match=expected):
        begun(root, tmp_path, **own)


def test_another_tokenizer_is_refused(teacher):
    other = types.SimpleNamespace(fingerprint=lambda: "another", vocab_size=257)
    with pytest.raises(ValueError, match=r"another tokenizer, .* and another here"):
        start.opened(str(teacher[1]), other, lambda source: source)


def test_a_run_of_no_steps_scores_what_it_begins_with(root, tmp_path):
    plain = tiny.setup(root, steps=2, optim__lr=0.1)
    with jax.set_mesh(plain.mesh):
        trained = loop.run(tiny.run(plain, tmp_path / "plain"))
    only = tiny.setup(
        *(root,), steps=0, start=tmp_path / "plain", optim__schedule="cosine", train__eval_every=1
    )
    with jax.set_mesh(only.mesh):
        job = tiny.run(only, tmp_path / "only")
        outcome, again = loop.run(job), loop.run(job)
    assert (outcome.step, outcome.stepped) == (0, False)
    assert outcome.score == again.score == trained.score
    record = read_record(tmp_path / "only")
    assert record.ended
    assert record.last["validation/loss"] == trained.score.loss
    assert record.last["tokens"] == 0
    kept, original = effective(only, tmp_path / "only"), effective(plain, tmp_path / "plain")
    np.testing.assert_array_equal(kept["tokens"], original["tokens"])
