"""What every file in models/ffns must hold; a new file is tested by being there."""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models.ffns
from models.context import Context
from models.param import Dims, restore, table
from parallel import mesh as meshes
from parallel.fsdp import gather
from parallel.rules import spec

NAMES = sorted(m.name for m in pkgutil.iter_modules(models.ffns.__path__))
B, L = 4, 6


def _cases():
    for name in NAMES:
        module = importlib.import_module(f"models.ffns.{name}")
        for i, own in enumerate(({}, *getattr(module, "CASES", ()))):
            yield pytest.param(module.FFN, own, id=f"{name}-{i}")


every_case = pytest.mark.parametrize(("ffn", "own"), list(_cases()))


def _build(ffn, own, D=32):
    dims = Dims(d_model=D, length=L, n_layers=2, base_d_model=D)
    graph, state = nnx.split(nnx.eval_shape(lambda: ffn(dims, rngs=nnx.Rngs(0), **own)))
    entries, rng = table(state), np.random.default_rng(1)
    # Random biases too: zeros would hide mistakes in what they feed.
    std = lambda weight: (weight.init[1:] or (0.3,))[0]
    draw = lambda e: jnp.asarray(std(e.weight) * rng.normal(size=e.shape), jnp.float32)
    params = {path: draw(entry) for path, entry in entries.items()}
    return lambda params: nnx.merge(graph, restore(state, params)), params, entries


def _context(segments=None, **changes):
    segments = np.ones((B, L), np.int32) if segments is None else segments
    positions = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    put = lambda x: jax.device_put(x, spec("batch", "length"))
    # Everything that a layer may ask for in training.
    rows = jax.device_put(np.arange(2 * B, dtype=np.uint32).reshape(B, 2), spec("batch", None))
    own = dict(sample=rows, key=jax.random.key(3), layer=jnp.int32(1), train=True)
    return Context(put(positions), put(segments), **(own | changes))


def _inputs(D=32):
    return np.random.default_rng(2).normal(size=(B, L, D)).astype(np.float32)


def _close(actual, expected, tolerance=2e-5):
    """2e-5 of the largest value: sums of a few hundred float32 products in another order."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@every_case
@pytest.mark.parametrize(("D", "dtype"), [(32, "float32"), (64, "bfloat16")])
def test_shape_and_dtype(ffn, own, D, dtype):
    build, params, _ = _build(ffn, own, D)
    run = jax.jit(lambda params, x, ctx: build(params)(x, ctx))
    y, aux = run(params, jnp.asarray(_inputs(D), dtype), _context(dtype=dtype))
    assert y.shape == (B, L, D)
    assert y.dtype == dtype
    assert bool(jnp.all(jnp.isfinite(y.astype(jnp.float32))))
    assert all(a.dtype == jnp.float32 for a in aux.values())


@every_case
def test_works_on_each_position_alone(ffn, own):
    """The output at (b, t) reads the input at (b, t) and no other, and rows are treated alike."""
    build, params, _ = _build(ffn, own)
    if not getattr(build(params), "alone", True):
        pytest.skip("tokens compete for room")
    x, ctx, weight = _inputs(), _context(), _inputs()
    reads = lambda x, b, t: jnp.sum(weight[0, 0] * build(params)(x, ctx)[0][b, t])
    gradient = jax.jit(jax.grad(lambda x, b, t: reads(x, b, t)))
    for b, t in ((0, 0), (1, 3), (3, L - 1)):
        size = np.abs(gradient(jnp.asarray(x), b, t)).max(-1)
        assert size[b, t] > 0
        assert np.count_nonzero(size) == 1


@every_case
@pytest.mark.parametrize(
    "sizes", [dict(data=2, fsdp=2, tensor=2), dict(context=2, expert=2, tensor=2)], ids=str
)
def test_one_device_equals_eight(ffn, own, sizes):
    build, params, entries = _build(ffn, own)
    x, segments = _inputs(), np.repeat([[1, 1, 1, 2, 2, 0]], B, 0).astype(np.int32)

    def run(params, x, ctx):
        # The scan body hands a layer weights whose fsdp shards are gathered.
        y, aux = build(jax.tree.map(gather, params))(x, ctx)
        counted = jnp.arange(32.0)[None, None] * y * ctx.valid[:, :, None]
        return jnp.sum(counted * y), aux

    grads = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    expected = grads(params, x, _context(segments))
    with jax.set_mesh(meshes.make(**sizes)):
        put = lambda x, *names: jax.device_put(x, spec(*names))
        placed = {p: put(leaf, *entries[p].axes) for p, leaf in params.items()}
        actual = grads(placed, put(x, "batch", "length", None), _context(segments))
        for path, gradient in actual[1][0].items():
            assert gradient.sharding.is_equivalent_to(placed[path].sharding, gradient.ndim), path
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        _close(a, e, 1e-4)  # the loss squares outputs, which doubles relative rounding


@every_case
def test_sums_are_over_valid_tokens(ffn, own):
    """What is reported adds up over tokens, or rows that compete; padding adds nothing."""
    build, params, _ = _build(ffn, own)
    run = jax.jit(lambda params, x, ctx: build(params)(x, ctx)[1])
    if not jax.eval_shape(run, params, _inputs(), _context()):
        return
    segments = np.ones((B, L), np.int32)
    first, second = segments.copy(), segments.copy()
    part = np.s_[:, 2:] if getattr(build(params), "alone", True) else np.s_[2:]
    first[part], second[first > 0] = 0, 0
    whole, *parts = (run(params, _inputs(), _context(s)) for s in (segments, first, second))
    for name, total in whole.items():
        _close(parts[0][name] + parts[1][name], total)


@every_case
def test_parameter_table_is_complete(ffn, own):
    _, params, entries = _build(ffn, own)
    assert set(entries) == set(params)
    assert any(entry.is_matrix for entry in entries.values())
    for path, entry in entries.items():
        weight, rank = entry.weight, len(entry.shape)
        assert len(weight.axes) == rank, path
        roles = (*weight.fan_in, *weight.fan_out, *weight.stack)
        assert all(0 <= i < rank for i in roles), path
        assert len(set(roles)) == len(roles), path
        if entry.is_matrix and weight.group == "hidden":
            assert sorted(roles) == list(range(rank)), path
            assert weight.init[0] == "zeros" or weight.decay, path
        if weight.group in ("bias", "norm"):
            assert not weight.decay, path
