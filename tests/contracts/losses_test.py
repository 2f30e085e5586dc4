"""What every file in training/losses must hold; a new file is tested by being there."""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import training.losses
from data.batch import Batch
from models.context import of_batch, over_tokens
from parallel import mesh as meshes
from parallel.rules import spec
from training.accumulate import value_and_grad
from training.loss import counts

NAMES = sorted(m.name for m in pkgutil.iter_modules(training.losses.__path__))
B, L, D, W, REAL = 8, 6, 4, 16, 13
NORMAL = np.random.default_rng(0).normal
PARAMS = {"tokens": np.float32(NORMAL(size=(W, D))), "head/kernel": np.float32(NORMAL(size=(D, W)))}


def _apply(params, inputs, ctx):
    """A bigram model with a padded vocabulary, whose two layers report a sum each."""
    tokens = params["tokens"].at[inputs].get(out_sharding=ctx.stream)
    logits = jnp.einsum("bld,dw->blw", jnp.tanh(tokens), params["head/kernel"])
    size = over_tokens(jnp.mean(tokens**2, -1), ctx)
    layers = {"blocks/0/mixer/size": jnp.stack([size, 2 * size])}
    return jnp.where((jnp.arange(W) < REAL)[None, None], logits, -jnp.inf), layers


def _cases():
    for name in NAMES:
        module = importlib.import_module(f"training.losses.{name}")
        for i, own in enumerate(({}, *getattr(module, "CASES", ()))):
            yield pytest.param(module.make(_apply, **own), id=f"{name}-{i}")


every_case = pytest.mark.parametrize("loss", list(_cases()))


def _batch(seed=1):
    """Rows `[B L]` that end anywhere, one of them empty, with weights from 0 to 2."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(2, L + 1, B)
    ends[2] = 0
    at = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    inside = at < ends[:, None]
    words = np.stack([np.zeros(B), np.arange(B)], -1).astype(np.uint32)
    batch = Batch(
        inputs=rng.integers(0, REAL, (B, L), dtype=np.int32),
        targets=rng.integers(0, REAL, (B, L), dtype=np.int32),
        weights=np.float32(rng.choice([0.0, 0.5, 1.0, 2.0], (B, L)) * inside),
        segment_ids=inside.astype(np.int32),
        positions=at * inside,
        sample=words,
        domain=np.zeros(B, np.int32),
    )
    return jax.tree.map(jnp.asarray, batch)


def _context(micro, totals):
    return of_batch(micro, key=jax.random.key(0), train=True, totals=totals)


def _totals(loss, params, batch, given=None):
    given = {} if given is None else given
    return counts(batch) | loss.sums(params, batch, _context(batch, given))


def _rows(batch, rows):
    return jax.tree.map(lambda x: x[rows], batch)


def _split(batch, A):
    return jax.tree.map(lambda x: x.reshape(A, B // A, *x.shape[1:]), batch)


def _close(actual, expected, tolerance=1e-5):
    """1e-5 of the largest value: float32 sums of some dozens of tokens in another order."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())


@every_case
def test_sums_are_additive_float32(loss):
    sums = jax.jit(lambda params, batch: _totals(loss, params, batch))
    halves = (slice(0, B), slice(0, B // 2), slice(B // 2, B))
    whole, *parts = (sums(PARAMS, _rows(_batch(), rows)) for rows in halves)
    assert set(loss.needs) <= set(whole)
    assert all(total.dtype == jnp.float32 for total in whole.values())
    _close(jax.tree.map(jnp.add, *parts), whole)


@every_case
def test_finish_is_linear_in_what_it_does_not_need(loss):
    """Its derivative there is the same at two random points that agree in `needs` and counts."""
    whole = jax.jit(lambda params: _totals(loss, params, _batch()))(PARAMS)
    fixed = {"weight", "tokens", *loss.needs}
    rng = np.random.default_rng(3)
    random = lambda x: jnp.float32(np.abs(rng.normal(size=x.shape)) * 5)
    points = [{n: x if n in fixed else random(x) for n, x in whole.items()} for _ in range(2)]
    slope = jax.jit(jax.grad(lambda totals: loss.finish(totals)[0]))
    first, second = map(slope, points)
    free = set(whole) - fixed
    assert free or loss.needs
    _close({n: first[n] for n in free}, {n: second[n] for n in free})


@every_case
def test_the_gradient_is_that_of_the_whole(loss):
    """By micro-batches and at once, against autodiff through finish(sums) of the whole batch."""
    batch = _batch()
    direct = lambda params: loss.finish(_totals(loss, params, batch))[0]
    value, gradient = jax.jit(jax.value_and_grad(direct))(PARAMS)
    assert all(np.abs(g).max() > 0 for g in gradient.values())
    run = jax.jit(lambda params, parts: value_and_grad(loss, params, parts, _context))
    for A in (1, 4):
        scalar, metrics, _, accumulated = run(PARAMS, _split(batch, A))
        assert all(metric.dtype == jnp.float32 for metric in jax.tree.leaves(metrics))
        _close([scalar, accumulated], [value, gradient])


@every_case
def test_a_batch_without_targets_is_finite_and_gives_no_gradient(loss):
    """Rows of nothing but padding: no NaN, and no gradient."""
    batch = _batch()
    empty = {n: 0 * getattr(batch, n) for n in ("weights", "segment_ids", "positions")}
    parts = jax.tree.map(lambda x: x[None], batch._replace(**empty))
    run = jax.jit(lambda params, parts: value_and_grad(loss, params, parts, _context))
    scalar, metrics, _, gradient = run(PARAMS, parts)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((scalar, metrics)))
    for path, leaf in gradient.items():
        np.testing.assert_array_equal(leaf, 0, err_msg=path)


@every_case
def test_one_device_equals_eight(loss):
    parts = _split(_batch(), 2)
    run = jax.jit(lambda params, parts: value_and_grad(loss, params, parts, _context))
    expected = run(PARAMS, parts)
    with jax.set_mesh(meshes.make(data=4, tensor=2)):
        put = lambda x, *names: jax.device_put(x, spec(*names, *[None] * (x.ndim - len(names))))
        axes = {"tokens": ("vocab", None), "head/kernel": (None, "vocab")}
        placed = {path: put(leaf, *axes[path]) for path, leaf in PARAMS.items()}
        actual = run(placed, jax.tree.map(lambda x: put(x, None, "batch"), parts))
    _close(actual, expected)
