"""The state of keys and values alone against the definition in float64, with its gradients."""

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.linear_attention import linear_attention, summary, tpu_summary
from pallas_kernels.linear_attention.summary import state_of
from parallel import mesh as meshes
from parallel.rules import spec
from tests.pallas_kernels.interpreted import interpreted

B, L, G, K, V, f = 4, 150, 2, 16, 6, 16
# A last document in the middle of chunks, over all of the row, before padding, and padding only.
IDS = (1, 2, 3), (1, 1, 1), (1, 4, 0), (0, 0, 0)
SEGMENTS = np.stack([np.repeat(ids, (40, 70, 40)) for ids in IDS])
SEGMENTS = SEGMENTS.astype(np.int32)
# Float32 sums of 150 terms; 16-bit features, values and cotangents are rounded once each.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2 * 2.0**-8}
AXES = {"k": ("batch", None, "heads", None), "v": ("batch", None, "heads", None)}
AXES |= {"k_map": ("heads", None, None), "k_bias": ("heads", None), "kv_segments": ("batch", None)}


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Several, and a last one that is not full."""
    monkeypatch.setattr(summary, "CHUNK", 64)
    monkeypatch.setattr(tpu_summary, "TOKENS", 128)


def _arrays(dtype, maps, packed):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    rounded = lambda x: np.float32(jnp.asarray(x, dtype))
    arrays = dict(k=rounded(normal(B, L, G, K)), v=rounded(normal(B, L, G, V)))
    weights = dict(k_map=rounded(normal(G, K, f) * K**-0.5), k_bias=normal(G, f)) if maps else {}
    return arrays | weights, dict(kv_segments=SEGMENTS) if packed else {}


def _with_gradients(fn, dtype, floats, others):
    def call(floats):
        given = floats | {n: floats[n].astype(dtype) for n in "kv"}
        values, keys, segment = fn(**given, **others)
        return (values, keys), segment

    out, pull, segment = jax.vjp(call, floats, has_aux=True)
    # A cotangent that 16-bit numbers have.
    wave = lambda x: jnp.round(8 * jnp.sin(jnp.arange(x.size, dtype=x.dtype))).reshape(x.shape) / 8
    cotangents = jax.tree.map(wave, out)
    if jax.sharding.get_abstract_mesh().explicit_axes:
        like = lambda x, y: jax.reshard(x, jax.typeof(y).sharding)
        cotangents = jax.tree.map(like, cotangents, out)
    return out, pull(cotangents)[0], segment


def _definition(features, k, v, **given):
    """The state that the reference ends with."""
    of_q = {n.replace("k_", "q_"): x for n, x in given.items() if n in ("k_map", "k_bias")}
    if "kv_segments" in given:
        of_q["q_segments"] = given["kv_segments"]
    own = dict(features=features, implementation="reference")
    return linear_attention(jnp.ones_like(k), k, v, **given, **of_q, **own)[2]


@functools.cache
def _expected(features, dtype, maps, packed):
    with jax.enable_x64(True):
        floats, others = _arrays(dtype, maps, packed)
        floats = {n: np.float64(x) for n, x in floats.items()}
        run = functools.partial(_with_gradients, functools.partial(_definition, features))
        return jax.tree.map(np.asarray, jax.jit(run, static_argnums=0)("float64", floats, others))


def _assert_same(got, expected, tolerance):
    np.testing.assert_array_equal(got[2], expected[2])
    for ours, exact in zip(jax.tree.leaves(got[:2]), jax.tree.leaves(expected[:2]), strict=True):
        error = np.abs(np.float64(ours) - exact).max() / np.abs(exact).max()
        assert error < tolerance


CALLS = [("softmax", "float32", True, True), ("taylor", "float32", False, True)]
CALLS += [("elu", "float32", False, False), ("exp", "bfloat16", True, True)]


WITH_KERNEL = [*((*call, None) for call in CALLS), (*CALLS[0], "tpu"), (*CALLS[3], "tpu")]
WITH_KERNEL += [("elu", "float32", False, True, "tpu")]


@pytest.mark.parametrize("call", WITH_KERNEL, ids=lambda call: f"{call[0]}-{call[1]}-{call[4]}")
def test_state_and_gradients_are_those_of_the_definition(call):
    features, dtype, *rest, platform = call
    run = functools.partial(_with_gradients, functools.partial(state_of, features=features), dtype)
    with interpreted(platform) if platform else contextlib.nullcontext():
        got = jax.jit(run)(*_arrays(dtype, *rest))
    _assert_same(got, _expected(*call[:4]), TOLERANCE[dtype])


def test_on_eight_devices():
    """Batch and heads split."""
    run = functools.partial(state_of, features="softmax")
    with jax.set_mesh(meshes.make(data=2, fsdp=2, tensor=2)):
        put = lambda n, x: jax.device_put(x, spec(*AXES[n]))
        placed = [{n: put(n, x) for n, x in xs.items()} for xs in _arrays("float32", True, True)]
        got = jax.jit(functools.partial(_with_gradients, run, "float32"))(*placed)
        for name, gradient in got[1].items():
            assert jax.typeof(gradient).sharding == jax.typeof(placed[0][name]).sharding, name
    _assert_same(got, _expected(*CALLS[0]), TOLERANCE["float32"])


def test_memory_beside_arguments_and_gradients_does_not_grow():
    """Features of all tokens would be 16 times a head's keys and values."""

    def temporary(length):
        like = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)
        pull = lambda k, v: jax.vjp(lambda k, v: state_of(k, v, features="taylor")[:2], k, v)[1]
        run = lambda k, v, dstate: pull(k, v)(dstate)
        state = jax.eval_shape(lambda k, v: state_of(k, v, features="taylor")[:2], like, like)
        memory = jax.jit(run).lower(like, like, state).compile().memory_analysis()
        return memory.temp_size_in_bytes - 2 * 4 * 4 * length  # gradients, chunk by chunk

    assert temporary(4096) - temporary(512) < 1024


def test_what_does_not_fit_is_a_sentence():
    """As a user meets it, without the tests' own checks of annotations."""
    k, v, of = jnp.zeros((2, 8, 2, 4)), jnp.zeros((2, 8, 2, 6)), functools.partial
    state_of = inspect.unwrap(summary.state_of)
    for call, words in {
        of(state_of, k[0], v[0]): r"k \[B L G K\] and v \[B L G V\], not \(8, 2, 4\)",
        of(state_of, k, v.astype(jnp.bfloat16)): "need one dtype",
        of(state_of, k, v, k_map=jnp.zeros((4, 4, 3))): r"k_map must be \(2, 4, 'f'\)",
        of(state_of, k, v, k_bias=jnp.zeros((2, 4))): "come with k_map",
        of(state_of, k, v, kv_segments=jnp.zeros((2, 4), jnp.int32)): r"must be \(2, 8\)",
        of(state_of, k, v, features="sine"): "features 'sine' are unknown",
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
    with jax.set_mesh(meshes.make(context=8)):
        split = jax.device_put(k, P(None, "context"))
        with pytest.raises(
            ValueError, match=r"length of k, 8, is split over mesh axes \('context',\)"
        ):
            state_of(split, split)
