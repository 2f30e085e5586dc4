"""Copies of one part of an array on several devices, with disagreement planted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel import mesh as meshes
from parallel.replicas import differences

MESH = dict(data=4, tensor=2)  # device 2 i + j holds row i and column j of the mesh


def _array(value, spec, changes=()):
    """An array laid out by `spec` of which some devices hold another value: {device: change}."""
    sharding = NamedSharding(meshes.make(**MESH), spec)
    shards = []
    for device, index in sharding.addressable_devices_indices_map(value.shape).items():
        part = np.array(value[index])
        change = dict(changes).get(device.id)
        shards.append(jax.device_put(part if change is None else change(part), device))
    return jax.make_array_from_single_device_arrays(value.shape, sharding, shards)


def _set(at, to):
    def change(part):
        part[at] = to
        return part

    return change


VALUE = np.arange(32, dtype=np.float32).reshape(8, 4)


@pytest.mark.parametrize("spec", [P(), P("tensor"), P("data", "tensor"), P(None, ("data",))])
def test_what_agrees_is_not_named(spec):
    assert differences({"a": _array(VALUE, spec), "b": [np.ones(3), 2.0, None]}) == []


def test_a_copy_that_differs_is_named():
    wrong = _array(VALUE, P(), {5: _set((slice(2), 1), -1.0)})
    found = differences({"params": {"tokens": wrong, "other": _array(VALUE, P())}})
    assert [(d.path, d.devices, d.count, d.size) for d in found] == [
        ("params/tokens", (0, 5), 2, 32)
    ]
    assert str(found[0]) == (
        "params/tokens[0:, 0:] differs in 2 of 32 elements between devices 0 and 5"
    )


def test_only_copies_of_the_same_part_are_compared():
    """Over tensor only: devices 1, 3, 5 and 7 hold the second half of the rows."""
    wrong = _array(VALUE, P("tensor"), {7: _set((0, 0), 9.5), 3: _set((1, 1), 9.5)})
    found = differences([wrong])
    assert [(d.devices, d.count, d.size) for d in found] == [((1, 3), 1, 16), ((1, 7), 1, 16)]
    assert str(found[0]).startswith("0[4:8, 0:] differs in 1 of 16")
    # Nobody else holds what these devices hold.
    alone = {i: _set((0, 0), float(i)) for i in range(8)}
    assert differences(_array(VALUE, P("data", "tensor"), alone)) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bits_are_compared_and_not_values(dtype):
    nothing = np.zeros(8, jnp.dtype(dtype))
    nan = np.full(8, np.nan, jnp.dtype(dtype))
    assert differences(_array(nan, P())) == []
    assert [d.count for d in differences(_array(nan, P(), {1: _set(3, 0.0)}))] == [1]
    assert [d.count for d in differences(_array(nothing, P(), {1: _set(3, -0.0)}))] == [1]
    quiet, other = nan[:1].copy(), nan[:1].copy()
    other.view(np.uint8)[0] ^= 1
    assert np.isnan(other.astype(np.float32)).all()
    assert [d.count for d in differences(_array(quiet, P(), {2: lambda part: other}))] == [1]


def test_every_kind_of_leaf():
    with jax.set_mesh(meshes.make(**MESH)):
        key = jax.device_put(jax.random.key(0), P())
    flags = _array(np.zeros(4, bool), P(), {6: _set(0, True)})
    tree = {
        "count": _array(np.int32(3), P(), {4: lambda part: np.int32(4)}),
        "empty": _array(np.zeros((0, 4), np.float32), P()),
        "flags": flags,
        "key": key,
    }
    assert [str(d) for d in differences(tree)] == [
        "count[] differs in 1 of 1 elements between devices 0 and 4",
        "flags[0:] differs in 1 of 4 elements between devices 0 and 6",
    ]


def test_a_step_that_drifts_apart_is_seen():
    """What raises nowhere: a shard_map that calls replicated what its devices made their own."""
    own = lambda x: x + jax.lax.axis_index("tensor")
    with jax.set_mesh(meshes.make(**MESH)):
        x = jax.device_put(VALUE, P("data"))
        run = jax.shard_map(own, in_specs=P("data"), out_specs=P("data"), check_vma=False)
        found = differences(jax.jit(run)(x))
    assert [d.devices for d in found] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert {d.count for d in found} == {8}
