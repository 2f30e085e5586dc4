"""The Hopper kernel's forward pass, interpreted on the CPU, against float64, and free of races.

The interpreter runs barriers, loads and stores by TMA, the ring, warpgroups as threads, and masks
as they are; products are sums of ordinary values there, see `gpu_tiles.accumulate`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.flash_attention import blocks, gpu_order, pallas_gpu
from pallas_kernels.flash_attention.pallas_gpu import Config
from pallas_kernels.flash_attention.reference import Options

SMALL = Config(block_q=128, block_kv=64)


def hopper(cores: int = 2, kind: str = "NVIDIA H200"):
    device = AbstractDevice(device_kind=kind, platform="gpu", num_cores=cores)
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def interpret(function, *args):
    """What the kernels of function(*args) give, after a look for races."""
    params = plgpu.InterpretGPUParams(detect_races=True)
    try:
        with hopper(), plgpu.force_gpu_interpret_mode(params):
            out = jax.device_get(jax.jit(function)(*args))
    except BaseException:
        interpreter.reset_gpu_interpret_mode_state()
        raise
    assert not interpreter.get_races().races_found
    return out


def seen(L, S, q_segments, kv_segments, options):
    """Which key each query sees, by the words of the definition, bool [B L S]."""
    i, j = np.arange(L)[:, None] + S - L, np.arange(S)[None]
    B = 1 if q_segments is None else len(q_segments)
    q, k = (
        (np.ones((B, n), int) for n in (L, S)) if q_segments is None else (q_segments, kv_segments)
    )
    near = np.ones((B, L, S), bool)
    if options.window is not None:
        near &= (i - j if options.causal else abs(i - j)) < options.window
        rank = np.stack([[(row[:x] == row[x]).sum() for x in range(S)] for row in k])
        near |= (rank < options.first)[:, None]
    near &= (q[:, :, None] == k[:, None]) & (k != 0)[:, None]
    return near & (i >= j) if options.causal else near


def expected(q, k, v, q_segments, kv_segments, options):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    L, S, R = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    s = options.scale * np.einsum("BLHK,BSHK->BHLS", q, np.repeat(k, R, 2))
    if options.softcap is not None:
        s = options.softcap * np.tanh(s / options.softcap)
    s = np.where(seen(L, S, q_segments, kv_segments, options)[:, None], s, -np.inf)
    lse = np.logaddexp.reduce(s, axis=3)
    p = np.exp(s - np.where(lse == -np.inf, 0, lse)[..., None])
    return np.einsum("BHLS,BSHV->BLHV", p, np.repeat(v, R, 2)), lse.swapaxes(1, 2)


# name: B, L, S, H, G, K, V, highest segment, options, configuration
CASES = {
    "full": (1, 128, 128, 1, 1, 64, 64, 0, {}, SMALL),
    "causal": (2, 256, 256, 1, 1, 64, 64, 0, dict(causal=True), SMALL),
    "more keys, grouped": (1, 100, 250, 4, 2, 64, 64, 0, dict(causal=True), SMALL),
    "more queries": (1, 250, 100, 1, 1, 64, 64, 0, dict(causal=True), SMALL),
    "window": (1, 256, 300, 1, 1, 64, 64, 0, dict(causal=True, window=70), SMALL),
    "both sides, leading": (
        1, 200, 330, 1, 1, 64, 64, 0, dict(window=40, first=5), SMALL,
    ),
    "segments": (2, 200, 200, 1, 1, 64, 64, 2, dict(causal=True), SMALL),
    "segments, leading": (
        1, 200, 260, 2, 1, 64, 64, 3, dict(causal=True, window=9, first=3),
        Config(block_q=128, block_kv=64, turns=False),
    ),
    "cap, three groups, float16": (
        1, 192, 192, 1, 1, 64, 64, 0, dict(causal=True, softcap=2.0),
        Config(block_q=192, block_kv=64, stages=3),
    ),
    "wide heads, shared": (
        1, 128, 192, 2, 2, 80, 80, 0, dict(causal=True),
        Config(block_q=128, block_kv=64, turns=False, share=True),
    ),
    "heads of 256": (
        1, 128, 192, 1, 1, 256, 256, 0, dict(causal=True, window=70, softcap=2.0),
        Config(block_q=128, block_kv=64, turns=False, share=True),
    ),
    "narrow values": (1, 64, 128, 1, 1, 128, 40, 0, dict(scale=-0.3), Config()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_forward(name):
    B, L, S, H, G, K, V, most, options, config = CASES[name]
    dtype = jnp.float16 if "float16" in name else jnp.bfloat16
    rng = np.random.default_rng(0)
    shapes = (B, L, H, K), (B, S, G, K), (B, S, G, V)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    segments = [rng.integers(0, most + 1, (B, n), np.int32) for n in (L, S)] if most else [None] * 2
    options = dict(causal=False, window=None, softcap=None, scale=K**-0.5) | options
    options = Options(**options, config=config)
    o, lse = interpret(lambda *args: pallas_gpu.forward(*args, options), q, k, v, *segments)
    true_o, true_lse = expected(q, k, v, *segments, options)
    assert o.dtype == dtype
    assert lse.dtype == np.float32
    # p and o are rounded to 8 (bfloat16) or 11 bits, and weigh values of up to 4; lse is float32.
    rounding = 2**-11 if dtype == jnp.float16 else 2**-8
    np.testing.assert_allclose(np.asarray(o, np.float64), true_o, atol=2 * rounding, rtol=rounding)
    np.testing.assert_allclose(lse, true_lse, atol=3e-6, rtol=1e-6)
    assert (np.asarray(o)[true_lse == -np.inf] == 0).all()


@pytest.mark.parametrize(("L", "S"), [(256, 256), (100, 330), (330, 100), (64, 1000), (700, 65)])
def test_order_visits_what_is_seen(L, S):
    for causal, window, first in [
        (False, None, 0), (True, None, 0), (True, 1, 0), (True, 90, 0), (True, 90, 70),
        (True, 400, 3), (False, 1, 0), (False, 100, 0), (False, 90, 65),
    ]:  # fmt: skip
        options = Options(causal, window, None, 1.0, first)
        T, C = 128, 64
        kinds = blocks.kinds(T, C, L, S, None, None, options)[0]
        for i, row in enumerate(kinds):
            tiles = gpu_order.by_position(np.int32(i), T, C, L, S, options)
            order = [int(tiles.at(t)) for t in range(int(tiles.count))]
            if not row.any():
                assert (order, tiles.masked) == ([0], 1)
                continue
            assert sorted(order) == list(np.flatnonzero(row)), (options, i)
            # A last block of queries may be short, and then sees more tiles whole than kinds says.
            bare = order[int(tiles.masked) :]
            rows = np.arange(i * T, min(i * T + T, L))
            whole = seen(L, S, None, None, options)[0][rows]
            assert all(whole[:, j * C : j * C + C].all() and j * C + C <= S for j in bare)
            assert first or set(np.flatnonzero(row == blocks.ALL)) <= set(bare), (options, i)


@pytest.mark.parametrize(("B", "L", "S", "H", "G"), [(2, 300, 300, 6, 2), (3, 128, 2**17, 4, 4)])
def test_work_is_done_once(B, L, S, H, G):
    like = lambda n, h: jax.ShapeDtypeStruct((B, n, h, 128), jnp.bfloat16)
    options = Options(True, None, None, 1.0)
    work = gpu_order.work(like(L, H), like(S, G), like(S, G), 128, options)
    places = [tuple(map(int, work.at(np.int32(n)))) for n in range(work.pieces)]
    assert sorted(places) == sorted(np.ndindex(B, H, work.blocks))
    section = places[: work.section * work.blocks]
    assert [i for *_, i in section] == sorted((i for *_, i in section), reverse=True)


def test_declines():
    x = jnp.ones((1, 8, 1, 64), jnp.bfloat16)
    options = Options(True, None, None, 1.0)
    call = lambda x: pallas_gpu.forward(x, x, x, None, None, options)
    with pytest.raises(NotImplementedError, match="does not run on a cpu"):
        call(x)
    for kind, like, sentence in [
        ("NVIDIA A100-SXM4-40GB", x, "needs compute capability 9.0"),
        ("NVIDIA H200", x.astype(jnp.float32), "not float32: cast"),
        ("NVIDIA H100 80GB HBM3", jnp.ones((1, 8, 1, 264), x.dtype), "up to 256, not 264"),
        ("NVIDIA GH200 480GB", x[:, :0], "needs tokens"),
    ]:
        with hopper(kind=kind), pytest.raises(NotImplementedError, match=sentence):
            jax.eval_shape(call, like)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(block_q=64), "block_q is 128 or 192"),
        (dict(block_kv=80), "multiple of 64"),
        (dict(stages=1), "at least 2"),
    ],
)
def test_config_names_its_limits(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(**fields)
