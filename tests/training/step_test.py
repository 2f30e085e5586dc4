"""One step with a toy loss: what is updated, kept, counted and measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.batch import Batch
from optim import build as optimizer
from parallel.weight import Entry, Weight
from training import state as counters
from training import step
from training.loss import Loss
from training.state import TrainState

A, b, L = 2, 3, 4
TABLE = {
    "blocks/0/mixer/q": Entry(Weight((None,)), (2, L)),
    "blocks/0/ffn/up": Entry(Weight((None,)), (L,)),
    "tokens": Entry(Weight((None,)), (L,)),
}
RNG = np.random.default_rng(0)
PARAMS = {path: np.float32(RNG.normal(size=entry.shape)) for path, entry in TABLE.items()}
FROZEN = {"head/kernel": np.float32(RNG.normal(size=L))}
EMA, SEEN = 0.9, 2**32 - 10  # a count of tokens that carries into its high word


def _sums(params, micro, ctx):
    y = micro.inputs.astype(jnp.float32) * params["tokens"][None]
    y = y * params["blocks/0/mixer/q"][0][None] + params["blocks/0/ffn/up"][None]
    y = y * params["head/kernel"][None] + jnp.sum(params["blocks/0/mixer/q"][1])
    return {"square": jnp.sum(micro.weights * y**2), "load": jnp.sum(ctx.valid.astype(jnp.float32))}


def _finish(totals):
    return totals["square"] / totals["weight"], {"load": totals["load"]}


LOSS = Loss(_sums, _finish, after=lambda aux, totals: aux | {"bias": aux["bias"] + totals["load"]})


def _batch():
    rng = np.random.default_rng(1)
    ones = np.ones((A, b, L), np.int32)
    return Batch(
        inputs=rng.integers(-3, 3, (A, b, L), dtype=np.int32),
        targets=ones,
        weights=np.float32(rng.uniform(size=(A, b, L))),
        segment_ids=ones,
        positions=ones,
        sample=np.ones((A, b, 2), np.uint32),
        domain=np.ones((A, b), np.int32),
    )


@pytest.fixture(scope="module")
def taken():
    """(state, batch, state after, metrics) of one step with momentum, from the middle of a run."""
    own = dict(name="sgd", lr=0.01, schedule="linear", warmup_tokens=0, warmup_fraction=0.0)
    own |= dict(clip=None, weight_decay=0.0, methods={"sgd": {"momentum": 0.5}})
    tx, lr = optimizer.build(TABLE, 2.0**33, **own, schedules={"linear": {}})
    run = step.make(LOSS, tx, lr, seed=0, context={"dtype": "float32"}, ema=EMA)
    trace = jax.tree.map(jnp.ones_like, tx.init(PARAMS))
    aux = {"frozen": FROZEN, "ema": {p: x + 1 for p, x in PARAMS.items()}, "bias": np.float32(5)}
    position, tokens = counters.pair(7), counters.pair(SEEN)
    before = TrainState(np.int32(41), position, tokens, PARAMS, trace, aux)
    after, metrics = jax.jit(run)(before, _batch())
    return before, _batch(), after, metrics


def _gradient():
    """By central differences in float64, of the whole batch at once."""
    batch = _batch()
    w, x = np.float64(batch.weights), np.float64(batch.inputs)

    def loss(params):
        y = x * params["tokens"] * params["blocks/0/mixer/q"][0] + params["blocks/0/ffn/up"]
        y = y * FROZEN["head/kernel"] + params["blocks/0/mixer/q"][1].sum()
        return (w * y**2).sum() / w.sum()

    start = {p: np.float64(a) for p, a in PARAMS.items()}
    gradient = {p: np.zeros(a.shape) for p, a in start.items()}
    for path, leaf in start.items():
        for i in np.ndindex(leaf.shape):
            moved = lambda h, path=path, i=i: start | {path: _moved(start[path], i, h)}
            gradient[path][i] = (loss(moved(1e-5)) - loss(moved(-1e-5))) / 2e-5
    return loss(start), gradient


def _moved(leaf, index, h):
    leaf = leaf.copy()
    leaf[index] += h
    return leaf


def test_the_update_is_the_optimizers_on_the_true_gradient(taken):
    before, _, after, metrics = taken
    value, gradient = _gradient()
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    rate = 0.01 * (1 - (SEEN + A * b * L) / 2.0**33)
    np.testing.assert_allclose(metrics["lr"], rate, rtol=1e-5)
    for path, g in gradient.items():
        expected = np.float64(PARAMS[path]) - rate * (g + 0.5)  # the trace was 1
        np.testing.assert_allclose(after.params[path], expected, rtol=0, atol=1e-6)
    assert jax.tree.structure(after) == jax.tree.structure(before)


def test_state_without_gradients(taken):
    before, _, after, _ = taken
    np.testing.assert_array_equal(after.aux["frozen"]["head/kernel"], FROZEN["head/kernel"])
    assert float(after.aux["bias"]) == 5 + A * b * L
    for path, old in before.aux["ema"].items():
        expected = EMA * np.float64(old) + (1 - EMA) * np.float64(after.params[path])
        np.testing.assert_allclose(after.aux["ema"][path], expected, rtol=1e-6)


def test_counters_advance(taken):
    _, _, after, _ = taken
    assert int(after.step) == 42
    assert counters.to_int(after.position) == 7 + A * b
    assert counters.to_int(after.tokens) == SEEN + A * b * L
    assert (after.position.dtype, after.tokens.dtype) == (jnp.uint32, jnp.uint32)


def test_norms_are_of_groups_and_of_all(taken):
    _, batch, after, metrics = taken
    _, gradient = _gradient()
    moved = {p: np.float64(after.params[p]) - np.float64(PARAMS[p]) for p in PARAMS}
    trees = dict(gradient=gradient, update=moved, parameter=after.params)
    groups = {"blocks/0/mixer": "blocks/0/mixer/q", "blocks/0/ffn": "blocks/0/ffn/up"}
    groups |= {"tokens": "tokens"}
    for name, tree in trees.items():
        each = {g: np.sqrt(np.sum(np.float64(tree[path]) ** 2)) for g, path in groups.items()}
        for group, norm in each.items():
            # Updates are differences of parameters here, which round at 6e-8 of 1e-2.
            np.testing.assert_allclose(metrics[f"{name}_norm/{group}"], norm, rtol=1e-4)
        whole = np.sqrt(sum(norm**2 for norm in each.values()))
        np.testing.assert_allclose(metrics[f"{name}_norm"], whole, rtol=1e-4)
    logged = {f"{n}_norm{g}" for n in trees for g in ("", *(f"/{group}" for group in groups))}
    assert set(metrics) == {"loss", "load", "lr", "weight"} | logged
    np.testing.assert_allclose(metrics["weight"], np.float64(batch.weights).sum(), rtol=1e-6)
    assert all(metric.dtype == jnp.float32 for metric in metrics.values())


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("blocks/0/mixer/q", "blocks/0/mixer"),
        ("prefix/1/norms/0/scale", "prefix/1/norms"),
        ("suffix/0/ffn/up", "suffix/0/ffn"),
        ("tokens", "tokens"),
        ("head/norm/scale", "head"),
        ("final_norm/scale", "final_norm"),
    ],
)
def test_layer_group(path, group):
    assert step.layer_group(path) == group
