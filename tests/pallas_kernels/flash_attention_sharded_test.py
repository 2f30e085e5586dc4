"""Attention on shards: under a mesh, inside a region, and both, as on one device."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.flash_attention import flash_attention, xla
from pallas_kernels.flash_attention.specs import Spec

EPS = float(np.finfo(np.float32).eps)
INPUTS = Spec("sharded", "ci", B=4, L=20, H=4, G=2, K=8, documents=2).inputs()
EXPLICIT = AxisType.Explicit


@pytest.fixture
def implementation(request, monkeypatch):
    """A name for flash_attention; 'xla_loop' is 'xla' with every shape taking its loops."""
    if request.param == "xla_loop":
        monkeypatch.setattr(xla, "SMALL", 0)
        monkeypatch.setitem(xla.TILE, "cpu", (8, 8))
    return request.param.removesuffix("_loop")


def loss(q, k, v, segments, implementation):
    both = {"q_segments": segments, "kv_segments": segments}
    o, lse = flash_attention(q, k, v, **both, return_lse=True, implementation=implementation)
    return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.where(jnp.isinf(lse), 0.0, jnp.cos(lse)))


def gradients(fn, *args):
    return [np.asarray(x) for x in jax.jit(jax.grad(fn, (0, 1, 2)))(*args)]


@functools.cache
def expected():
    args = [INPUTS[n] for n in ("q", "k", "v", "q_segments")]
    return gradients(functools.partial(loss, implementation="reference"), *args)


def assert_same(ours, theirs):
    for x, y in zip(ours, theirs, strict=True):  # only the order of sums differs
        np.testing.assert_allclose(x, y, rtol=0, atol=32 * EPS * max(1.0, np.abs(y).max()))


def placed(mesh, kv_heads="tensor"):
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))
    q, *kv = (INPUTS[n] for n in "qkv")
    q, kv = put(q, "data", None, "tensor"), [put(x, "data", None, kv_heads) for x in kv]
    return q, *kv, put(INPUTS["q_segments"], "data")


@contextlib.contextmanager
def on_mesh(axis_type=EXPLICIT):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


@pytest.mark.parametrize(
    ("implementation", "axis_type"),
    [("reference", EXPLICIT), ("xla", EXPLICIT), ("xla_loop", EXPLICIT), ("xla", AxisType.Auto)],
    indirect=["implementation"],
)
def test_sharded_equals_unsharded(implementation, axis_type):
    run = functools.partial(loss, implementation=implementation)
    with on_mesh(axis_type) as mesh:
        assert_same(gradients(run, *placed(mesh)), expected())


def test_segments_and_one_key_head_may_be_whole_on_every_device():
    one_head = lambda q, k, v, segments: loss(q, k[:, :, :1], v[:, :, :1], segments, "xla")
    args = [INPUTS[n] for n in ("q", "k", "v", "q_segments")]
    alone = gradients(one_head, *args)
    with on_mesh() as mesh:
        assert_same(gradients(one_head, *placed(mesh, None)[:3], args[3]), alone)


@pytest.mark.parametrize(
    ("implementation", "manual", "check_vma"),
    [
        ("reference", ("data",), True),
        ("xla", ("data",), True),
        ("xla_loop", ("data",), True),
        ("xla_loop", ("data",), False),
        ("xla_loop", ("data", "tensor"), True),
        ("xla_loop", ("data", "tensor"), False),
    ],
    indirect=["implementation"],
)
def test_inside_a_shard_map_equals_outside(implementation, manual, check_vma):
    specs = P("data", None, "tensor" if "tensor" in manual else None)

    def region(*args):
        return jax.lax.psum(loss(*args, implementation), manual)

    outer = jax.shard_map(
        region,
        in_specs=(specs, specs, specs, P("data")),
        out_specs=P(),
        axis_names=set(manual),
        check_vma=check_vma,
    )
    with on_mesh() as mesh:
        assert_same(gradients(outer, *placed(mesh)), expected())


@pytest.mark.parametrize("implementation", ["reference", "xla_loop"], indirect=True)
def test_keys_alike_on_all_devices_get_the_summed_gradient(implementation):
    """Within a region, queries are split over an axis along which keys are the same."""
    q, k, v = INPUTS["q"], INPUTS["k"][:1], INPUTS["v"][:1]

    def rows(q, k, v):
        every = (jnp.concatenate([x] * q.shape[0]) for x in (k, v))
        return loss(q, *every, None, implementation)

    alone = gradients(rows, q, k, v)
    region = lambda *args: jax.lax.psum(rows(*args), "data")
    outer = jax.shard_map(
        region, in_specs=(P("data"), P(), P()), out_specs=P(), axis_names={"data"}
    )
    with on_mesh() as mesh:
        q = jax.device_put(q, NamedSharding(mesh, P("data")))
        assert_same(gradients(outer, q, k, v), alone)


@pytest.mark.parametrize(
    ("q_axes", "k_axes", "message"),
    [
        (("data", "tensor"), ("data", "tensor"), r"length of q, 20, is split 2 ways"),
        (("data", None, None, "tensor"), ("data",), r"head size of q, 8, is split 2 ways"),
        (("data", None, "tensor"), ("data",), r"repeat them until it does"),
        (("data",), (None,), r"split batch and heads alike"),
    ],
)
def test_what_cannot_be_split_is_named(q_axes, k_axes, message):
    with on_mesh() as mesh:
        put = lambda name, axes: jax.device_put(INPUTS[name], NamedSharding(mesh, P(*axes)))
        q, k, v = put("q", q_axes), put("k", k_axes), put("v", k_axes)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(flash_attention, q, k, v)
