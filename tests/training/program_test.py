"""A run's program on one device and on eight: same numbers, one compilation, one layout."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from data.batch import Batch
from launch.config import resolve
from parallel import mesh as meshes
from tests.models.built import packed, place, rows
from training import program
from training.state import to_int

STEPS, A, B, L, V = 5, 2, 8, 12, 41
SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
SMALL = {"model.d_model": "16", "model.layers": "2", "model.vocab": str(V), "seed": "3"}
SMALL |= {"data.batch_size": str(B), "data.length": str(L), "data.micro_batches": str(A)}
SMALL |= {"model.ffns.swiglu.width": "24", "steps": str(STEPS), "optim.weight_decay": "0.1"}
SGD = {"optim.name": "sgd", "optim.lr": "0.1", "optim.clip": "none", "model.dropout": "0.1"}
RUN = SMALL | SGD | {"ema": "0.8", "model.tied": "False", "model.softcap": "20.0"}


TWO_HEADS = {"model.mixers.attention.heads": "2"}


def _build(overrides, mesh, vocab=V):
    return program.build(resolve("base", overrides), mesh, vocab)


def _batch(number):
    """Packed rows, the first micro-batch much emptier than the second."""
    rng = np.random.default_rng(number)
    lengths = [(2,), (), (1, 3), (4,), (12,), (5, 7), (3, 3, 3), (11, 1)]
    segments, positions = packed(lengths)
    return rows(
        number,
        A,
        segments,
        positions,
        inputs=rng.integers(0, V, (B, L), dtype=np.int32),
        targets=rng.integers(0, V, (B, L), dtype=np.int32),
        weights=np.float32(rng.uniform(size=(B, L)) * (segments > 0)),
    )


@dataclasses.dataclass
class Run:
    program: program.Program
    states: list  # on the host, the initial one first
    metrics: list
    last: object  # on the devices
    donated: bool


def _run(mesh):
    with jax.set_mesh(mesh):
        built = _build(RUN, mesh)
        state, metrics = built.init(), []
        states = [jax.device_get(state)]
        for number in range(STEPS):
            if number == 3:  # as after a checkpoint
                state = place(jax.device_get(state), built.state)
            state, seen = built.step(state, place(_batch(number), built.batch))
            states.append(jax.device_get(state))
            metrics.append(jax.device_get(seen))
        # A state whose arrays the host has looked at is shared with it on the CPU, not donated.
        unseen, _ = built.step(state, place(_batch(0), built.batch))
        last, _ = built.step(unseen, place(_batch(0), built.batch))
        donated = all(leaf.is_deleted() for leaf in jax.tree.leaves(unseen))
        return Run(built, states, metrics, last, donated)


@pytest.fixture(scope="module")
def one():
    return _run(meshes.make(jax.devices()[:1]))


@pytest.fixture(scope="module")
def eight():
    return _run(meshes.make(**SIZES))


def _close(actual, expected, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())


def test_the_start_does_not_depend_on_the_devices(one, eight):
    for a, e in zip(jax.tree.leaves(eight.states[0]), jax.tree.leaves(one.states[0]), strict=True):
        np.testing.assert_array_equal(a, e)


def test_one_device_equals_eight(one, eight):
    """Losses and parameters of five steps to 1e-6: sums of float32 in another order."""
    losses = lambda run: np.array([m["loss"] for m in run.metrics])
    np.testing.assert_allclose(losses(eight), losses(one), rtol=1e-6)
    assert len(set(losses(one))) == STEPS
    for path, value in one.states[-1].params.items():
        assert np.any(value != one.states[0].params[path]), path
        _close(eight.states[-1].params[path], value, 1e-6)
    _close(eight.states[-1].aux, one.states[-1].aux, 1e-6)
    # Norms and means of what cancels have a larger share of rounding.
    _close(eight.metrics[-1], one.metrics[-1], 1e-5)


@pytest.mark.parametrize("devices", ["one", "eight"])
def test_the_step_compiles_once_and_keeps_its_layout(devices, request):
    run = request.getfixturevalue(devices)
    assert run.program.step._cache_size() == 1
    assert run.donated
    for path, (leaf, like) in enumerate(
        zip(jax.tree.leaves(run.last), jax.tree.leaves(run.program.state), strict=True)
    ):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype), path
        assert leaf.sharding == like.sharding, path


def test_each_device_holds_its_share(eight):
    params = eight.last.params
    shard = lambda path: params[path].sharding.shard_shape(params[path].shape)
    assert shard("tokens") == (64, 8)  # of 128 x 16: vocabulary over tensor, width over fsdp
    assert shard("blocks/0/mixer/q") == (2, 8, 2, 4)
    assert shard("blocks/0/ffn/down") == (2, 12, 8)
    assert shard("final_norm/scale") == (16,)
    moments = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(eight.last.opt)]
    assert sorted(moments) == sorted(map(shard, params))
    inputs = eight.program.batch.inputs
    assert inputs.sharding.shard_shape(inputs.shape) == (A, 1, L)


def test_counters(one):
    for number, state in enumerate(one.states):
        assert int(state.step) == number
        assert to_int(state.position) == number * B
        assert to_int(state.tokens) == number * B * L
    assert one.program.tokens == STEPS * B * L


def test_moving_average(one):
    average = {p: np.float64(x) for p, x in one.states[0].params.items()}
    for state in one.states[1:]:
        average = {p: 0.8 * a + 0.2 * np.float64(state.params[p]) for p, a in average.items()}
        _close(state.aux["ema"], average, 1e-6)
    for averaged, expected in ((True, average), (False, one.states[-1].params)):
        _close(program.parameters(one.states[-1], averaged=averaged), dict(expected), 1e-6)


def test_norms(one):
    for before, state, metrics in zip(one.states, one.states[1:], one.metrics, strict=False):
        norm = lambda tree: np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in tree.values()))
        moved = {p: np.float64(x) - before.params[p] for p, x in state.params.items()}
        np.testing.assert_allclose(metrics["parameter_norm"], norm(state.params), rtol=1e-5)
        np.testing.assert_allclose(metrics["update_norm"], norm(moved), rtol=1e-4)
        mixers = {p: x for p, x in state.params.items() if p.startswith("blocks/0/mixer/")}
        np.testing.assert_allclose(
            metrics["parameter_norm/blocks/0/mixer"], norm(mixers), rtol=1e-5
        )
        assert metrics["gradient_norm/tokens"] > 0


@pytest.fixture(scope="module")
def partly():
    """A program that trains feed-forward networks only, its state before and after a step."""
    mesh = meshes.make(jax.devices()[:1])
    with jax.set_mesh(mesh):
        changes = {"trainable": "blocks/.*/ffn/.*", "model.dropout": "0.0", "ema": "none"}
        built = _build(RUN | changes | {"optim.name": "adamw"}, mesh)
        state = built.init()
        before = jax.device_get(state)
        micro = jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), _batch(0))
        put = lambda name, x: jax.device_put(x, program.batch_sharding(name, mesh, 0))
        micro = Batch(*(put(n, x) for n, x in zip(Batch._fields, micro, strict=True)))
        scored = jax.device_get(built.evaluate(program.parameters(state), micro))
        state, metrics = built.step(state, place(_batch(0), built.batch))
        return built, before, jax.device_get(state), jax.device_get(metrics), scored


FFN = {"blocks/0/ffn/up", "blocks/0/ffn/down"}


def test_only_what_is_chosen_is_trained(partly):
    built, before, after, metrics, _ = partly
    assert set(before.params) == FFN
    assert set(before.aux["frozen"]) == set(built.table) - FFN
    for path, value in before.params.items():
        assert np.any(after.params[path] != value), path
    for path, value in before.aux["frozen"].items():
        np.testing.assert_array_equal(after.aux["frozen"][path], value)
    sizes = sum(x.size for x in before.params.values())
    # Two moments and a count.
    assert sum(np.size(x) for x in jax.tree.leaves(after.opt)) == 2 * sizes + 1
    groups = {name for name in metrics if name.startswith("gradient_norm/")}
    assert groups == {"gradient_norm/blocks/0/ffn"}


def test_frozen_and_trained_together_are_the_model(partly, one):
    _, before, after, metrics, scored = partly
    union = program.parameters(before)
    assert union.keys() == one.states[0].params.keys()
    for path, value in one.states[0].params.items():
        np.testing.assert_array_equal(union[path], value)
    # Without dropout the step's loss is what evaluation finds.
    np.testing.assert_allclose(scored["nll"] / scored["weight"], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(scored["weight"], _batch(0).weights.sum(), rtol=1e-6)
    assert program.parameters(after).keys() == union.keys()


@pytest.mark.parametrize(
    ("overrides", "sizes", "words"),
    [
        (
            {"data.batch_size": "12"},
            {"data": 8},
            ["12 rows in 2", "leave 6", "8 devices", "data=8"],
        ),
        (TWO_HEADS, {"tensor": 4, "data": 2}, ["'heads'", "2", "tensor=4"]),
        (
            {"model.mixers.attention.kv_heads": "1"},
            {"tensor": 2, "data": 4},
            ["'heads' of blocks/0/mixer/kv", "size 1", "mesh.tensor=2"],
        ),
        ({"model.ffns.swiglu.width": "30"}, {"tensor": 4, "data": 2}, ["'ffn'", "30", "tensor=4"]),
        ({"model.d_model": "20"} | TWO_HEADS, {"fsdp": 8}, ["'embed'", "20", "fsdp=8"]),
        ({"data.length": "15"}, {"context": 2, "data": 4}, ["data.length 15", "mesh.context 2"]),
        ({"model.vocab": "40"}, {"data": 8}, ["model.vocab is 40", "41 ids"]),
        ({"trainable": "block/.*"}, {"data": 8}, ["'block/.*' matches no parameter", "blocks/0"]),
    ],
)
def test_sizes_that_do_not_fit_are_sentences(overrides, sizes, words):
    mesh = meshes.make(**sizes)
    with pytest.raises(ValueError, match=r"\w+ \w+ \w+") as error:
        _build(SMALL | overrides, mesh)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(("names", "domains"), [(None, 1), ((), 1), ("a", 1), ("abc", 3)])
def test_domains_are_counted_from_the_mixture(names, domains):
    config = resolve("base", SMALL)
    config["data"].pop("mixture", None)
    if names is not None:
        config["data"]["mixture"] = tuple(names)
    built = program.build(config, meshes.make(data=4, tensor=2), V)
    assert built.context["domains"] == domains
    with jax.set_mesh(meshes.make(data=4, tensor=2)):
        metrics = jax.eval_shape(built.step, built.state, built.batch)[1]
    shapes = {n: x.shape for n, x in metrics.items() if n.startswith("domain_")}
    several = {"domain_loss": (domains,), "domain_share": (domains,)}
    assert shapes == (several if domains > 1 else {})


def test_the_config_is_not_changed():
    config = resolve("base", SMALL)
    kept = copy.deepcopy(config)
    program.build(config, meshes.make(data=2, tensor=4), V)
    assert config == kept


def test_an_axis_that_nothing_is_split_over_is_refused():
    config = resolve("base", {"mesh.data": "1", "mesh.stage": "2", "model.d_model": "32"})
    mesh = meshes.make(jax.devices()[:2], **config["mesh"])
    with pytest.raises(ValueError, match=r"mesh.stage is 2 and nothing in this model"):
        program.build(config, mesh, 258)
