"""What every file in training/balances must hold; a new file is tested by being there."""

import functools
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import training.balances
from data.batch import Batch
from models.context import of_batch
from models.routing import route
from parallel import mesh as meshes
from parallel.rules import spec
from training.accumulate import value_and_grad
from training.loss import counts
from training.losses import cross_entropy

MODULES = {
    m.name: importlib.import_module(f"training.balances.{m.name}")
    for m in pkgutil.iter_modules(training.balances.__path__)
}
B, L, D, E, W, A = 32, 6, 4, 3, 16, 4
K = 3  # domains, of which the last has no row
PATH, N = "blocks/0/ffn", 2
NORMAL = np.random.default_rng(0).normal
SHAPES = {"tokens": (W, D), "head/kernel": (D, W), f"{PATH}/router": (N, D, E), "values": (E, D)}
PARAMS = {path: np.float32(NORMAL(size=shape)) for path, shape in SHAPES.items()}


def _apply(params, inputs, ctx):
    """Two stacked layers that route, whose experts each give a constant."""

    def layer(x, router):
        own = dict(router="topk_softmax", top_k=2, scale=1.0, capacity=None)
        routed, aux = route(jnp.tanh(x) @ router, jnp.zeros(E), ctx, **own)
        gates = jnp.einsum("blk,blke->ble", routed.gates, jax.nn.one_hot(routed.chosen, E))
        return x + jnp.einsum("ble,ed->bld", gates, params["values"]), aux

    x = params["tokens"].at[inputs].get(out_sharding=ctx.stream)
    x, sums = jax.lax.scan(layer, x, params[f"{PATH}/router"])
    logits = jnp.einsum("bld,dw->blw", x, params["head/kernel"])
    return logits, {f"{PATH}/{name}": value for name, value in sums.items()}


INNER = cross_entropy.make(_apply)


def _cases():
    for name, module in MODULES.items():
        for i, own in enumerate(({}, *getattr(module, "CASES", ()))):
            yield pytest.param(module.make(INNER, (PATH,), **own), id=f"{name}-{i}")


every_case = pytest.mark.parametrize("loss", list(_cases()))


def _batch(seed=1):
    """Rows `[B L]` with padding anywhere, some of them empty, with weights from 0 to 2."""
    rng = np.random.default_rng(seed)
    here = (rng.random((B, L)) < 0.7) & (np.arange(B) % 5 > 0)[:, None]
    return Batch(
        inputs=rng.integers(0, W, (B, L), dtype=np.int32),
        targets=rng.integers(0, W, (B, L), dtype=np.int32),
        weights=np.float32(rng.choice([0.0, 0.5, 1.0, 2.0], (B, L)) * here),
        segment_ids=here * rng.integers(1, 3, (B, 1), dtype=np.int32),
        positions=np.zeros((B, L), np.int32),
        sample=np.stack([np.zeros(B), np.arange(B)], -1).astype(np.uint32),
        domain=rng.integers(0, K - 1, B, dtype=np.int32),
    )


@functools.cache
def _compiled(loss):
    """(value, sums), gradient of rows `[B L]` by autodiff; what `value_and_grad` gives of parts.

    Sums are of one domain, those of parts of K.
    """
    own = dict(train=True, taps=loss.taps)
    context = lambda micro, totals: of_batch(micro, totals=totals, domains=K, **own)

    def direct(params, batch):
        sums = counts(batch) | loss.sums(params, batch, of_batch(batch, **own))
        value, _ = loss.finish(sums)
        return value, {n: x for n, x in sums.items() if n != f"{PATH}/domains"}

    split = lambda params, parts: value_and_grad(loss, params, parts, context)
    return jax.jit(jax.value_and_grad(direct, has_aux=True)), jax.jit(split)


def _on_eight(loss, batch):
    """What `value_and_grad` gives on eight devices in A micro-batches."""
    parts = jax.tree.map(lambda x: x.reshape(A, B // A, *x.shape[1:]), batch)
    with jax.set_mesh(meshes.make(data=2, context=2, expert=2)):
        put = lambda x, *names: jax.device_put(x, spec(*names, *[None] * (x.ndim - len(names))))
        parts = jax.tree.map(lambda x: put(x, None, "batch"), parts)
        found = _compiled(loss)[1](jax.tree.map(put, PARAMS), parts)
    return jax.tree.map(jnp.asarray, jax.device_get(found))


def _close(actual, expected, tolerance=1e-5):
    """1e-5 of the largest value: float32 sums of some hundred tokens in another order."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())


@every_case
def test_sums_are_additive_float32(loss):
    """A batch with some of its rows emptied, and one with the others, add up to the whole.

    Rows that are counted together stay together, in any method's parts of two or four.
    """
    sums = lambda batch: _compiled(loss)[0](PARAMS, batch)[0][1]
    first = (np.arange(B) < 12)[:, None]
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
    _close({n: first[n] for n in free}, {n: second[n] for n in free})


@every_case
def test_micro_batches_on_eight_devices_are_the_whole(loss):
    """Value, gradient and sums; of `running` methods not the gradient, which is of fewer tokens.

    Several domains add metrics, the loss's own and routing's, and change nothing else.
    """
    (value, sums), gradient = _compiled(loss)[0](PARAMS, _batch())
    scalar, metrics, totals, accumulated = _on_eight(loss, _batch())
    _close([scalar, {n: totals[n] for n in sums}], [value, sums])
    if not loss.running:
        _close(accumulated, gradient)
    assert all(metric.dtype == jnp.float32 for metric in jax.tree.leaves(metrics))
    assert metrics[f"{PATH}/balance"].shape == metrics[f"{PATH}/specialisation"].shape == (N,)
    assert metrics[f"picture/{PATH}/experts_by_domain"].shape == (N, K, E)
    nll = jnp.vdot(metrics["domain_loss"], metrics["domain_share"])
    np.testing.assert_allclose(nll, metrics["nll"], rtol=1e-5)


@every_case
def test_a_batch_without_tokens_is_finite_and_gives_no_gradient(loss):
    """Rows of nothing but padding: no NaN, no gradient, and what is kept stays as it was."""
    empty = {n: 0 * getattr(_batch(), n) for n in ("weights", "segment_ids")}
    scalar, metrics, totals, gradient = _on_eight(loss, _batch()._replace(**empty))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((scalar, metrics)))
    for path, leaf in gradient.items():
        np.testing.assert_array_equal(leaf, 0, err_msg=path)
    if loss.after is not None:
        kept = {"frozen": {f"{PATH}/bias": jnp.ones((N, E))}}
        jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 1), loss.after(kept, totals))


def _arguments():
    for name, module in MODULES.items():
        own = [p.name for p in inspect.signature(module.make).parameters.values()]
        yield from (pytest.param(module, argument, id=f"{name}-{argument}") for argument in own[2:])


@pytest.mark.parametrize(("module", "argument"), list(_arguments()))
def test_wrong_arguments_are_one_sentence(module, argument):
    """None may be negative, and none that counts rows, or parts, may be 0."""
    kind = inspect.signature(module.make).parameters[argument].annotation
    for value in (-1.0,) if kind is float else (-1, 0):
        with pytest.raises(ValueError, match=rf"\b{argument}\b.*{value}") as error:
            module.make(INNER, (PATH,), **{argument: value})
        assert "\n" not in str(error.value)
