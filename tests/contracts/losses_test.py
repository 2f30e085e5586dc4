"""What every file in training/losses must hold; a new file is tested by being there."""

import functools
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
K = 3  # domains, of which the last has no row
NORMAL = np.random.default_rng(0).normal
PARAMS = {"tokens": np.float32(NORMAL(size=(W, D))), "head/kernel": np.float32(NORMAL(size=(D, W)))}


def _apply(params, inputs, ctx):
    """A bigram model with a padded vocabulary, whose two layers report a sum each, and taps."""
    tokens = params["tokens"].at[inputs].get(out_sharding=ctx.stream)
    logits = jnp.einsum("bld,dw->blw", jnp.tanh(tokens), params["head/kernel"])
    size = over_tokens(jnp.mean(tokens**2, -1), ctx)
    layers = {"blocks/0/mixer/size": jnp.stack([size, 2 * size])}
    far = over_tokens(jnp.mean(logits**2, -1), ctx)
    layers |= {f"blocks/0/mixer/{tap}": jnp.stack([far, far + size]) for tap in ctx.taps}
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
    return Batch(
        inputs=rng.integers(0, REAL, (B, L), dtype=np.int32),
        targets=rng.integers(0, REAL, (B, L), dtype=np.int32),
        weights=np.float32(rng.choice([0.0, 0.5, 1.0, 2.0], (B, L)) * inside),
        segment_ids=inside.astype(np.int32),
        positions=at * inside,
        sample=words,
        domain=rng.integers(0, K - 1, B, dtype=np.int32),
    )


def _context(micro, totals, domains=1, taps=()):
    given = dict(train=True, totals=totals, domains=domains, taps=taps)
    return of_batch(micro, key=jax.random.key(0), **given)


@functools.cache
def _compiled(loss, domains=1):
    """(value, sums, gradient) of rows `[B L]` by autodiff, and the same by micro-batches."""
    context = functools.partial(_context, domains=domains, taps=loss.taps)

    def direct(params, batch):
        sums = counts(batch) | loss.sums(params, batch, context(batch, {}))
        return loss.finish(sums)[0], sums

    split = lambda params, parts: value_and_grad(loss, params, parts, context)
    return jax.jit(jax.value_and_grad(direct, has_aux=True)), jax.jit(split)


def _split(batch, A):
    return jax.tree.map(lambda x: x.reshape(A, B // A, *x.shape[1:]), batch)


def _close(actual, expected, tolerance=1e-5):
    """1e-5 of the largest value: float32 sums of some dozens of tokens in another order."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())


@every_case
def test_sums_are_additive_float32(loss):
    """A batch with some of its rows emptied, and one with the others, add up to the whole."""
    sums = lambda batch: _compiled(loss)[0](PARAMS, batch)[0][1]
    first = (np.arange(B) < 3)[:, None]
    keep = lambda batch, rows: batch._replace(
        weights=batch.weights * rows, segment_ids=batch.segment_ids * rows
    )
    whole = sums(_batch())
    assert set(loss.needs) <= set(whole)
    assert all(total.dtype == jnp.float32 for total in whole.values())
    parts = [sums(keep(_batch(), rows)) for rows in (first, ~first)]
    _close(jax.tree.map(jnp.add, *parts), whole)


@every_case
def test_finish_is_linear_in_what_it_does_not_need(loss):
    """Its derivative there is the same at two random points that agree in `needs` and counts."""
    whole = jax.device_get(_compiled(loss)[0](PARAMS, _batch())[0][1])
    fixed = {"weight", "tokens", *loss.needs}
    rng = np.random.default_rng(3)
    random = lambda x: np.float32(np.abs(rng.normal(size=x.shape)) * 5)
    points = [{n: x if n in fixed else random(x) for n, x in whole.items()} for _ in range(2)]
    slope = jax.jit(jax.grad(lambda totals: loss.finish(totals)[0]))
    first, second = map(slope, points)
    free = set(whole) - fixed
    assert free or loss.needs
    _close({n: first[n] for n in free}, {n: second[n] for n in free})


@every_case
@pytest.mark.parametrize("A", [1, 4])
def test_the_gradient_is_that_of_the_whole(loss, A):
    """By micro-batches and at once, against autodiff through finish(sums) of the whole batch."""
    direct, split = _compiled(loss)
    (value, _), gradient = direct(PARAMS, _batch())
    assert all(np.abs(g).max() > 0 for g in gradient.values())
    scalar, metrics, _, accumulated = split(PARAMS, _split(_batch(), A))
    assert all(metric.dtype == jnp.float32 for metric in jax.tree.leaves(metrics))
    _close([scalar, accumulated], [value, gradient])


@every_case
def test_a_batch_without_targets_is_finite_and_gives_no_gradient(loss):
    """Rows of nothing but padding: no NaN, and no gradient."""
    empty = {n: 0 * getattr(_batch(), n) for n in ("weights", "segment_ids", "positions")}
    parts = _split(_batch()._replace(**empty), 4)
    scalar, metrics, _, gradient = _compiled(loss)[1](PARAMS, parts)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((scalar, metrics)))
    for path, leaf in gradient.items():
        np.testing.assert_array_equal(leaf, 0, err_msg=path)


@every_case
@pytest.mark.parametrize("A", [1, 4])
def test_domains_make_up_the_whole_and_change_nothing(loss, A):
    """Each domain's loss is that of its rows alone; value and gradient are as of one domain."""
    batch = _batch()
    scalar, metrics, _, gradient = _compiled(loss, K)[1](PARAMS, _split(batch, A))
    plain = _compiled(loss)[1](PARAMS, _split(batch, A))
    assert set(metrics) - set(plain[1]) == {"domain_loss", "domain_share"}
    _close([scalar, gradient], [plain[0], plain[3]], 1e-6)
    for k in range(K):
        weights = batch.weights * (batch.domain[:, None] == k)
        alone = _compiled(loss, K)[1](PARAMS, _split(batch._replace(weights=weights), A))[1]
        np.testing.assert_allclose(metrics["domain_loss"][k], alone["domain_loss"][k], rtol=1e-6)
        share = np.sum(weights) / np.sum(batch.weights)
        np.testing.assert_allclose(metrics["domain_share"][k], share, rtol=1e-6)


@every_case
@pytest.mark.parametrize("domains", [1, K])
def test_one_device_equals_eight(loss, domains):
    parts, run = _split(_batch(), 4), _compiled(loss, domains)[1]
    expected = run(PARAMS, parts)
    with jax.set_mesh(meshes.make(data=2, tensor=4)):
        put = lambda x, *names: jax.device_put(x, spec(*names, *[None] * (x.ndim - len(names))))
        axes = {"tokens": ("vocab", None), "head/kernel": (None, "vocab")}
        placed = {path: put(leaf, *axes[path]) for path, leaf in PARAMS.items()}
        actual = run(placed, jax.tree.map(lambda x: put(x, None, "batch"), parts))
    _close(actual, expected)
