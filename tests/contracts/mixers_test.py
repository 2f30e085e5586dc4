"""What every file in models/mixers must hold; a new file is tested by being there."""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models.mixers
from models.context import Context
from models.param import Dims, flatten, restore, table
from parallel import mesh as meshes
from parallel.rules import spec

NAMES = sorted(m.name for m in pkgutil.iter_modules(models.mixers.__path__))
B, L = 4, 24


def _cases():
    for name in NAMES:
        module = importlib.import_module(f"models.mixers.{name}")
        for i, own in enumerate(({}, *getattr(module, "CASES", ()))):
            yield pytest.param(module.Mixer, own, id=f"{name}-{i}")


CASES = list(_cases())
every_case = pytest.mark.parametrize(("mixer", "own"), CASES)


def _build(mixer, own, D=32):
    dims = Dims(d_model=D, length=L, n_layers=2, base_d_model=D)
    module = mixer(dims, rngs=nnx.Rngs(0), **own)
    graph, state = nnx.split(module)
    # Zero starts (biases) would hide mistakes in what they feed.
    leaves = flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = {
        path: leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for (path, leaf), key in zip(leaves.items(), keys, strict=True)
    }
    return lambda params: nnx.merge(graph, restore(state, params)), params, table(state)


def _apply(build, params, x, ctx):
    return jax.jit(lambda params, x, ctx: build(params)(x, ctx))(params, x, ctx)


def _context(segments=None, positions=None, **changes):
    segments = np.ones((B, L), np.int32) if segments is None else np.asarray(segments, np.int32)
    if positions is None:
        positions = _positions(segments)
    return Context(positions=jnp.asarray(positions), segment_ids=jnp.asarray(segments), **changes)


def _positions(segments):
    starts = np.diff(segments, axis=1, prepend=-1) != 0
    index = np.arange(segments.shape[1])[None]
    return (index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)).astype(np.int32)


def _inputs(D=32, dtype="float32"):
    return jax.random.normal(jax.random.key(2), (B, L, D), dtype)


def _close(actual, expected, tolerance=2e-5):
    """2e-5 of the largest value: sums of a few hundred float32 products in another order."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@every_case
@pytest.mark.parametrize("D", [32, 64])
def test_shape_and_dtype(mixer, own, D):
    build, params, _ = _build(mixer, own, D)
    for dtype in ("float32", "bfloat16"):
        y, aux = _apply(build, params, _inputs(D, dtype), _context(dtype=dtype))
        assert y.shape == (B, L, D)
        assert y.dtype == dtype
        assert bool(jnp.all(jnp.isfinite(y.astype(jnp.float32))))
        assert all(a.dtype == jnp.float32 for a in aux.values())


@every_case
def test_is_causal(mixer, own):
    if "causal" not in mixer.modes:
        return
    build, params, _ = _build(mixer, own)
    ctx, weight = _context(), jax.random.normal(jax.random.key(3), (B, 32))
    reads_of = jax.jit(jax.grad(lambda x, t: jnp.sum(weight * build(params)(x, ctx)[0][:, t])))
    for t in (0, 7, L - 2):
        reads = reads_of(_inputs(), t)
        assert float(jnp.max(jnp.abs(reads[:, t + 1 :]))) == 0.0
        assert t == 0 or float(jnp.max(jnp.abs(reads[:, : t + 1]))) > 0.0


@every_case
def test_bidirectional_sees_both_ways(mixer, own):
    if "bidirectional" not in mixer.modes:
        return
    build, params, _ = _build(mixer, own)
    ctx, t = _context(causal=False), 7
    reads = jax.jit(jax.grad(lambda x: jnp.sum(build(params)(x, ctx)[0][:, t])))(_inputs())
    assert float(jnp.max(jnp.abs(reads[:, t + 1]))) > 0.0
    assert float(jnp.max(jnp.abs(reads[:, t - 1]))) > 0.0


@every_case
def test_packed_segments_do_not_see_each_other(mixer, own):
    """A packed row equals its documents in rows of their own, and padding gives nothing."""
    build, params, _ = _build(mixer, own)
    lengths = (5, 11, 4)
    segments = np.zeros((B, L), np.int32)
    segments[:, : sum(lengths)] = np.repeat((1, 2, 3), lengths)
    x = _inputs()
    packed, _ = _apply(build, params, x, _context(segments))
    start = 0
    for size in lengths:
        alone = jnp.zeros_like(x).at[:, :size].set(x[:, start : start + size])
        only = np.zeros((B, L), np.int32)
        only[:, :size] = 1
        y, _ = _apply(build, params, alone, _context(only))
        _close(packed[:, start : start + size], y[:, :size])
        start += size
    ctx = _context(segments)
    second = lambda x: jnp.sum(build(params)(x, ctx)[0][:, 5:16] ** 2)
    first = jax.jit(jax.grad(second))(x)
    assert float(jnp.max(jnp.abs(first[:, :5]))) == 0.0
    assert float(jnp.max(jnp.abs(first[:, 16:]))) == 0.0


@every_case
def test_prefill_and_decode_equal_the_parallel_form(mixer, own):
    """Ragged prompts, then one token a time, against one pass over the whole sequences."""
    if "causal" not in mixer.modes:
        return
    build, params, _ = _build(mixer, own)
    module, x = build(params), _inputs()
    whole, _ = _apply(build, params, x, _context())
    prompts = np.array([3, 9, 1, 14])
    inside = np.arange(L)[None] < prompts[:, None]
    cache = module.init_cache(B, L, "float32")
    padded = jnp.where(inside[:, :, None], x, 7.0)
    prefill = jax.jit(lambda x, ctx, cache: build(params).prefill(x, ctx, cache))
    y, cache = prefill(padded, _context(inside, np.arange(L)[None] * inside), cache)
    for row, size in enumerate(prompts):
        _close(y[row, :size], whole[row, :size])
    rows = np.arange(B)
    decode = jax.jit(lambda x, ctx, cache: build(params).decode(x, ctx, cache))
    for offset in range(8):
        at = (prompts + offset).astype(np.int32)
        ctx = _context(np.ones((B, 1), np.int32), at[:, None])
        y, cache = decode(x[rows, at][:, None], ctx, cache)
        _close(y[:, 0], whole[rows, at])


@every_case
def test_state_size_is_that_of_the_cache(mixer, own):
    if "causal" not in mixer.modes:
        return
    build, params, _ = _build(mixer, own)
    cache = build(params).init_cache(1, L, "float32")
    assert build(params).state_size(L) == sum(leaf.size for leaf in jax.tree.leaves(cache))


@every_case
@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=2, tensor=2), dict(context=4, tensor=2)])
def test_one_device_equals_eight(mixer, own, mesh):
    """Split over context too, documents crossing the borders, where the mixer says how."""
    build, params, entries = _build(mixer, own)
    if "context" in mesh and build(params).context == "none":
        return
    x, segments = _inputs(), np.repeat([[1] * 10 + [2] * 12 + [0] * 2], B, 0)

    def run(params, x, segments, positions):
        ctx = Context(positions=positions, segment_ids=segments)
        scale = jnp.arange(32.0)[None, None]
        return jnp.sum(scale * build(params)(x, ctx)[0] ** 2)

    grads = jax.jit(jax.value_and_grad(run, (0, 1)))
    expected = grads(params, x, jnp.asarray(segments), jnp.asarray(_positions(segments)))
    with jax.set_mesh(meshes.make(**mesh)):
        put = lambda x, *names: jax.device_put(x, spec(*names))
        placed = {p: put(leaf, *entries[p].axes) for p, leaf in params.items()}
        # The scan body hands a mixer weights whose fsdp shards are gathered.
        from parallel.fsdp import gather

        gathered = jax.jit(lambda p: jax.tree.map(gather, p))(placed)
        tokens = [put(a, "batch", "length") for a in (segments, _positions(segments))]
        actual = grads(gathered, put(x, "batch", "length", None), *tokens)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        _close(a, e, 1e-4)  # the loss squares outputs, which doubles relative rounding


@every_case
def test_parameter_table_is_complete(mixer, own):
    _, params, entries = _build(mixer, own)
    assert set(entries) == set(params)
    for path, entry in entries.items():
        weight, rank = entry.weight, len(entry.shape)
        assert len(weight.axes) == rank, path
        assert all(0 <= i < rank for i in (*weight.fan_in, *weight.fan_out, *weight.stack)), path
        if entry.is_matrix and weight.group == "hidden":
            assert weight.fan_in, path
            assert weight.fan_out, path
        if weight.group in ("bias", "norm"):
            assert not weight.decay, path
