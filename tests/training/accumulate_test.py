"""Gradients over micro-batches against autodiff of the whole batch at once.

The toy loss has everything that makes splitting hard: a ratio and a square of global totals, and a
sum whose gradient is scaled by them (a mixture of experts' balance), beside ordinary linear sums.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.batch import Batch, abstract
from models.context import of_batch
from parallel import mesh as meshes
from parallel.rules import spec
from training.accumulate import value_and_grad
from training.loss import Loss, at_least_some, counts

B, L, E = 8, 6, 3
RNG = np.random.default_rng(0)
PARAMS = {"a": np.float32(RNG.normal(size=L)), "b": np.float32(RNG.normal(size=(E,)))}


def _sums(params, micro, ctx):
    """Sums over tokens of nonlinear functions of the parameters and the token."""
    x, w = micro.inputs.astype(jnp.float32) / 10, micro.weights
    hidden = jnp.sin(x * params["a"][None] + micro.positions)
    route = jax.nn.softmax(hidden[:, :, None] * params["b"][None, None], -1)
    valid = ctx.valid.astype(jnp.float32)[:, :, None]
    return {
        "nll": jnp.sum(w * hidden**2),
        "top": jnp.sum(w * jnp.cos(hidden)),
        "bottom": jnp.sum(w * jnp.exp(hidden)),
        "load": jnp.sum(valid * route, (0, 1)),
    }


def _finish(totals):
    """nll / n + top^2 / bottom / n + sum_e (load_e / tokens)^2."""
    n, tokens = at_least_some(totals["weight"]), at_least_some(totals["tokens"])
    nll, ratio = totals["nll"] / n, totals["top"] ** 2 / at_least_some(totals["bottom"]) / n
    balance = jnp.sum((totals["load"] / tokens) ** 2)
    return nll + ratio + balance, {"nll": nll, "ratio": ratio, "balance": balance}


NEEDY = Loss(_sums, _finish, needs=("top", "bottom", "load"))
LINEAR = Loss(_sums, lambda t: (t["nll"] / at_least_some(t["weight"]), {"nll": t["nll"]}))


def _batch(seed=1):
    """Uneven weights, padding at every length, and two rows (a micro-batch of 4) of nothing."""
    rng = np.random.default_rng(seed)
    ends = np.array([6, 2, 5, 1, 0, 0, 4, 6])
    at = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    inside = at < ends[:, None]
    scale = 10.0 ** np.arange(-2, 2).repeat(2)[:, None]
    return Batch(
        inputs=rng.integers(0, 50, (B, L), dtype=np.int32),
        targets=np.zeros((B, L), np.int32),
        weights=np.float32(rng.uniform(size=(B, L)) * scale * inside),
        segment_ids=inside.astype(np.int32),
        positions=at * inside,
        sample=np.zeros((B, 2), np.uint32),
        domain=np.zeros(B, np.int32),
    )


def _split(batch, A):
    return jax.tree.map(lambda x: x.reshape(A, B // A, *x.shape[1:]), batch)


def _context(micro, totals):
    return of_batch(micro, totals=totals)


def _accumulated(loss, params, parts, context=_context):
    return jax.jit(lambda p, parts: value_and_grad(loss, p, parts, context))(params, parts)


@pytest.fixture(scope="module")
def direct():
    """(value, gradient) of a loss over the whole batch by plain autodiff."""
    batch = jax.tree.map(jnp.asarray, _batch())

    def run(loss):
        whole = lambda p: loss.finish(counts(batch) | loss.sums(p, batch, of_batch(batch)))[0]
        return jax.jit(jax.value_and_grad(whole))(PARAMS)

    return {"needy": run(NEEDY), "linear": run(LINEAR)}


def _close(actual, expected):
    """5e-5 of the largest value: float32 sums of tokens, which cancel tenfold behind a softmax."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=5e-5 * np.abs(e).max())


@pytest.mark.parametrize(("kind", "A"), [("needy", 1), ("needy", 2), ("needy", 4), ("linear", 4)])
def test_any_split_gives_the_gradient_of_the_whole(direct, kind, A):
    loss = {"needy": NEEDY, "linear": LINEAR}[kind]
    scalar, metrics, totals, gradient = _accumulated(loss, PARAMS, _split(_batch(), A))
    _close((scalar, gradient), direct[kind])
    batch = _batch()
    np.testing.assert_allclose(totals["weight"], np.float64(batch.weights).sum(), rtol=1e-6)
    assert totals["tokens"] == np.count_nonzero(batch.segment_ids)
    assert set(metrics) == ({"nll"} if kind == "linear" else {"nll", "ratio", "balance"})


def test_one_pass_would_not_do(direct):
    """The test can tell: without `needs`, local totals stand in for the global ones."""
    unaware = dataclasses.replace(NEEDY, needs=())
    gradient = _accumulated(unaware, PARAMS, _split(_batch(), 4))[3]
    error = np.abs(gradient["a"] - direct["needy"][1]["a"]).max()
    assert error > 0.01 * np.abs(direct["needy"][1]["a"]).max()


@pytest.mark.parametrize(
    ("A", "sizes"), [(1, {"data": 4, "fsdp": 2}), (4, {"data": 2, "stage": 4})]
)
def test_under_remat_and_on_eight_devices(direct, A, sizes):
    forgetful = dataclasses.replace(NEEDY, sums=jax.checkpoint(_sums))
    with jax.set_mesh(meshes.make(**sizes)):
        put = lambda x: jax.device_put(x, spec(None, "batch", *[None] * (x.ndim - 2)))
        parts = jax.tree.map(put, _split(_batch(), A))
        params = jax.tree.map(lambda x: jax.device_put(x, spec(None)), PARAMS)
        scalar, _, _, gradient = _accumulated(forgetful, params, parts)
    _close((scalar, gradient), direct["needy"])


@pytest.mark.parametrize("A", [1, 4])
def test_the_totals_needed_are_known_to_the_layers(A):
    """In the pass whose gradient is taken, ctx.totals holds the whole batch's needed sums."""
    batch = jax.tree.map(jnp.asarray, _batch())

    def sums(params, micro, ctx):
        own = _sums(params, micro, ctx)
        load = ctx.totals["load"] if ctx.totals else jnp.full(E, jnp.nan)
        # A router that steers by the global load, a constant of the gradient.
        return own | {"steered": jnp.sum(own["load"] * load)}

    finish = lambda t: (t["steered"] / t["tokens"], {"load": t["load"]})
    loss = Loss(sums, finish, needs=("load",), told=True)
    scalar, metrics, _, gradient = _accumulated(loss, PARAMS, _split(batch, A))
    load = jax.jit(lambda p: _sums(p, batch, of_batch(batch))["load"])
    whole = load(PARAMS)
    _close(metrics["load"], whole)
    tokens = np.count_nonzero(batch.segment_ids)
    _close(scalar, np.sum(np.float64(whole) ** 2) / tokens)
    steered = lambda p: jnp.vdot(load(p), whole) / tokens
    _close(gradient, jax.jit(jax.grad(steered))(PARAMS))


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "tensor": 4}], ids=["one", "eight"])
def test_a_running_loss_takes_what_it_has_seen(direct, sizes):
    """Of needed sums, a micro-batch's gradient has those up to and with it; the value is exact."""
    parts = jax.tree.map(jnp.asarray, _split(_batch(), 4))
    micros = [jax.tree.map(lambda x, a=a: x[a], parts) for a in range(4)]
    of = lambda params, a: _sums(params, micros[a], of_batch(micros[a]))

    def part(params, a):
        own, before = of(params, a), [of(PARAMS, i) for i in range(a)]
        seen = {name: own[name] + sum(x[name] for x in before) for name in NEEDY.needs}
        return NEEDY.finish(counts(parts) | own | seen)[0]

    each = jax.jit(lambda params: [jax.grad(part)(params, a) for a in range(4)])(PARAMS)
    expected = jax.tree.map(lambda *gradients: sum(gradients), *each)
    running = dataclasses.replace(NEEDY, running=True)
    with jax.set_mesh(meshes.make(**sizes)) if sizes else contextlib.nullcontext():
        put = lambda x: jax.device_put(x, spec(None, "batch", *[None] * (x.ndim - 2)))
        params = jax.tree.map(lambda x: jax.device_put(x, spec(None)), PARAMS)
        scalar, _, _, gradient = _accumulated(running, params, jax.tree.map(put, parts))
    _close((scalar, gradient), (direct["needy"][0], expected))
    exact = direct["needy"][1]["a"]
    assert np.abs(expected["a"] - exact).max() > 0.01 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("A", "changes", "passes"),
    [
        (1, {}, 1),
        (1, {"told": True}, 2),
        (4, {}, 2),
        (4, {"needs": ()}, 1),
        (4, {"running": True}, 1),
        (4, {"running": True, "told": True}, 2),
    ],
)
def test_passes_over_the_batch(direct, A, changes, passes):
    """One where sums are known before anything is pulled back, or none is told or needed.

    A pass takes two exponentials, and their derivatives none.
    """
    loss, given = dataclasses.replace(NEEDY, **changes), []

    def context(micro, totals):
        given.append(sorted(totals))
        return _context(micro, totals)

    run = lambda p, parts: value_and_grad(loss, p, parts, context)
    parts = jax.tree.map(jnp.asarray, _split(_batch(), A))
    assert str(jax.make_jaxpr(run)(PARAMS, parts)).count("= exp ") == 2 * passes
    assert given[-1] == (sorted(loss.needs) if passes == 2 else [])
    if loss.needs and (passes == 2 or A == 1):
        scalar, _, _, gradient = jax.jit(run)(PARAMS, parts)
        _close((scalar, gradient), direct["needy"])


def test_nothing_at_all_is_finite():
    empty = Batch(*map(jnp.asarray, abstract((2, 4), L, np.zeros)))
    scalar, metrics, totals, gradient = _accumulated(NEEDY, PARAMS, empty)
    assert float(totals["weight"]) == 0.0
    for leaf in jax.tree.leaves((scalar, metrics, gradient)):
        np.testing.assert_array_equal(leaf, 0)
