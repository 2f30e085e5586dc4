"""Experts that begin as copies of a dense run's networks: the function is kept where it can be."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.ffns.moe import FFN
from models.ffns.swiglu import FFN as Dense
from models.layering import Layering
from models.param import Dims, flatten, restore
from parallel import mesh as meshes
from parallel.rules import spec
from tests import tiny
from tests.models.built import close, context, place
from training import carry, loop, start
from training.program import parameters

WIDE = 48  # of the dense network
DIMS = Dims(d_model=16, length=12, n_layers=2, base_d_model=16)


def drawn(of, **own):
    """(params -> module, params at their start)."""
    graph, state = nnx.split(of(DIMS, rngs=nnx.Rngs(0), **own))
    bind = lambda params: nnx.merge(graph, restore(state, params))
    return bind, flatten(state)


def outputs(bind, params):
    x = jnp.float32(np.random.default_rng(5).normal(size=(3, 12, 16)))
    segments = np.ones((3, 12), np.int32)
    run = jax.jit(lambda params: bind(params)(x, context(segments, segments))[0])
    return np.asarray(run(params))


@functools.cache
def dense_network():
    """(weights, outputs)."""
    bind, params = drawn(Dense, width=WIDE)
    return params, outputs(bind, params)


def made(bind, own, given, ffn="swiglu"):
    """(the experts' weights made of these, the note)."""
    shapes = lambda params: {name: w.shape for name, w in params.items()}
    make, note = bind(own).adopt(ffn, shapes(given), shapes(own))
    return make(given, own), note


WHOLE = [
    dict(experts=4, top_k=2),
    dict(experts=3, top_k=3),
    dict(experts=8, top_k=3, shared=2, router="sigmoid", scale=2.5),
]
SLICED = [
    dict(experts=8, top_k=4, width=12),  # one copy of each of 4 slices
    dict(experts=12, top_k=8, width=12, scale=0.5),  # two of each
    dict(experts=6, top_k=3, width=12, shared=1, capacity=8.0),  # the shared expert has a slice
    dict(experts=6, top_k=6, width=12, shared=1, router="sigmoid"),
    dict(experts=8, top_k=4, width=12, shared=4),  # the shared ones have a copy of each slice
    dict(experts=4, top_k=2, width=12, shared=6),  # and two of some, which are theirs alone
    dict(experts=3, top_k=2, width=12, shared=3),
]


@pytest.mark.parametrize("own", [dict(width=WIDE) | own for own in WHOLE] + SLICED, ids=str)
def test_the_output_is_the_dense_network_s(own):
    given, known = dense_network()
    bind, usual = drawn(FFN, **own)
    weights, note = made(bind, usual, given)
    close(outputs(bind, usual | weights), known)
    slices = WIDE // own["width"]
    alone = slices - own.get("shared", 0) % slices == 1
    left = {"bias", "router"} if alone else {"bias"}
    assert weights.keys() == usual.keys() - left
    assert {name: w.shape for name, w in weights.items()} == {n: usual[n].shape for n in weights}
    kept = "the same" if "capacity" not in own else "the same but for what is dropped"
    assert note.endswith(f"; the output stays {kept}")


def test_experts_of_the_whole_width_are_copies():
    given, _ = dense_network()
    bind, usual = drawn(FFN, experts=4, width=WIDE)
    weights, note = made(bind, usual, given)
    for expert in range(4):
        np.testing.assert_array_equal(weights["up"][expert], given["up"])
        np.testing.assert_array_equal(weights["down"][expert], given["down"])
    assert note.startswith("4 experts, copies of it;")


def test_narrower_experts_are_slices_in_groups_of_equal_columns():
    given, _ = dense_network()
    bind, usual = drawn(FFN, experts=6, top_k=3, width=12, shared=1)
    weights, note = made(bind, usual, given)
    np.testing.assert_array_equal(weights["shared_up"], given["up"][..., :12])
    np.testing.assert_array_equal(weights["shared_down"], given["down"][:12])
    for expert in range(6):
        part = np.s_[12 * (1 + expert % 3) : 12 * (2 + expert % 3)]
        np.testing.assert_array_equal(weights["up"][expert], given["up"][..., part])
        np.testing.assert_array_equal(weights["down"][expert], 3 * given["down"][part])
        column = usual["router"][:, expert // 3]
        np.testing.assert_array_equal(weights["router"][:, expert], column)
    assert note.startswith("6 experts and 1 shared, copies of its 4 slices;")


@pytest.mark.parametrize(
    "own",
    [
        dict(router="softmax", top_k=1, width=WIDE),
        dict(router="softmax", top_k=3, width=16),
        dict(router="sigmoid", top_k=1, width=WIDE),
    ],
    ids=str,
)
def test_gates_without_a_fixed_sum_keep_it_where_they_are_even(own):
    given, known = dense_network()
    bind, usual = drawn(FFN, experts=6, scale=1.5, **own)
    weights, note = made(bind, usual, given)
    even = usual | weights | {"router": 0 * usual["router"]}
    close(outputs(bind, even), known)
    assert f"roughly the same, as gates of router {own['router']!r} have no fixed sum" in note


@pytest.mark.parametrize(
    ("own", "changes", "ffn", "expected"),
    [
        (
            dict(width=20),
            {},
            "swiglu",
            "moe's experts are 20 wide .* are 48 wide; set model.ffns.moe.width to 48",
        ),
        (
            dict(width=96),
            {},
            "swiglu",
            "moe's experts are 96 wide .* are 48 wide; set model.ffns.moe.width to 48",
        ),
        (
            dict(width=16, experts=6, top_k=2),
            {},
            "swiglu",
            r"of 3 that there are the 0 shared ones leave 3, .* \(6\) and top_k \(2\) must be",
        ),
        (
            dict(width=16, experts=4, top_k=3),
            {},
            "swiglu",
            r"experts \(4\) and top_k \(3\) must be",
        ),
        (
            dict(width=12, experts=8, top_k=4, shared=1),
            {},
            "swiglu",
            "of 4 that .* the 1 shared ones leave 3, .*multiples of 3;",
        ),
        (dict(width=48), dict(bias=True), "swiglu", "that run has swiglu with biases; begin"),
        (dict(width=48), {}, "reglu", "without biases, and that run has reglu; begin"),
    ],
)
def test_what_cannot_be_made(own, changes, ffn, expected):
    _, given = drawn(Dense, width=WIDE, **changes)
    bind, usual = drawn(FFN, **own)
    with pytest.raises(ValueError, match=expected) as error:
        made(bind, usual, given, ffn)
    assert "\n" not in str(error.value)


def test_layers_are_made_one_by_one_and_those_that_fit_are_carried():
    """Layer i holds i; layer 1 has the shape that is asked for, and layer 4 is not there."""
    row = lambda i, n: np.full((n, 2), i, np.float32)
    stack = lambda layers, n: np.stack([row(i, n) for i in layers])
    source = {"prefix/0/ffn/w": row(0, 1), "prefix/1/ffn/w": row(1, 3)}
    source |= {"blocks/0/ffn/w": stack((2, 3), 1), "blocks/0/ffn/b": np.zeros((2, 5))}
    target = {"prefix/0/ffn/w": -row(0, 3), "blocks/0/ffn/w": -stack((1, 2, 3, 4), 3)}
    target |= {f"blocks/0/ffn/{name}": np.ones((4, 5)) for name in "bv"}
    asked = []

    def adopting(layer, path):
        def adopt(given, own):
            asked.append((layer, path, dict(given), dict(own)))
            make = lambda given, drawn: {"w": given["w"] + 10 * jnp.ones_like(drawn["w"])}
            return make, f"tens at {path}"

        return adopt

    shapes = lambda params: {path: x.shape for path, x in params.items()}
    sizes = Layering(2, 1, 2, 0), Layering(1, 1, 4, 0)
    plan = carry.match(shapes(source), sizes[0], shapes(target), sizes[1], adopting)
    with jax.set_mesh(meshes.make(jax.devices()[:1])):
        arrays = jax.device_put((source, target), spec())
        taken = jax.device_get(plan.take(*arrays))
    np.testing.assert_array_equal(taken["prefix/0/ffn/w"], 10 + row(0, 3))
    known = [row(1, 3), 10 + row(2, 3), 10 + row(3, 3), -row(4, 3)]
    np.testing.assert_array_equal(taken["blocks/0/ffn/w"], known)
    # What is made may leave out what would fit.
    for name in "bv":
        np.testing.assert_array_equal(taken[f"blocks/0/ffn/{name}"], 1)
    assert asked[0] == (0, "prefix/0/ffn", {"w": (1, 2)}, {"w": (3, 2)})
    assert asked[1][:3] == (2, "blocks/0/ffn", {"w": (1, 2), "b": (5,)})
    notes = {layer: network.note for layer, network in plan.made.items()}
    assert notes == {0: "tens at prefix/0/ffn"} | dict.fromkeys((2, 3), "tens at blocks/0/ffn")
    assert plan.missing == ["blocks/0/ffn/w of layer 4", "blocks/0/ffn/b", "blocks/0/ffn/v"]
    assert plan.unused == []
    with pytest.raises(ValueError, match=r"prefix/0/ffn/w has the shape \[1 2\] there and \[3 2\]"):
        carry.match(shapes(source), sizes[0], shapes(target), sizes[1])


SOURCE = dict(model__layers=3, model__ffns__swiglu__width=WIDE, model__mixers__attention__heads=2)


def moe(width=WIDE, **own):
    """Changes of a configuration for experts in every layer."""
    named = {f"model__ffns__moe__{key}": value for key, value in own.items()}
    width = {"model__ffns__moe__width": width}
    sizes = {key: value for key, value in SOURCE.items() if "swiglu" not in key}
    return sizes | dict(model__ffn="moe") | width | named


@pytest.fixture(scope="module", autouse=True)
def sizes():
    """Runs without a swiglu may not set its width."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(tiny.SIZES, "model.ffns.swiglu.width")
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def ran(root, folder, devices=1, **changes):
    """(program, outcome) of a run."""
    built = tiny.setup(root, devices, train__eval_every=1000, **changes)
    with jax.set_mesh(built.mesh):
        return built, loop.run(tiny.run(built, folder))


@pytest.fixture(scope="module")
def dense(root, tmp_path_factory):
    """(folder, parameters, score, logits) of a run of three steps, its layers in one stack."""
    folder = tmp_path_factory.mktemp("dense")
    built, outcome = ran(root, folder, steps=3, optim__lr=0.03, **SOURCE)
    params = jax.device_get(parameters(outcome.state))
    return folder, params, outcome.score, logits(built, params)


def logits(built, params):
    inputs = np.random.default_rng(6).integers(0, 257, (4, 32), dtype=np.int32)
    with jax.set_mesh(built.mesh):
        placed = {
            path: place(params[path], x)
            for path, x in parameters(built.program.state, averaged=False).items()
        }
        segments = np.ones_like(inputs)
        at = np.broadcast_to(np.arange(32, dtype=np.int32), inputs.shape)
        run = lambda p, inputs, ctx: built.program.model(p)(inputs, ctx)[0]
        inputs = jax.device_put(inputs, spec("batch", "length"))
        return np.asarray(jax.jit(run)(placed, inputs, context(segments, at)))[..., :257]


def begun(root, workdir, devices=1, **changes):
    built = tiny.setup(root, devices, **changes)
    with jax.set_mesh(built.mesh):
        state, told = start.first(tiny.run(built, workdir))
        for x, like in zip(
            jax.tree.leaves(state), jax.tree.leaves(built.program.state), strict=True
        ):
            assert (x.shape, x.sharding) == (like.shape, like.sharding)
        return jax.device_get(parameters(state, averaged=False)), told["start"], built


SPLIT = dict(mesh__fsdp=2, mesh__expert=2, mesh__tensor=2)
FINE = dict(width=12, experts=6, top_k=3, shared=1)


@pytest.mark.parametrize(
    ("devices", "changes"),
    [
        (1, moe(experts=4)),
        (8, moe(**FINE) | SPLIT | dict(model__prefix="attention", ema=0.5)),
    ],
    ids=["copies", "slices in prefix and stack on eight devices"],
)
def test_a_run_of_no_steps_scores_as_the_dense_one(devices, changes, root, dense, tmp_path):
    folder, _, score, known = dense
    built, first = ran(root, tmp_path, devices, steps=0, start=folder, **changes)
    # Sums of some hundred float32 logarithms in another order.
    np.testing.assert_allclose(first.score.loss, score.loss, rtol=2e-6)
    assert first.score.right == score.right
    close(logits(built, jax.device_get(parameters(first.state))), known)


def test_copies_go_their_own_ways(root, dense, tmp_path):
    folder, _, score, _ = dense
    _, after = ran(root, tmp_path, steps=3, start=folder, **moe(experts=4))
    assert after.score.loss < score.loss
    up = np.asarray(parameters(after.state)["blocks/0/ffn/up"])
    for one, other in itertools.combinations(range(4), 2):
        assert np.mean(up[:, one] != up[:, other]) > 0.9


def test_layers_of_prefix_and_stack_are_copies_of_their_own_numbers(root, dense, tmp_path, capsys):
    folder, given, _, _ = dense
    changes = moe(experts=4) | dict(model__prefix="attention", start=folder)
    got, told, built = begun(root, tmp_path, **changes)
    with jax.set_mesh(built.mesh):
        fresh = jax.device_get(parameters(built.program.init()))
    for layer in range(3):
        part = "prefix/0" if layer == 0 else "blocks/0"
        row = (lambda x: x) if layer == 0 else (lambda x, layer=layer: x[layer - 1])
        for name in ("up", "down"):
            experts = row(got[f"{part}/ffn/{name}"])
            known = np.stack([given[f"blocks/0/ffn/{name}"][layer]] * 4)
            np.testing.assert_array_equal(experts, known)
        for name in ("router", "bias"):
            path = f"{part}/ffn/{name}"
            np.testing.assert_array_equal(got[path], fresh[path])
    usual = [
        f"{part}/ffn/{name}" for part in ("prefix/0", "blocks/0") for name in ("bias", "router")
    ]
    note = "swiglu became 4 experts, copies of it; the output stays the same"
    assert told["missing"] == {"count": 4, "some": told["missing"]["some"]}
    assert set(told["missing"]["some"]) <= set(usual)
    assert told["unused"] == {"count": 0, "some": []}
    assert told["made"] == {"count": 3, "some": [note]}
    err = capsys.readouterr().err.splitlines()
    assert err[1] == f"note: in layers 0, 1, 2, {note}"


def test_layers_that_stay_dense_keep_their_weights(root, dense, tmp_path):
    folder, given, _, _ = dense
    changes = moe(experts=4) | {
        "model__ffns__swiglu__width": WIDE,
        "model__blocks__first__mixer": "attention",
        "model__blocks__first__ffn": "swiglu",
        "model__blocks__first__heads": 2,
        "model__prefix": "first",
    }
    got, told, _ = begun(root, tmp_path, start=folder, **changes)
    np.testing.assert_array_equal(got["prefix/0/ffn/up"], given["blocks/0/ffn/up"][0])
    np.testing.assert_array_equal(got["blocks/0/ffn/up"][1, 3], given["blocks/0/ffn/up"][2])
    assert told["made"]["count"] == 2


def test_an_adapter_beside_the_experts_changes_nothing(root, dense, tmp_path):
    folder, given, _, _ = dense
    lora = {
        "adapter__name": "lora",
        "adapter__lora__rank": 2,
        "adapter__lora__targets": ".*ffn/down",
    }
    got, _, _ = begun(root, tmp_path, start=folder, **moe(experts=4), **lora)
    np.testing.assert_array_equal(got["blocks/0/ffn/down"][:, 2], given["blocks/0/ffn/down"])


def test_experts_of_the_same_sizes_are_carried_with_their_router(root, dense, tmp_path):
    own = moe(experts=4)
    _, first = ran(root, tmp_path / "first", steps=0, start=dense[0], **own)
    given = jax.device_get(parameters(first.state))
    got, told, _ = begun(root, tmp_path / "second", start=tmp_path / "first", **own)
    assert got.keys() == given.keys()
    for path in got:
        np.testing.assert_array_equal(got[path], given[path])
    assert "made" not in told
    expected = "start=.*: blocks/0/ffn: moe's experts begin as .* has moe; .* of the same sizes$"
    with pytest.raises(ValueError, match=expected):
        begun(root, tmp_path / "third", start=tmp_path / "first", **moe(experts=8))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            moe(width=40),
            "blocks/0/ffn: moe's experts are 40 wide .* are 48 wide; set model.ffns.moe.width to",
        ),
        (moe() | dict(model__d_model=64), "d_model is 32 there and 64 here; make it the same"),
    ],
)
def test_refusals_name_the_run_and_the_layer(changes, expected, root, dense, tmp_path):
    with pytest.raises(ValueError, match=rf"start=.*: .*{expected}"):
        begun(root, tmp_path, start=dense[0], **changes)
