"""Which implementation runs where, and the step into a shard."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch


def target(platform, kind, size=1):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    return use_abstract_mesh(
        AbstractMesh((size,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    )


@pytest.mark.parametrize("platform", ["gpu", "cuda"])
def test_the_target_is_the_mesh_and_not_the_machine(platform):
    with target(platform, "NVIDIA H200"):
        assert (dispatch.platform(), dispatch.device_kind()) == ("gpu", "NVIDIA H200")
    with target("tpu", "TPU v5p"):
        assert (dispatch.platform(), dispatch.device_kind()) == ("tpu", "TPU v5p")


def test_without_a_mesh_the_target_is_the_machine():
    assert (dispatch.platform(), dispatch.device_kind()) == ("cpu", jax.devices()[0].device_kind)


def test_choices_import_a_module_on_its_platform_only():
    """Two that do not exist: the one for another platform declines before that is noticed."""
    platforms = {"nowhere": "tpu", "missing": None}
    run = dispatch.choices("pallas_kernels", platforms, "spec")
    assert list(run) == ["nowhere", "missing"]
    with pytest.raises(NotImplementedError, match=r"nowhere is for a tpu, not a cpu\."):
        run["nowhere"]()
    with pytest.raises(ModuleNotFoundError, match="missing"):
        run["missing"]()
    with target("tpu", "TPU v5p"), pytest.raises(ModuleNotFoundError, match="nowhere"):
        run["nowhere"]()


def test_what_the_compiler_would_have_to_split_is_declined():
    run = dispatch.choices("pallas_kernels", {"nowhere": "tpu", "dispatch": None}, "spec")
    with target("tpu", "TPU v5p", 2), pytest.raises(NotImplementedError, match=r"axes \['x'\]"):
        run["nowhere"]()
    with target("tpu", "TPU v5p", 2):
        assert run["dispatch"](None) is None


def test_choices_are_the_modules_functions():
    here = dispatch.choices("pallas_kernels", {"dispatch": "cpu"}, "spec")
    assert here["dispatch"](None) is None


def declining(*_):
    raise NotImplementedError("odd sizes")


def broken(*_):
    raise TypeError("broken")


def test_none_takes_the_first_that_does_not_decline():
    choices = {"fast": declining, "plain": lambda x: x + 1, "other": broken}
    assert dispatch.pick(choices, None, 1) == 2


def test_named_implementations_fail_loudly():
    choices = {"fast": declining, "plain": lambda x: x + 1}
    assert dispatch.pick(choices, "plain", 1) == 2
    with pytest.raises(NotImplementedError, match="odd sizes"):
        dispatch.pick(choices, "fast", 1)
    with pytest.raises(ValueError, match=r"'fats'; there are: fast, plain\."):
        dispatch.pick(choices, "fats", 1)


def test_other_errors_are_not_a_refusal():
    with pytest.raises(TypeError, match="broken"):
        dispatch.pick({"fast": broken, "plain": abs}, None, 1)


def test_every_refusal_is_told():
    with pytest.raises(NotImplementedError, match=r"fast: odd sizes; slow: odd sizes"):
        dispatch.pick({"fast": declining, "slow": declining}, None, 1)


def mesh_of(*types, sizes=(2, 2)):
    return jax.make_mesh(sizes, ("data", "tensor"), axis_types=types)


def centred(x, scale):
    """What a shard of rows can do alone; the shape that it saw is recorded."""
    centred.shape = x.shape
    return (x - x.mean(1, keepdims=True)) * scale, x.sum(1)


@pytest.mark.parametrize(
    ("types", "shard"),
    [
        ((AxisType.Explicit, AxisType.Explicit), (4, 6)),
        ((AxisType.Explicit, AxisType.Auto), (4, 6)),
        ((AxisType.Auto, AxisType.Auto), (8, 6)),
    ],
)
def test_local_runs_on_shards_of_explicit_axes(types, shard):
    x = np.arange(48, dtype=np.float32).reshape(8, 6)
    run = dispatch.local(centred, follow=lambda x, scale: (x, P(x[0])), whole={0: {1: "width"}})
    expected = centred(x, 2.0)
    mesh = mesh_of(*types)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, P("data")))
        y, total = jax.jit(run)(split, jnp.float32(2.0))
        assert centred.shape == shard
        assert y.sharding.spec[0] == total.sharding.spec[0] == "data"
    np.testing.assert_allclose(y, expected[0], rtol=1e-6)  # a mean of 6, rounded once
    np.testing.assert_array_equal(total, expected[1])


def test_local_without_a_mesh_is_the_function():
    run = dispatch.local(centred, follow=(0, 0))
    np.testing.assert_array_equal(run(np.ones((2, 3)), 1.0)[0], np.zeros((2, 3)))


def test_outputs_follow_a_named_argument_and_none_passes():
    mesh = mesh_of(AxisType.Explicit, AxisType.Explicit)
    run = dispatch.local(lambda a, b, c: {"a": a, "b": b}, follow={"a": 0, "b": 1})
    with jax.set_mesh(mesh):
        a = jax.device_put(jnp.ones((4, 2)), NamedSharding(mesh, P("data")))
        b = jax.device_put(jnp.ones((2, 4)), NamedSharding(mesh, P(None, "tensor")))
        out = jax.jit(run)(a, b, None)
    assert out["a"].sharding.spec == P("data", None)
    assert out["b"].sharding.spec == P(None, "tensor")


def test_a_split_dimension_that_must_be_whole_is_an_error():
    run = dispatch.local(lambda x: x, follow=0, whole={0: {1: "length of x"}})
    mesh = mesh_of(AxisType.Explicit, AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((4, 6)), NamedSharding(mesh, P(None, "tensor")))
        with pytest.raises(ValueError, match=r"length of x, 6, is split 2 ways .*'tensor'"):
            jax.jit(run)(x)
    one = mesh_of(AxisType.Explicit, AxisType.Explicit, sizes=(1, 1))
    with jax.set_mesh(one):  # an axis of one device splits nothing
        x = jax.device_put(jnp.ones((4, 6)), NamedSharding(one, P("data", "tensor")))
        np.testing.assert_array_equal(jax.jit(run)(x), np.ones((4, 6)))


@jax.custom_vjp
def square(x, y):
    return dispatch.local(lambda x, y: x * x * y, follow=0)(x, y)


def square_bwd(kept, ct):
    grads = lambda x, y, ct: (2 * x * y * ct, x * x * ct)
    return dispatch.local(grads, follow=(0, 1))(*kept, ct)


square.defvjp(lambda x, y: (square(x, y), (x, y)), square_bwd)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("manual", [("data",), ("data", "tensor")])
def test_gradients_pass_through_an_enclosing_region(manual, check_vma):
    mesh = mesh_of(AxisType.Explicit, AxisType.Explicit)
    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    y = x[:2] + 1  # the same for both shards of rows

    def outer(x, y):
        inner = lambda x, y: jax.lax.psum(jnp.sum(square(*dispatch.vary(x, y))), manual)
        tensor = "tensor" if "tensor" in manual else None
        specs = (P("data", tensor), P(None, tensor))
        region = jax.shard_map(
            inner, in_specs=specs, out_specs=P(), axis_names=set(manual), check_vma=check_vma
        )
        return region(x, y)

    with jax.set_mesh(mesh):
        put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))
        args = put(x, "data", "tensor"), put(y, None, "tensor")
        dx, dy = jax.jit(jax.grad(outer, (0, 1)))(*args)
    np.testing.assert_array_equal(dx, 2 * x * np.concatenate([y, y]))
    np.testing.assert_array_equal(dy, x[:2] ** 2 + x[2:] ** 2)
