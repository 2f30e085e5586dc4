"""Values and gradients of per-shard code, entered from every kind of place.

The oracle is the same mathematics on whole arrays, where a shard is an extra array dimension and a
collective is a sum, a roll or a transpose over it.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from parallel.manual import all_gather, manual, psum_scatter

AXES = ("replica", "data", "fsdp", "stage", "context", "expert", "tensor")
# Float32 sums of a few dozen terms in another order; errors are taken against the largest entry.
TOLERANCE = 1e-5


def use(**sizes):
    shape = tuple(sizes.get(a, 1) for a in AXES)
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.set_mesh(jax.make_mesh(shape, AXES, devices=devices))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def put(x, *spec):
    return jax.device_put(x, P(*spec))


def with_gradients(fn, *arrays):
    """The value and the gradients of the sum of its sines."""
    pulled = lambda y, pull: (y, *pull(jnp.cos(y)))
    return jax.jit(lambda *arrays: pulled(*jax.vjp(fn, *arrays)))(*arrays)


def assert_same(mesh, specs, fn, want, *arrays):
    """Value and every gradient of `fn` on a mesh against `want` on whole arrays."""
    assert_expected(mesh, specs, fn, with_gradients(want, *arrays), *arrays)


def assert_expected(mesh, specs, fn, expected, *arrays):
    with use(**mesh):
        placed = [put(a, *s) for a, s in zip(arrays, specs, strict=True)]
        got = with_gradients(fn, *placed)
        for g, x in zip(got[1:], placed, strict=True):
            assert jax.typeof(g).sharding == jax.typeof(x).sharding
    for g, e in zip(got, expected, strict=True):
        assert np.abs(e).max() > 1e-3
        np.testing.assert_allclose(g, e, rtol=0, atol=TOLERANCE * np.abs(e).max())


RING = [(i, (i + 1) % 4) for i in range(4)]
# Each: the per-shard function of x [2 4 2] at `axis`, its out spec, the same on s [shard 2 4 2].
OPERATIONS = {
    "psum": (
        lambda x, a: jax.lax.psum(jnp.tanh(x), a),
        lambda a: P(),
        lambda s: jnp.tanh(s).sum(0),
    ),
    "ring": (
        lambda x, a: jnp.tanh(x) * jax.lax.ppermute(x, a, RING),
        lambda a: P(None, None, a),
        lambda s: jnp.concatenate(jnp.tanh(s) * jnp.roll(s, 1, 0), 2),
    ),
    "all_gather": (
        lambda x, a: jnp.tanh(all_gather(x, a, 1)) * jax.lax.axis_index(a),
        lambda a: P(None, None, a),
        lambda s: jnp.concatenate([jnp.tanh(jnp.concatenate(s, 1)) * i for i in range(4)], 2),
    ),
    "psum_scatter": (
        lambda x, a: psum_scatter(jnp.tanh(x), a, 1) * (jax.lax.axis_index(a) + 1),
        lambda a: P(None, a),
        lambda s: jnp.tanh(s).sum(0) * jnp.arange(1.0, 5)[None, :, None],
    ),
    "all_to_all": (
        lambda x, a: jnp.tanh(jax.lax.all_to_all(x, a, 1, 2, tiled=True)),
        lambda a: P(None, a),
        lambda s: jnp.tanh(jnp.concatenate(s, 2)),
    ),
}


@pytest.mark.parametrize("axis", ["data", "context", "tensor"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_one_region(name, axis):
    op, out, want = OPERATIONS[name]
    other = "context" if axis == "data" else "data"
    fn = manual(lambda x: op(x, axis), axis, P(None, None, axis), out(axis))
    whole = lambda x: want(x.reshape(2, 4, 4, 2).transpose(2, 0, 1, 3))
    assert_same({axis: 4, other: 2}, [(other, None, axis)], fn, whole, normal(0, 2, 4, 8))


def stack(outer, inner, wrap=lambda f: f):
    """An outer region that shifts and sums around an inner one that uses every collective.

    x [4 8] lies over (outer, inner), w [8 4] over inner, u [8 4] nowhere.
    """

    def per_inner(y, w, u):
        t = jnp.sin(y @ w)
        total = jax.lax.psum(t.mean(), inner)
        neighbour = jax.lax.ppermute(t, inner, [(0, 1), (1, 0)])
        gathered = all_gather(y, inner, 1) @ u
        swapped = jax.lax.all_to_all(y, inner, 0, 0, tiled=True)
        return jnp.tanh(y * total + neighbour + gathered + swapped)

    def per_outer(x, w, u):
        y = jax.lax.ppermute(x, outer, [(0, 1), (1, 0)])
        block = manual(per_inner, inner, (P(None, inner), P(inner), P()), P(None, inner))
        z = wrap(block)(jnp.tanh(y), w, u)
        return z * jax.lax.psum(jnp.mean(z**2), outer)

    return manual(per_outer, outer, (P(outer), P(), P()), P(outer), check=False)


def stack_whole(x, w, u, repeat=1):
    """`stack` on whole arrays: y [outer row inner column]."""
    y = jnp.tanh(x.reshape(2, 2, 2, 4)[::-1])
    for _ in range(repeat):
        t = jnp.sin(jnp.einsum("oric,icd->orid", y, w.reshape(2, 4, 4)))
        total = 2 * t.mean((1, 2, 3), keepdims=True)
        gathered = jnp.einsum("oric,icd->ord", y, u.reshape(2, 4, 4))[:, :, None]
        y = jnp.tanh(y * total + t[:, :, ::-1] + gathered + y.transpose(0, 2, 1, 3))
    return (y * 2 * jnp.mean(y**2)).reshape(4, 8)


STACK = normal(0, 4, 8), normal(1, 8, 4) * 0.5, normal(2, 8, 4) * 0.5


@functools.cache
def stack_expected(repeat):
    return with_gradients(lambda *a: stack_whole(*a, repeat=repeat), *STACK)


def assert_stack(outer, inner, mesh, wrap=lambda f: f, repeat=1):
    specs = [(outer, inner), (inner,), ()]
    assert_expected(mesh, specs, stack(outer, inner, wrap), stack_expected(repeat), *STACK)


PAIRS = list(itertools.combinations(AXES, 2))


@pytest.mark.parametrize(("outer", "inner"), PAIRS)
def test_nested_pair(outer, inner):
    assert_stack(outer, inner, {outer: 2, inner: 2})


@pytest.mark.parametrize(("inner", "outer"), PAIRS)
def test_nested_pair_against_the_order_of_the_mesh_is_refused(inner, outer):
    with use(), pytest.raises(ValueError, match="one flat region"):
        jax.eval_shape(stack(outer, inner), *STACK)


def scan(block):
    return lambda y, *w: jax.lax.scan(lambda c, _: (block(c, *w), None), y, None, length=2)[0]


WRAPS = {
    "checkpoint": lambda b: jax.checkpoint(b),
    "dots": lambda b: jax.checkpoint(b, policy=jax.checkpoint_policies.dots_saveable),
    "scan": scan,
    "scan of checkpoint": lambda b: scan(jax.checkpoint(b)),
}


@pytest.mark.parametrize("name", WRAPS)
def test_nested_pair_wrapped(name):
    mesh, repeat = {"stage": 2, "context": 2, "data": 2}, 2 if "scan" in name else 1
    assert_stack("stage", "context", mesh, WRAPS[name], repeat)


SAVES_OR_SCANS = {
    "save": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.everything_saveable),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
}


@pytest.mark.parametrize("name", SAVES_OR_SCANS)
def test_gathers_in_a_checked_region_that_saves_or_scans(name):
    both = lambda x: psum_scatter(jnp.sin(all_gather(jnp.tanh(x), "context", 1)), "context", 1)
    once = lambda x: 2 * jnp.sin(jnp.tanh(x))
    step, want = SAVES_OR_SCANS[name](both), SAVES_OR_SCANS[name](once)
    fn = manual(step, "context", P(None, "context"), P(None, "context"))
    assert_same({"data": 2, "context": 2}, [("data", "context")], fn, want, normal(0, 4, 8))


def test_nesting_in_a_checked_region_is_refused():
    outer = manual(manual(lambda x: x, "context", P(), P()), "stage", P("stage"), P("stage"))
    with use(), pytest.raises(ValueError, match=r"inside a checked one over \('stage',\)"):
        jax.eval_shape(outer, normal(0, 8))


def flat(x, w):
    """Per shard of stage and context; x [2 4], w [4 4]."""
    y = jnp.sin(x @ w)
    shifted = jax.lax.ppermute(y, "context", [(0, 1), (1, 0)])
    return jax.lax.psum(y.sum(), ("stage", "context")) * x + shifted


def flat_whole(x, w):
    y = jnp.sin(jnp.einsum("ric,icd->rid", x.reshape(4, 2, 4), w.reshape(2, 4, 4)))
    return y.sum() * x + y[:, ::-1].reshape(4, 8)


@pytest.mark.parametrize("entered", [(), ("stage",), ("stage", "context")])
@pytest.mark.parametrize("check", [True, False])
def test_two_axes_of_which_some_are_manual(entered, check):
    both = ("stage", "context")
    specs, out = (P("stage", "context"), P("context")), P("stage", "context")
    fn = manual(flat, both, specs, out, check=check)
    if entered:
        check = check and entered == both
        keep = lambda s: P(*(a if a in entered else None for a in s))
        fn = manual(fn, entered, tuple(map(keep, specs)), keep(out), check=check)
    mesh, placed = {"stage": 2, "context": 2, "data": 2}, [both, ("context",)]
    assert_same(mesh, placed, fn, flat_whole, normal(0, 4, 8), normal(1, 8, 4))


def test_three_levels():
    inner = lambda x: jnp.tanh(x) * jax.lax.psum(jnp.sum(x**2), "context")
    inner = manual(inner, "context", P(None, "context"), P(None, "context"))
    middle = lambda x: inner(jnp.sin(x)) + jax.lax.psum(x, "stage")
    middle = manual(middle, "stage", P("stage"), P("stage"))
    outer = lambda x: middle(x * 2) * jax.lax.psum(x, "data")
    outer = manual(outer, "data", P("data"), P("data"), check=False)

    def whole(x):
        y = 2 * x.reshape(2, 2, 2, 8)  # data, stage, row
        s = jnp.sin(y)
        z = jnp.tanh(s) * jnp.sum(s**2, (2, 3), keepdims=True) + y.sum(1, keepdims=True)
        return (z * y.sum(0, keepdims=True) / 2).reshape(8, 8)

    assert_same(
        {"data": 2, "stage": 2, "context": 2}, [("data", "context")], outer, whole, normal(0, 8, 8)
    )


@pytest.mark.parametrize("check", [True, False])
def test_gradient_taken_inside_the_region(check):
    """Of a value that both shards share: checked, it is summed over them already."""
    total = manual(lambda y: jax.lax.psum(y.sum(), "context"), "context", P("context"), P())
    part = lambda w, x: jnp.sin(x * w).sum() if check else total(jnp.sin(x * w))
    local = lambda x, w: jax.grad(part)(w, x)[None]
    fn = manual(local, "data", (P("data"), P()), P() if check else P("data"), check=check)
    with use(data=2, context=2):
        got = jax.jit(fn)(put(normal(0, 8), "data"), put(np.float32(1.3)))
    x = normal(0, 8).astype(np.float64).reshape(2, 4)
    each = np.sum(np.cos(x * 1.3) * x, 1)
    np.testing.assert_allclose(got, each.sum(keepdims=True) if check else each, rtol=TOLERANCE)


def test_axes_of_size_one():
    back = lambda x: psum_scatter(all_gather(x, "context", 1), "context", 1)
    shift = lambda x: jax.lax.ppermute(jax.lax.psum(x, "context"), "context", [(0, 0)]) + back(x)
    shift = manual(shift, "context", P(None, "context"), P(None, "context"))
    fn = manual(lambda x: shift(jnp.sin(x)), "stage", P("stage"), P("stage"), check=False)
    assert_same({}, [("data",)], fn, lambda x: 2 * jnp.sin(x), normal(0, 4, 8))


def test_operands_are_resharded_and_keep_their_other_axes():
    spec = P(None, "context")
    call = manual(lambda tree, i: tree["x"] * i, "context", (spec, P()), spec)
    with use(data=2, context=2, tensor=2):
        x = put(normal(0, 8, 8), "context", "tensor")
        y = jax.jit(call)({"x": x}, jnp.int32(3))
        assert jax.typeof(y).sharding.spec == P(None, ("context", "tensor"))
        np.testing.assert_array_equal(y, 3 * np.asarray(x))


def test_errors_are_sentences():
    identity, x = lambda x: x, normal(0, 6)
    with pytest.raises(ValueError, match="no mesh to be manual over"):
        manual(identity, "data", P("data"), P("data"))(x)
    with pytest.raises(ValueError, match="not among the axes"):
        manual(identity, "data", P("tensor"), P())
    with pytest.raises(TypeError, match="must be a PartitionSpec"):
        manual(identity, "data", "data", P())
    with use(data=4, context=2):
        with pytest.raises(ValueError, match="no axis"):
            manual(identity, "model", P(), P())(x)
        with pytest.raises(ValueError, match=r"does not divide by data=4"):
            manual(identity, "data", P("data"), P("data"))(x)
        with pytest.raises(ValueError, match="more entries"):
            manual(identity, "data", P(None, "data"), P())(x)
        gather = manual(lambda x: all_gather(x, "data", 0), "data", P("data"), P("data"))
        with pytest.raises(ValueError, match="besides 'data'"):
            jax.eval_shape(gather, put(normal(0, 8), "context"))
        with pytest.raises(ValueError, match="is not manual here"):
            all_gather(x, "data", 0)
        scatter = manual(lambda x: psum_scatter(x, "data", 0), "data", P(), P("data"))
        with pytest.raises(ValueError, match="does not divide by data=4"):
            jax.eval_shape(scatter, put(x))
