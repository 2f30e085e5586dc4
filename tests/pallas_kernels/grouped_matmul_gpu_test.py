"""The Hopper kernels of grouped products, interpreted on the CPU, against float64, without races.

The interpreter runs barriers, loads and stores by TMA and warpgroups as threads; products are sums
of ordinary values there, see `gpu_ring.multiply`. At the end, what only a GPU can show:

    python -m pytest --noconftest -m gpu tests/pallas_kernels/grouped_matmul_gpu_test.py
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import dispatch
from pallas_kernels.flash_attention import gpu_tiles
from pallas_kernels.grouped_matmul import gpu_order, pallas_gpu, specs
from pallas_kernels.grouped_matmul.gpu_cut import Cut
from pallas_kernels.grouped_matmul.pallas_gpu import Config
from tests.pallas_kernels.interpreted import interpreted

# Results are rounded to 8 or 11 bits; sums are float32.
ROUNDED = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
SMALL = Config(*[Cut(128, 64, 3, 1, 2)] * 3)


def hopper(kind: str = "NVIDIA H200"):
    device = AbstractDevice(device_kind=kind, platform="gpu", num_cores=132)
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def drawn(M, K, N, sizes, dtype):
    """x, w, sizes and dy; what is of no group is NaN."""
    rng = np.random.default_rng(0)
    shapes = (M, K), (len(sizes), K, N), (M, N)
    x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    x[sum(sizes) :], dy[sum(sizes) :] = np.nan, np.nan
    x, w, dy = (jnp.asarray(a, dtype) for a in (x, w * K**-0.5, dy))
    return x, w, jnp.asarray(sizes, jnp.int32), dy


def expected(x, w, sizes, dy):
    """y, dx and dw, group by group."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros(x.shape), np.zeros(w.shape)
    for g, (end, size) in enumerate(zip(np.cumsum(sizes), np.asarray(sizes), strict=True)):
        of = slice(end - size, end)
        y[of], dx[of], dw[g] = x[of] @ w[g], dy[of] @ w[g].T, x[of].T @ dy[of]
    return y, dx, dw


@pytest.fixture
def few_cores(monkeypatch):
    """Each takes several tiles, one after the other, through one ring."""
    monkeypatch.setattr(gpu_tiles, "cores", lambda: 3)


@functools.cache
def both(config):
    def run(x, w, sizes, dy):
        return (
            pallas_gpu.forward(x, w, sizes, config),
            *pallas_gpu.backward(x, w, sizes, dy, config),
        )

    return jax.jit(run)


def assert_close(found, true, names=("y", "dx", "dw")):
    for name, ours, exact in zip(names, found, true, strict=True):
        # Half of the last place of the largest number, and twice that for the sums' own rounding.
        allowed = ROUNDED[ours.dtype.name] * max(1.0, np.abs(exact).max())
        error = np.abs(np.asarray(ours, np.float64) - exact).max()
        assert error <= allowed, (name, error, allowed)  # NaN is not


# Of one shape, so that they are one program. Tiles have 128 rows, steps of dw 64.
SIZES = {
    "even": [40] * 5,
    "skewed": [131, 50, 18, 2, 1],
    "holes and a tail": [0, 66, 0, 69, 1],
    "one group, aligned": [0, 0, 200, 0, 0],
    "one group, not aligned": [3, 197, 0, 0, 0],
    "none": [0] * 5,
}


@pytest.mark.parametrize("name", SIZES)
def test_products_and_gradients(name, few_cores):
    args = drawn(202, 64, 128, SIZES[name], jnp.bfloat16)
    with interpreted("gpu"):
        found = jax.device_get(both(SMALL)(*args))
    assert_close(found, expected(*args))


@pytest.mark.parametrize(
    ("M", "K", "N", "sizes", "config"),
    [
        (203, 72, 200, [111, 0, 50, 3], None),
        (300, 64, 128, [270, 20], Config(*[Cut(256, 128, 3, 2, 1)] * 3)),
    ],
)
def test_sizes_that_are_padded_and_tiles_of_256_rows(M, K, N, sizes, config, few_cores):
    args = drawn(M, K, N, sizes, jnp.float16)
    with interpreted("gpu"):
        found = jax.device_get(both(config)(*args))
    assert_close(found, expected(*args))


def test_a_group_keeps_its_infinities(few_cores):
    """Its rows share tiles, steps and blocks of 8 rows with those of the groups beside it."""
    x, w, sizes, dy = drawn(202, 64, 128, [13, 67, 20, 0, 102], jnp.bfloat16)
    true = expected(x, w, sizes, dy)
    x, dy = x.at[13:80].set(jnp.inf), dy.at[13:80].set(jnp.nan)
    with interpreted("gpu"):
        y, dx, dw = jax.device_get(both(SMALL)(x, w, sizes, dy))
    others, rows = np.array([0, 2, 3, 4]), np.r_[0:13, 80:202]
    assert_close((y[rows], dx[rows], dw[others]), (true[0][rows], true[1][rows], true[2][others]))
    assert not np.isfinite(np.float32(y[13:80])).any()
    assert np.isnan(np.float32(dw[1])).all()


def divided(rng, M: int, G: int):
    """Sizes of G groups with about M rows in all; some are empty."""
    cuts = np.sort(rng.integers(0, M + 1, G))
    return np.diff(cuts, prepend=0).astype(np.int32) * (rng.random(G) < 0.7)


@pytest.mark.parametrize(
    ("M", "G", "T"), [(64, 3, 128), (1000, 9, 128), (777, 40, 256), (8, 1, 128)]
)
def test_visits_store_every_row_once(M, G, T):
    rng, visit = np.random.default_rng(M), jax.jit(gpu_order.visits, static_argnums=(1, 2))
    for _ in range(20):
        sizes = divided(rng, M, G)
        visits, count = jax.device_get(visit(jnp.asarray(sizes), M, T))
        owner = np.repeat(np.append(np.arange(G), G), np.append(sizes, M - sizes.sum()))
        stored = np.zeros(M, int)
        assert count[0] <= len(visits)
        for block, low, high, group in visits[: count[0]]:
            assert 0 <= low < high <= T
            rows = np.arange(8 * block + low, min(8 * block + high, M))
            stored[rows] += 1
            assert (owner[rows] == group).all()
        assert (stored == 1).all()


@pytest.mark.parametrize(("M", "G"), [(64, 3), (1000, 9), (777, 40)])
def test_spans_sum_every_row_once(M, G):
    rng, D = np.random.default_rng(M), 64
    for _ in range(20):
        sizes = divided(rng, M, G)
        spans = jax.device_get(gpu_order.spans(jnp.asarray(sizes), D))
        ends = np.cumsum(sizes)
        for (block, steps, low, high), size, end in zip(spans, sizes, ends, strict=True):
            assert (steps == 0) == (size == 0)
            if steps:
                assert (8 * block + low, 8 * block + D * (steps - 1) + high) == (end - size, end)
                assert 0 <= low < 8
                assert 0 < high <= D


def test_place_takes_every_tile_once_and_panel_by_panel():
    for rows, columns, panel in [(1, 1, 4), (7, 3, 2), (16, 5, 16), (5, 4, 9)]:
        tiles = [gpu_order.place(np.int32(t), rows, columns, panel) for t in range(rows * columns)]
        tiles = [(int(row), int(column)) for row, column in tiles]
        assert sorted(tiles) == list(np.ndindex(rows, columns))
        assert [row // panel for row, _ in tiles] == sorted(row // panel for row, _ in tiles)


def test_declines():
    x, w = jnp.ones((8, 64), jnp.bfloat16), jnp.ones((2, 64, 64), jnp.bfloat16)
    sizes = jnp.ones(2, jnp.int32)
    with pytest.raises(NotImplementedError, match="does not run on a cpu"):
        pallas_gpu.forward(x, w, sizes)
    wide = jnp.float32
    for kind, args, sentence in [
        ("NVIDIA A100-SXM4-40GB", (x, w, sizes), "needs compute capability 9.0"),
        ("NVIDIA H200", (x.astype(wide), w.astype(wide), sizes), "not float32: cast"),
        ("NVIDIA H100 80GB HBM3", (x[:0], w, sizes), "needs rows"),
    ]:
        with hopper(kind), pytest.raises(NotImplementedError, match=sentence):
            jax.eval_shape(pallas_gpu.forward, *args)
        with hopper(kind), pytest.raises(NotImplementedError, match=sentence):
            jax.eval_shape(pallas_gpu.backward, *args, args[0])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(block_m=64), "128 or 256 rows"),
        (dict(block_n=192), "64, 128 or 256 columns"),
        (dict(block_m=256), "halve one of them"),
        (dict(stages=2), "at least 3 stages"),
        (dict(panel=0), "a panel of 1"),
        (dict(block_n=64, pieces=2), "in 1, 2 or 4 pieces of 64, not 2"),
        (dict(stages=5), "bytes of shared memory"),
    ],
)
def test_cut_names_its_limits(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Cut(**fields)


def test_configurations():
    config = Config(forward=dict(stages=3, pieces=4))
    assert config.forward == Cut(stages=3, pieces=4)
    assert Config(**dataclasses.asdict(config)) == config
    assert pallas_gpu.heuristic(4096, 1536) == Config()
    narrow = pallas_gpu.heuristic(64, 100)
    assert (narrow.forward.block_n, narrow.inputs.block_n) == (128, 64)
    assert Config() in pallas_gpu.candidates(specs.SPECS[0])


def on_gpu(spec):
    if dispatch.platform() != "gpu":
        pytest.skip("there is no GPU")
    return drawn(spec.M, spec.K, spec.N, list(spec.counts), jnp.bfloat16)


# Many tiles, groups that end anywhere, and more rows than one group has steps in the ring.
LARGE = [
    specs.Spec("even", "", M=8192, K=1024, N=768, G=8),
    specs.Spec("skewed", "", M=8191, K=768, N=1024, G=61, sizes="skewed"),
    specs.Spec("holes", "", M=5000, K=1408, N=320, G=16, sizes="holes"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("spec", LARGE, ids=lambda spec: spec.name)
def test_on_a_gpu_it_is_the_definition(spec):
    args = on_gpu(spec)
    assert_close(jax.device_get(both(None)(*args)), expected(*jax.device_get(args)))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", LARGE, ids=lambda spec: spec.name)
def test_on_a_gpu_a_hundred_runs_are_one(spec):
    """A race or a barrier too few shows as another result now and then; sums have one order."""
    args, run = on_gpu(spec), both(None)
    first = jax.device_get(run(*args))
    for _ in range(100):
        for ours, before in zip(jax.device_get(run(*args)), first, strict=True):
            np.testing.assert_array_equal(np.float32(ours), np.float32(before))
