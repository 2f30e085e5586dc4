"""The TPU's backward kernel in the interpreter, with its race detector, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention import tpu_backward
from pallas_kernels.flash_attention.reference import Options
from pallas_kernels.flash_attention.specs import Spec
from pallas_kernels.flash_attention.tpu_backward import Backward
from pallas_kernels.flash_attention.tpu_backward_tile import is_seen
from tests.pallas_kernels.attention_oracle import cotangents, mask, oracle
from tests.pallas_kernels.interpreted import interpreted

EPS = float(np.finfo(np.float32).eps)
ROWS = Backward(T=128, C=128, part=128, ahead=1, chunk=384, transposed=False)
TURNED = dataclasses.replace(ROWS, transposed=True)
CHUNKS = dataclasses.replace(ROWS, chunk=128)
TURNED_CHUNKS = dataclasses.replace(TURNED, chunk=256)
PARTS = Backward(T=256, C=256, part=128, ahead=2, chunk=512, transposed=True)
UNLIKE = Backward(T=128, C=256, part=256, ahead=0, chunk=256, transposed=False)


def spec(name: str, L: int, **more) -> Spec:
    return Spec(name, "", **({"B": 1, "H": 2, "K": 128} | more), L=L)


CASES = [
    # Full, cut and skipped tiles, two query heads a key head, queries that pass three times.
    (spec("causal", 384, H=4, G=2), CHUNKS),
    (spec("parts", 512), PARTS),
    (spec("window", 500, window=200, softcap=2.0), PARTS),
    (spec("packed", 300, B=2, H=4, G=2, K=64, documents=4), TURNED_CHUNKS),
    (spec("packed_window", 300, B=2, window=70, softcap=3.0, documents=3), CHUNKS),
    (spec("lambda", 384, window=60, first=150), ROWS),
    (spec("lambda_packed", 300, window=60, first=5, documents=2), TURNED_CHUNKS),
    (spec("both_sides", 200, S=300, causal=False, window=90, first=7), UNLIKE),
    (spec("unmasked", 150, S=300, causal=False), TURNED),
    (spec("more_queries", 333, S=200, H=3, G=1, K=40, V=24), TURNED_CHUNKS),
    (spec("more_keys", 130, S=333, V=256), UNLIKE),
]


def gradients(spec: Spec, config: Backward, inputs, o, lse, do, dlse):
    """dq, dk, dv of the kernel, from what the forward pass would have kept."""
    options = Options(**spec.options, scale=spec.K**-0.5)
    segments = [inputs.get(f"{side}_segments") for side in ("q", "kv")]
    run = lambda *args: tpu_backward.backward(*args, options, config)
    with interpreted("tpu"):
        args = *(inputs[n] for n in "qkv"), *segments, o, lse, do, dlse
        return [np.asarray(x) for x in jax.jit(run)(*args)]


def kept(spec: Spec, inputs, do, dlse):
    """The oracle's results, and the kernel's arguments besides the inputs."""
    true = oracle(spec, inputs, do, dlse)
    dlse = np.where(np.isinf(true["lse"]), 0, dlse)
    return true, (np.float32(true["o"]), np.float32(true["lse"]), do, np.float32(dlse))


@pytest.mark.parametrize(("spec", "config"), CASES, ids=lambda x: getattr(x, "name", ""))
def test_gradients_equal_the_oracle(spec, config):
    inputs = spec.inputs()
    true, given = kept(spec, inputs, *cotangents(spec))
    for name, ours in zip("qkv", gradients(spec, config, inputs, *given), strict=True):
        # Sums of at most 500 x 3 terms of order 1 and o and lse rounded: within 32 eps.
        size = max(1.0, np.abs(true[name]).max())
        np.testing.assert_allclose(ours, true[name], rtol=0, atol=32 * EPS * size, err_msg=name)


@pytest.mark.parametrize("config", [ROWS, TURNED])
def test_bfloat16_sums_in_float32(config):
    case = spec("bf16", 300, G=1, documents=2)
    halves = {n: np.asarray(jnp.asarray(x, jnp.bfloat16)) for n, x in case.inputs().items()}
    halves |= case.segments()
    do, dlse = cotangents(case)
    do = np.asarray(jnp.asarray(do, jnp.bfloat16))
    rounded = {n: np.float32(x) if n in "qkv" else x for n, x in halves.items()}
    true, (o, *given) = kept(case, rounded, np.float32(do), 0 * dlse)
    given[1] = do
    got = gradients(case, config, halves, np.asarray(jnp.asarray(o, jnp.bfloat16)), *given)
    for name, ours in zip("qkv", got, strict=True):
        assert ours.dtype == jnp.bfloat16
        # p, dS, o and the result are each rounded by 2^-9 at most; errors of terms average out.
        size = np.abs(true[name]).max()
        np.testing.assert_allclose(np.float32(ours), true[name], rtol=0, atol=2**-7 * size)


def test_scores_far_below_zero_leave_no_nan():
    """Padding has the score 0, and exp(0 - lse) would be infinite."""
    case = spec("low", 100, S=200, H=1, causal=False)
    inputs = case.inputs()
    inputs["q"], inputs["k"] = 5 * np.abs(inputs["q"]), -5 * np.abs(inputs["k"])
    true, given = kept(case, inputs, *cotangents(case))
    assert given[1].max() < -100
    for name, ours in zip("qkv", gradients(case, ROWS, inputs, *given), strict=True):
        # exp of scores of size 200 that are rounded by 2^-24 of it: 1e-5 relative.
        np.testing.assert_allclose(ours, true[name], rtol=0, atol=1e-4 * np.abs(true[name]).max())


@pytest.mark.parametrize(("spec", "config"), CASES, ids=lambda x: getattr(x, "name", ""))
def test_each_tile_that_holds_a_visible_pair_runs_once(spec, config):
    seen = mask(spec, *spec.segments().values())
    (_, L, S), T, C = seen.shape, config.T, config.C
    tiles = [
        seen[b, i : i + T, j : j + C].any()
        for b in range(spec.B)
        for i in range(0, L, T)
        for j in range(0, S, C)
    ]
    ((name, runs),) = tpu_backward.executions(spec, config).items()
    assert name == tpu_backward.NAME
    keys, queries, *ran, queries_after, keys_after = runs
    assert sum(ran) >= spec.H * sum(tiles)
    if not spec.documents:
        assert sum(ran) == spec.H * sum(tiles)
    chunks, steps = -(-S // config.chunk), -(-L // T) * spec.B * spec.H
    G = spec.G or spec.H
    assert keys == keys_after == spec.B * G * chunks * config.chunk // C
    assert queries == queries_after
    assert steps <= queries * 128 / T <= chunks * steps  # 128 at once, as T is small


def test_causal_tiles_are_cut_only_on_the_diagonal():
    runs = tpu_backward.executions(spec("long", 4096, H=1), ROWS)[tpu_backward.NAME]
    assert runs[2:4] == [32 * 31 / 2, 32]


@pytest.mark.parametrize("place", [-256, -128, 0, 128, 256, 384])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 130])
def test_parts_left_out_are_those_that_nobody_sees(place, causal, window):
    options = Options(causal, window, None, 1.0)
    i, j = np.arange(128)[:, None] + place, np.arange(256)[None]
    seen = (i >= j) | (not causal)
    if window is not None:
        seen = seen & (np.abs(i - j) < window)
    assert is_seen(place, 256, 128, options) == seen.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"T": 100}, "T 100 is no multiple of 128"), ({"chunk": 640}, "chunk 640 is no multiple")],
)
def test_errors_are_sentences(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(UNLIKE, **change)


@pytest.mark.parametrize("kind", ["TPU v5e", "TPU v5p", "TPU v6e", "TPU7x"])
@pytest.mark.parametrize("size", [(1, 1), (300, 300), (1100, 5000), (8192, 8192), (131072, 131072)])
@pytest.mark.parametrize("head", [(64, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_the_heuristic_chooses_fits_the_memory(kind, size, head, dtype):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        config = tpu_backward.heuristic(*size, *head, dtype)
        room = pltpu.get_tpu_info().vmem_capacity_bytes
    # k, v, dk and dv of a chunk, twice for the copies on their way, and their sums in float32.
    lanes, item = sum(-(-x // 128) * 128 for x in head), jnp.dtype(dtype).itemsize
    assert config.chunk * lanes * (4 * item + 4) <= room
    assert size[0] + 128 > config.T
    assert config.chunk < size[1] + 128 * config.chunk // config.C
