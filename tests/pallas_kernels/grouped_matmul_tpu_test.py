"""The TPU's kernels in the interpreter, with its race detector, against float64."""

import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.grouped_matmul import pallas_tpu, tpu_rows, tpu_visits, tpu_weights
from pallas_kernels.grouped_matmul.pallas_tpu import Config
from pallas_kernels.grouped_matmul.specs import SPECS
from pallas_kernels.grouped_matmul.tpu_rows import Rows
from pallas_kernels.grouped_matmul.tpu_weights import Weights
from tests.pallas_kernels.interpreted import interpreted

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8}
M, K, N = 300, 136, 200
SIZES = {
    "even": (75, 75, 75, 75),
    "skewed": (10, 246, 3, 41),
    "aligned": (128, 128, 44, 0),
    "empty": (0, 130, 0, 170),
    "rest": (7, 0, 120, 1),
    "rest_from_a_tile_s_start": (100, 28, 128, 0),
    "one": (0, 0, 300, 0),
    "none": (0, 0, 0, 0),
}


def target(kind="TPU v5p", cores=1):
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def cut(T=256, part=128, C=128, piece=128, rows=256, k=128, n=128) -> Config:
    own = Rows(T, part, C, piece)
    return Config(own, own, Weights(rows, part, k, n))


def arrays(sizes, dtype):
    """x, w, sizes and dy whose rows of no group are NaN."""
    rng = np.random.default_rng(0)
    x, w, dy = (rng.standard_normal(s) for s in ((M, K), (len(sizes), K, N), (M, N)))
    x[sum(sizes) :] = dy[sum(sizes) :] = np.nan
    x, w, dy = (jnp.asarray(a, dtype) for a in (x, w, dy))
    return x, w, jnp.asarray(sizes, jnp.int32), dy


def oracle(x, w, sizes, dy):
    """y, dx and dw in float64."""
    x, w, dy = (np.float64(a) for a in (x, w, dy))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    start = 0
    for group, size in enumerate(np.asarray(sizes)):
        rows = slice(start, start := start + size)
        y[rows], dx[rows] = x[rows] @ w[group], dy[rows] @ w[group].T
        dw[group] = x[rows].T @ dy[rows]
    return y, dx, dw


@jax.jit(static_argnums=4)
def both(x, w, sizes, dy, config):
    y = pallas_tpu.forward(x, w, sizes, config)
    return y, *pallas_tpu.backward(x, w, sizes, dy, config)


def ours(given, config):
    with interpreted("tpu"):
        return [np.float64(a) for a in both(*given, config)]


def check(given, config):
    """Sums of at most 300 products of order 1, rounded at random; and bfloat16 rounds results."""
    last = 0.0 if given[0].dtype == jnp.float32 else EPS["bfloat16"]
    for found, true in zip(ours(given, config), oracle(*given), strict=True):
        assert found.shape == true.shape
        atol = 16 * EPS["float32"] * max(1.0, np.abs(true).max())
        np.testing.assert_allclose(found, true, rtol=last, atol=atol)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_results_and_gradients_are_those_of_float64(sizes):
    check(arrays(sizes, "float32"), cut())


@pytest.mark.parametrize(
    "config",
    [
        cut(T=128, C=256, rows=128, k=256, n=256),
        cut(T=512, part=256, C=256, piece=256, rows=256),
        None,
    ],
    ids=["pieces", "large", "heuristic"],
)
def test_other_cuts_change_nothing(config):
    check(arrays((10, 246, 0, 40), "float32"), config)


def test_bfloat16_rounds_results_only():
    check(arrays((10, 0, 246, 40), "bfloat16"), None)


@pytest.mark.parametrize("side", ["x", "dy"])
def test_a_nan_stays_in_its_row_and_its_group(side):
    sizes = (10, 150, 3, 137)
    x, w, sizes, dy = arrays(sizes, "float32")
    x, dy = (a.at[20].set(jnp.nan) if name == side else a for name, a in (("x", x), ("dy", dy)))
    y, dx, dw = (np.isnan(a) for a in ours((x, w, sizes, dy), cut()))
    row, group = np.arange(M) == 20, np.arange(4) == 1
    np.testing.assert_array_equal(y.any(1), row & (side == "x"))
    np.testing.assert_array_equal(dx.any(1), row & (side == "dy"))
    np.testing.assert_array_equal(dw.any((1, 2)), group)


@st.composite
def spreads(draw):
    """Sizes of six groups of M rows, and rows a tile; often at a tile's end, often empty."""
    ends = st.sampled_from([0, 1, 5, 127, 128, 200, 256, 257, 299, M]) | st.integers(0, M)
    stops = sorted(draw(st.lists(ends, min_size=6, max_size=6)))
    return np.diff([0, *stops]), draw(st.sampled_from([128, 256]))


tabulate = jax.jit(tpu_visits.visits, static_argnums=(1, 2, 3))


def visited(sizes, T, rest):
    return tpu_visits.Visits(*map(np.asarray, tabulate(jnp.asarray(sizes), M, T, rest)))


@hypothesis.given(spreads())
@hypothesis.settings(deadline=None, max_examples=100)
def test_each_row_is_visited_once_by_its_group(spread):
    sizes, T = spread
    found = visited(sizes, T, rest=True)
    owner, own = np.full(M, -1), found.counts[0]
    for v in range(found.counts[1]):
        rows = found.target[v] * T + np.arange(found.first[v], found.last[v])
        assert rows.size
        assert found.last[v] <= T
        assert (owner[rows] == -1).all()
        owner[rows] = found.group[v] if v < own else len(sizes)
        # What is read of no group is what was there before.
        assert (
            found.source[v]
            == (found.target if v < found.counts[0] else found.source)[
                min(v, max(found.counts[0] - 1, 0))
            ]
        )
    true = np.repeat(np.arange(len(sizes) + 1), [*sizes, M - sum(sizes)])
    np.testing.assert_array_equal(owner, true)


@hypothesis.given(spreads(), st.booleans())
@hypothesis.settings(deadline=None, max_examples=100)
def test_visits_are_in_order_and_within_the_grid(spread, rest):
    sizes, T = spread
    found, tiles = visited(sizes, T, rest), -(-M // T)
    V = tiles + len(sizes) - (not rest)
    assert all(x.shape == (V,) for x in found[:-1])
    assert 0 <= found.counts[0] <= found.counts[1] <= V
    for name, most in (("group", len(sizes)), ("source", tiles), ("target", tiles)):
        x = getattr(found, name)
        assert set(x) <= set(range(most))
        # A block that is left is not come back to, and what is beyond repeats the last.
        assert (np.diff(x) >= 0).all()
        assert len(set(x[max(found.counts[1] - 1, 0) :])) == 1
    if not rest:
        assert set(found.group) == set(range(len(sizes)))


@hypothesis.given(spreads(), st.sampled_from([128, 256]))
@hypothesis.settings(deadline=None, max_examples=100)
def test_parts_are_what_the_kernels_walk_over(spread, part):
    sizes, T = spread
    T = max(T, part)
    found = visited(sizes, T, rest=True)
    walked = -(-found.last // part) - found.first // part
    own, after = found.counts
    parts = walked[:own].sum(), walked[own:after].sum()
    assert tpu_visits.parts(np.asarray(sizes), M, part) == parts


KINDS = {"TPU v5e": 1, "TPU v5p": 2, "TPU v6e": 1, "TPU7x": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_the_heuristic_fits_every_shape(kind):
    widths, rows = (1, 100, 136, 1408, 4096, 14336), (1, 300, 10**6)
    with target(kind, KINDS[kind]):
        info = pltpu.get_tpu_info()
        for M, K, N, dtype in itertools.product(rows, widths, widths, EPS):
            x, w = (jax.ShapeDtypeStruct(s, dtype) for s in ((M, K), (3, K, N)))
            found, size = pallas_tpu.heuristic(x, w), x.dtype.itemsize
            for own, D, C in ((found.forward, K, N), (found.inputs, N, K)):
                blocks = 2 * size * (own.T * D + own.T * own.C + D * own.C)
                assert blocks <= info.vmem_capacity_bytes * 3 // 4
                assert -(-C // info.mxu_column_size) * info.mxu_column_size >= own.C or C <= 128
                # No core waits for another.
                assert -(-C // own.C) % info.num_cores == 0 or C <= 128
            T, _, k, n = dataclasses.astuple(found.weights)
            blocks = 2 * size * (T * (k + n) + k * n) + 4 * k * n
            assert blocks <= info.vmem_capacity_bytes * 3 // 4


def test_what_is_too_wide_is_declined():
    with target(), pytest.raises(NotImplementedError, match="sums over 1000000 at once"):
        tpu_rows.heuristic(128, 10**6, 128, "bfloat16", transposed=False)
    with target(), pytest.raises(NotImplementedError, match="scalar memory"):
        tpu_visits.check_scalars(10**8, 512, 8)


def test_what_it_cannot_do_it_declines():
    x, w, sizes = jnp.ones((8, 8), jnp.float16), jnp.ones((1, 8, 8)), jnp.ones(1, jnp.int32)
    with pytest.raises(NotImplementedError, match="for a TPU, not a cpu"):
        pallas_tpu.forward(x, w, sizes, None)
    with target(), pytest.raises(NotImplementedError, match="not float16"):
        pallas_tpu.forward(x, w, sizes, None)
    with target(), pytest.raises(NotImplementedError, match="without entries"):
        pallas_tpu.forward(w[0, :0], w, sizes, None)


def test_what_does_not_fit_is_an_error_of_one_sentence():
    for wrong in ({"T": 100}, {"part": 0}, {"T": 128, "part": 256}, {"C": 256, "piece": 384}):
        with pytest.raises(ValueError, match="choose"):
            cut(**wrong)
    with pytest.raises(ValueError, match="choose"):
        Weights(T=256, part=128, K=64, N=128)
    plain = dataclasses.asdict(cut())
    assert Config(**plain) == cut()


def test_candidates_are_cuts_that_can_be_counted():
    for spec in (x for x in SPECS if "aot" in x.tag):
        with target(cores=2):
            found = list(pallas_tpu.candidates(spec))
            assert len(found) == len(set(found)) > 3
            for config in found:
                runs = pallas_tpu.executions(spec, config)
                assert set(runs) == {tpu_rows.FORWARD, tpu_rows.BACKWARD, tpu_weights.NAME}
