"""Grouped products by float64 sums over each group's rows, on shards too, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import grouped_matmul, xla
from pallas_kernels.grouped_matmul.specs import Spec

EXPLICIT = AxisType.Explicit
M, K, N, G = 300, 24, 40, 5
SIZES = {
    "even": (60, 60, 60, 60, 60),
    "skewed": (3, 180, 1, 16, 100),
    "empty groups": (0, 129, 0, 171, 0),
    "all in one": (0, 0, 0, 300, 0),
    "nothing at all": (0, 0, 0, 0, 0),
    "a tail": (70, 0, 33, 128, 1),
}
# Relative to the largest value, which is at least 1: float32 sums of at most 300 terms of order 1,
# rounded at random, err by 32 eps; bfloat16 rounds what such a sum gives once, by half an eps.
TOLERANCE = {"float32": 32 * 2.0**-23, "bfloat16": 2.0**-8}


@pytest.fixture(params=["reference", "xla", "xla_ragged"])
def implementation(request, monkeypatch):
    """A name for grouped_matmul; 'xla_ragged' is 'xla' as a TPU has it."""
    if request.param == "xla_ragged":
        monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    return request.param.removesuffix("_ragged")


def both(implementation, x, w, sizes, dy):
    """y, dx and dw."""
    run = functools.partial(grouped_matmul, sizes=sizes, implementation=implementation)
    y, pull = jax.vjp(run, x, w)
    return y, *pull(dy)


@functools.cache
def compiled(implementation, platform):
    """One program for every choice of sizes; platform: what `implementation` is traced for."""
    del platform
    return jax.jit(functools.partial(both, implementation))


def oracle(x, w, sizes, dy):
    """The same in float64, group by group."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    ends, sizes = np.cumsum(sizes), np.asarray(sizes)
    for g, (first, last) in enumerate(zip(ends - sizes, ends, strict=True)):
        rows = slice(first, last)
        y[rows], dx[rows] = x[rows] @ w[g], dy[rows] @ w[g].T
        dw[g] = x[rows].T @ dy[rows]
    return y, dx, dw


def drawn(M, K, N, sizes, dtype="float32"):
    """x, w, sizes and dy; rows of no group are NaN, and infinite in dy."""
    sizes, rng = np.asarray(sizes, np.int32), np.random.default_rng(0)
    x, dy = rng.standard_normal((M, K)), rng.standard_normal((M, N))
    x[sizes.sum() :], dy[sizes.sum() :] = np.nan, np.inf
    w = rng.standard_normal((len(sizes), K, N))
    x, w, dy = (jnp.asarray(a, dtype) for a in (x, w, dy))
    return x, w, jnp.asarray(sizes), dy


def assert_close(found, exact, dtype="float32"):
    for ours, true in zip(found, exact, strict=True):
        assert ours.dtype == jnp.dtype(dtype)
        most = TOLERANCE[dtype] * np.abs(true).max(initial=1.0)
        np.testing.assert_allclose(np.float64(ours), true, rtol=0, atol=most)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients_are_the_oracle_s(implementation, dtype, sizes):
    args = drawn(M, K, N, sizes, dtype)
    found = compiled(implementation, dispatch.platform())(*args)
    assert_close(found, oracle(*args), dtype)


@given(st.lists(st.integers(0, M), min_size=G, max_size=G))
@settings(max_examples=100, deadline=None)
def test_any_sizes_will_do(ends):
    args = drawn(M, K, N, np.diff(sorted(ends), prepend=0))
    assert_close(compiled("xla", "cpu")(*args), oracle(*args))


@pytest.mark.parametrize(
    ("M", "K", "N", "sizes"),
    [
        (0, 3, 2, (0, 0)),
        (1, 3, 2, (0, 1)),
        (31, 1, 7, (2, 0, 29)),
        (129, 2, 1, (129,)),
    ],
)
def test_few_rows_or_groups(implementation, M, K, N, sizes):
    args = drawn(M, K, N, sizes)
    assert_close(both(implementation, *args), oracle(*args))


def test_another_group_s_infinity_stays_there(implementation):
    """Rows 183 to 199 are two groups of their own, and in one block with the group before."""
    x, w, sizes, dy = drawn(M, K, N, SIZES["skewed"])
    x, dy = x.at[183:200].set(jnp.inf), dy.at[183:200].set(jnp.nan)
    found = compiled(implementation, dispatch.platform())(x, w, sizes, dy)
    exact = oracle(x.at[183:200].set(0), w, sizes, dy.at[183:200].set(0))
    finite = np.r_[:183, 200:300], np.r_[:183, 200:300], np.array([0, 1, 4])
    others = lambda arrays: [np.asarray(a)[i] for a, i in zip(arrays, finite, strict=True)]
    assert_close(others(found), others(exact))


def test_what_xla_leaves_open_of_rows_of_no_group_does_not_matter(monkeypatch):
    exactly = jax.lax.ragged_dot_general

    def otherwise(lhs, rhs, sizes, dims, **own):
        found = exactly(lhs, rhs, sizes, dims, **own)
        none = (jnp.arange(M) >= jnp.sum(sizes))[:, None]
        if dims.rhs_group_dimensions:
            return jnp.where(none, jnp.nan, found)
        return found + (jnp.where(none, lhs, 0).T @ jnp.where(none, rhs, 0))[None]

    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    monkeypatch.setattr(jax.lax, "ragged_dot_general", otherwise)
    args = drawn(M, K, N, SIZES["a tail"])
    assert_close(both("xla", *args), oracle(*args))


def test_sums_are_float32(implementation):
    """Two of five terms are 1 + 2^-7, the others 1, and bfloat16 has steps of 4 around 1000.

    A sum in it ends at 256; one of a block's sums that are rounded to it is 1000.
    """
    i, j = np.ogrid[:1000, :1000]
    x = jnp.asarray(np.where((i + j) % 5 < 2, 1 + 2.0**-7, 1), "bfloat16")
    ones = jnp.ones((1, 1000, 8), "bfloat16")
    args = x, ones, jnp.array([1000]), ones[0]
    y, _, dw = both(implementation, *args)
    np.testing.assert_array_equal(np.float32(y), 1004)
    np.testing.assert_array_equal(np.float32(dw), 1004)
    # XLA on a CPU leaves out a rounding that another product follows.
    program = str(jax.make_jaxpr(functools.partial(both, implementation))(*args))
    assert "preferred_element_type=float32" in program
    assert "preferred_element_type=bfloat16" not in program


@pytest.mark.parametrize("rows", [40, 300, 1000])
def test_blocks_hold_each_row_once_and_little_else(rows):
    """Work in proportion to a group's rows, at most one small block more."""

    @jax.jit
    def run(first, last):
        def count(at, mine, carry):
            times, work = carry
            mine = mine[:, 0].astype(int)
            own = jax.lax.dynamic_slice_in_dim(times, at, len(mine)) + mine
            return jax.lax.dynamic_update_slice_in_dim(times, own, at, 0), work + len(mine)

        return xla._blocks(rows, first, last, count, (jnp.zeros(rows, int), 0))

    for first, last in np.sort(np.random.default_rng(0).integers(0, rows + 1, (50, 2))):
        times, work = run(first, last)
        inside = (np.arange(rows) >= first) & (np.arange(rows) < last)
        np.testing.assert_array_equal(times, inside)
        assert work < last - first + min(xla.ROWS["cpu"][1], rows)


# Rows of 4 shards, [expert data], of which each has 2 groups of the 4; one shard has no row.
SHARDS = {(0, 0): (20, 15), (0, 1): (0, 37), (1, 0): (0, 0), (1, 1): (40, 0)}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("x_axes", "w_axes"),
    [(("expert", "data"), "expert"), (("expert", "data"), None), ("data", "expert")],
    ids=["own rows", "one matrix for all", "the same rows for all experts"],
)
def test_shards_each_have_their_own_sizes(implementation, x_axes, w_axes, check_vma):
    """Gradients of what shards have in common are their sum."""
    over, rows = ("expert", "data"), 40
    sizes, rng = np.array(list(SHARDS.values()), np.int32), np.random.default_rng(0)
    shapes = ((4 if x_axes == over else 2) * rows, K), (4 if w_axes else 2, K, N), (4 * rows, N)
    x, w, dy = (rng.standard_normal(shape, np.float32) for shape in shapes)

    def region(x, w, sizes, dy):
        y = grouped_matmul(x, w, sizes, implementation=implementation)
        return jax.lax.psum(jnp.sum(y * dy), over)

    mesh = jax.make_mesh((2, 2), over, axis_types=(EXPLICIT,) * 2)
    specs = P(x_axes), P(w_axes), P(over), P(over)
    outer = jax.shard_map(region, in_specs=specs, out_specs=P(), check_vma=check_vma)
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        placed = map(put, (x, w, sizes.ravel(), dy), specs)
        found = jax.jit(jax.grad(outer, (0, 1)))(*placed)

    expected = np.zeros(x.shape), np.zeros(w.shape)
    for i, (e, d) in enumerate(SHARDS):
        mine = slice(i * rows, (i + 1) * rows)
        own_x = mine if x_axes == over else slice(d * rows, (d + 1) * rows)
        own_w = slice(2 * e, 2 * e + 2) if w_axes else slice(None)
        _, dx, dw = oracle(x[own_x], w[own_w], sizes[i], dy[mine])
        expected[0][own_x] += dx
        expected[1][own_w] += dw
    assert_close(found, expected)


def test_axes_of_one_device_split_nothing():
    args = drawn(M, K, N, SIZES["a tail"])
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(EXPLICIT,) * 3)
    specs = P("data", "fsdp"), P(None, "fsdp", "tensor"), P("data"), P("data", "tensor")
    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
        found = jax.jit(functools.partial(both, "xla"))(*map(put, args, specs))
        assert [jax.typeof(a).sharding.spec for a in found] == [specs[3], *specs[:2]]
    assert_close(found, oracle(*args))


@pytest.mark.parametrize(
    ("which", "spec", "message"),
    [
        (0, P("data"), r"The rows of x, 300, is split 2 ways over mesh axes \('data',\)"),
        (0, P(None, "data"), "The width of x, 24, is split 2 ways"),
        (1, P("data"), "The groups of w, 6, is split 2 ways"),
        (1, P(None, "data"), "The rows of w, 24, is split 2 ways"),
        (1, P(None, None, "data"), "The columns of w, 40, is split 2 ways"),
        (2, P("data"), "The groups of sizes, 6, is split 2 ways"),
    ],
)
def test_nothing_may_be_split(which, spec, message):
    args = list(drawn(M, K, N, (50,) * 6)[:3])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(EXPLICIT,))
    args[which] = jax.device_put(args[which], NamedSharding(mesh, spec))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        jax.eval_shape(grouped_matmul, *args)


@pytest.mark.parametrize(
    ("changes", "own", "message"),
    [
        ({"x": (6, 3, 1)}, {}, r"takes x \[M K\], w \[G K N\], sizes \[G\], not x \(6, 3, 1\), w"),
        ({"x": (6, 5)}, {}, r"x \(6, 5\) has rows of 5, but the matrices of w \(2, 3, 4\) take"),
        ({"sizes": (3,)}, {}, r"sizes \(3,\) are of 3 groups, but w \(2, 3, 4\) has .* for 2"),
        ({"w": "bfloat16"}, {}, "one floating dtype, not float32 and bfloat16: cast one"),
        ({"x": "int32", "w": "int32"}, {}, "one floating dtype, not int32 and int32"),
        ({"sizes": "float32"}, {}, "sizes count rows, but are float32: give integers"),
        ({}, {"implementation": "cuda"}, "No implementation is called 'cuda'; there are: pallas_t"),
        ({}, {"config": 3}, "config 3 is for one of the implementations pallas_tpu, pallas_gpu"),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, changes, own, message):
    # The annotations, which tests enforce, would speak first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    shapes = {"x": (6, 3), "w": (2, 3, 4), "sizes": (2,)}
    dtypes = {"x": "float32", "w": "float32", "sizes": "int32"}
    shapes |= {n: c for n, c in changes.items() if isinstance(c, tuple)}
    dtypes |= {n: c for n, c in changes.items() if isinstance(c, str)}
    given = {n: jax.ShapeDtypeStruct(shapes[n], dtypes[n]) for n in shapes}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda given: grouped_matmul(**given, **own), given)


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ("even", [18, 18, 17, 17, 17]),
        ("skewed", [13, 8, 9, 38, 19]),
        ("holes", [26, 0, 26, 25, 0]),
    ],
)
def test_specs_count_the_rows_of_groups_alone(sizes, counts):
    spec = Spec("own", "", M=87, K=3, N=4, G=5, sizes=sizes)
    np.testing.assert_array_equal(spec.counts, counts)
    assert (spec.flops, spec.backward_flops) == (24 * sum(counts), 48 * sum(counts))
    alone = np.isnan(spec.inputs()["x"]).all(1)
    np.testing.assert_array_equal(alone, np.arange(87) >= sum(counts))
