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
from tests.pallas_kernels.interpreted import interpreted

EPS = float(np.finfo(np.float32).eps)
INPUTS = Spec("sharded", "ci", B=4, L=20, H=4, G=2, K=8, sinks=True, documents=2).inputs()
NAMES = ("q", "k", "v", "sinks", "q_segments")
EXPLICIT = AxisType.Explicit


@pytest.fixture
def implementation(request, monkeypatch):
    """A name for flash_attention; 'xla_loop' is 'xla' with every shape taking its loops."""
    if request.param == "xla_loop":
        monkeypatch.setattr(xla, "SMALL", 0)
        monkeypatch.setitem(xla.TILE, "cpu", (8, 8))
    return request.param.removesuffix("_loop")


def loss(q, k, v, sinks, segments, implementation):
    both = {"q_segments": segments, "kv_segments": segments, "window": 6, "first": 2}
    run = functools.partial(flash_attention, return_lse=True, implementation=implementation)
    o, lse = run(q, k, v, sinks=sinks, **both)
    return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.where(jnp.isinf(lse), 0.0, jnp.cos(lse)))


def gradients(fn, *args, of=4):
    return [np.asarray(x) for x in jax.jit(jax.grad(fn, tuple(range(of))))(*args)]


@functools.cache
def expected():
    args = [INPUTS[n] for n in NAMES]
    return gradients(functools.partial(loss, implementation="reference"), *args)


def assert_same(ours, theirs):
    for x, y in zip(ours, theirs, strict=True):  # only the order of sums differs
        np.testing.assert_allclose(x, y, rtol=0, atol=32 * EPS * max(1.0, np.abs(y).max()))


def placed(mesh, kv_heads="tensor"):
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))
    q, *kv = (INPUTS[n] for n in "qkv")
    q, kv = put(q, "data", None, "tensor"), [put(x, "data", None, kv_heads) for x in kv]
    return q, *kv, put(INPUTS["sinks"], "tensor"), put(INPUTS["q_segments"], "data")


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


def test_a_tpu_kernel_runs_on_the_shards_of_eight_devices():
    """Interpreted, races detected. Arrays are split inside, where the mesh's devices are TPUs."""
    shape, names, types = (4, 2), ("data", "tensor"), (EXPLICIT, EXPLICIT)
    specs = *[P("data", None, "tensor")] * 3, P("tensor"), P("data")
    run = lambda *args: loss(*map(jax.reshard, args, specs), implementation="pallas_tpu")

    mesh = jax.make_mesh(shape, names, axis_types=types)
    with jax.set_mesh(mesh), interpreted("tpu", shape, names, axis_types=types):
        assert_same(gradients(run, *(INPUTS[n] for n in NAMES)), expected())


def test_segments_sinks_and_one_key_head_may_be_whole_on_every_device():
    one_head = lambda q, k, v, *rest: loss(q, k[:, :, :1], v[:, :, :1], *rest, "xla")
    args = [INPUTS[n] for n in NAMES]
    alone = gradients(one_head, *args)
    with on_mesh() as mesh:
        assert_same(gradients(one_head, *placed(mesh, None)[:3], *args[3:]), alone)


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
    heads = "tensor" if "tensor" in manual else None
    specs = P("data", None, heads)

    def region(*args):
        return jax.lax.psum(loss(*args, implementation), manual)

    outer = jax.shard_map(
        region,
        in_specs=(specs, specs, specs, P(heads), P("data")),
        out_specs=P(),
        axis_names=set(manual),
        check_vma=check_vma,
    )
    with on_mesh() as mesh:
        assert_same(gradients(outer, *placed(mesh)), expected())


def test_a_tpu_kernel_inside_a_region_varies_like_its_inputs():
    """Were its output taken to be the same on all devices, its gradient would be summed twice."""
    shape, names, types = (2, 2), ("data", "tensor"), (EXPLICIT, EXPLICIT)
    segments = {f"{side}_segments": INPUTS["q_segments"] for side in ("q", "kv")}

    def total(implementation, q, k, v):
        def region(q, k, v, segments):
            kept = {"return_lse": True, "implementation": implementation}
            o, lse = flash_attention(q, k, v, **segments, **kept)
            weight = 1.0 + jax.lax.axis_index("data")
            lse = jnp.where(jnp.isinf(lse), 0.0, jnp.cos(lse))
            return jax.lax.psum(weight * (jnp.sum(jnp.sin(o)) + jnp.sum(lse)), "data")

        args = [jax.reshard(x, P("data", None, "tensor")) for x in (q, k, v)]
        both = jax.tree.map(lambda x: jax.reshard(x, P("data")), segments)
        outer = jax.shard_map(region, in_specs=P("data"), out_specs=P(), axis_names={"data"})
        return outer(*args, both)

    args = [INPUTS[n] for n in "qkv"]
    with on_mesh():
        alone = gradients(functools.partial(total, "xla"), *args, of=3)
    with on_mesh(), interpreted("tpu", shape, names, axis_types=types):
        assert_same(gradients(functools.partial(total, "pallas_tpu"), *args, of=3), alone)


@pytest.mark.parametrize("implementation", ["reference", "xla_loop"], indirect=True)
def test_keys_alike_on_all_devices_get_the_summed_gradient(implementation):
    """Within a region, queries are split over an axis along which keys are the same."""
    q, k, v = INPUTS["q"], INPUTS["k"][:1], INPUTS["v"][:1]

    def rows(q, k, v):
        every = (jnp.concatenate([x] * q.shape[0]) for x in (k, v))
        return loss(q, *every, None, None, implementation)

    alone = gradients(rows, q, k, v, of=3)
    region = lambda *args: jax.lax.psum(rows(*args), "data")
    outer = jax.shard_map(
        region, in_specs=(P("data"), P(), P()), out_specs=P(), axis_names={"data"}
    )
    with on_mesh() as mesh:
        q = jax.device_put(q, NamedSharding(mesh, P("data")))
        assert_same(gradients(outer, q, k, v, of=3), alone)


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
