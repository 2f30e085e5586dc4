"""Which dimension of a parameter also takes `data`, and that no device needs another's to take it.

That training is unchanged, and what a device then holds, is tested in tests/training/zero_test.py.
"""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel import mesh as meshes
from parallel import zero
from parallel.weight import Entry, Weight

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


def _mesh(**sizes):
    shape = meshes.sizes(math.prod(sizes.values()), **sizes)
    return jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))


@st.composite
def _arrays(draw):
    """(mesh, spec, shape, layers) of an array that its spec divides."""
    mesh = _mesh(**{axis: draw(st.sampled_from([1, 2, 3, 4])) for axis in SIZES})
    ndim = draw(st.integers(0, 4))
    layers = draw(st.integers(0, min(1, ndim)))
    entries = [None] * ndim
    for axis in ("fsdp", "tensor"):
        at = draw(st.integers(layers, ndim))  # ndim stands for nowhere
        if at < ndim:
            entries[at] = axis if entries[at] is None else (entries[at], axis)
    ways = [math.prod(mesh.shape[a] for a in _names(e)) for e in entries]
    shape = tuple(n * draw(st.integers(1, 12)) for n in ways)
    cut = draw(st.integers(0, ndim))
    spec = P(*entries) if any(entries[cut:]) else P(*entries[:cut])
    return mesh, spec, shape, layers


def _names(entry):
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


@given(_arrays())
def test_the_largest_dimension_that_divides(drawn):
    """Against all dimensions, tried one by one with JAX's own arithmetic of shards."""
    mesh, spec, shape, layers = drawn
    held = NamedSharding(mesh, spec).shard_shape(shape)
    N = mesh.shape["data"]
    able = [i for i in range(len(shape)) if held[i] % N == 0]
    dim = zero.dimension(spec, shape, mesh, layers)
    assert dim == zero.dimension(spec, shape, mesh, layers)
    if not able:
        assert dim is None
        return
    inner = [i for i in able if i >= layers] or able
    assert dim == min(inner, key=lambda i: (-held[i], i))
    wider = zero.beside(spec, dim)
    expected = [size // N if i == dim else size for i, size in enumerate(held)]
    assert NamedSharding(mesh, wider).shard_shape(shape) == tuple(expected)
    before = [_names(e) for e in spec] + [()] * (len(shape) - len(spec))
    after = [_names(e) for e in wider] + [()] * (len(shape) - len(wider))
    assert after == [(*e, "data") if i == dim else e for i, e in enumerate(before)]


def test_a_layout_that_is_split_over_data_already_is_refused():
    with pytest.raises(ValueError, match="split over 'data' already"):
        zero.beside(P(None, ("fsdp", "data")), 0)


TABLE = {
    "inside": Entry(Weight(("embed", None, "heads", None)), (3, 8, 2, 4, 5)),
    "shared": Entry(Weight(("embed", "ffn")), (8, 8)),
    "layers": Entry(Weight((None, None)), (4, 3, 5)),
    "vector": Entry(Weight((None,)), (3, 8)),
    "odd": Entry(Weight((None, "ffn")), (3, 3, 6)),
}
HELD = {
    "inside": P(None, ("fsdp", "data"), None, "tensor", None),
    "shared": P(("fsdp", "data"), "tensor"),
    "layers": P("data", None, None),
    "vector": P(None, "data"),
    "odd": P(None, None, "tensor"),
}


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_every_device_takes_a_part_of_what_it_holds(stage):
    mesh = meshes.make(**SIZES)
    place = zero.make(stage, TABLE, mesh)
    with jax.set_mesh(mesh):
        draw = lambda e: np.random.default_rng(0).normal(size=e.shape).astype(np.float32)
        values = {path: draw(entry) for path, entry in TABLE.items()}
        specs = {path: place.leaves[path].spec for path in TABLE}
        tree = {path: jax.device_put(x, specs[path]) for path, x in values.items()}
        held = jax.jit(place.split)(tree)
        back = jax.jit(place.whole)(held)
    for path, value in values.items():
        assert held[path].sharding.is_equivalent_to(NamedSharding(mesh, HELD[path]), value.ndim)
        assert back[path].sharding == NamedSharding(mesh, specs[path])
        owned = tree[path].sharding.devices_indices_map(value.shape)
        for shard in held[path].addressable_shards:
            np.testing.assert_array_equal(shard.data, value[shard.index])
            assert all(map(_within, shard.index, owned[shard.device], value.shape)), path
        np.testing.assert_array_equal(back[path], value)


def _within(part, whole, size):
    (a, b, _), (c, d, _) = part.indices(size), whole.indices(size)
    return c <= a and b <= d


def test_what_cannot_be_split_is_told():
    """3 x 3 x 6 floats over tensor=2 are 108 bytes on every device."""
    place = zero.make("zero2", TABLE, _mesh(**SIZES))
    assert place.undivided() == {"odd": 108}
    assert zero.make("zero1", TABLE, _mesh(data=7)).undivided().keys() == TABLE.keys()


def test_one_device_along_data_or_no_stage_splits_nothing():
    for place in (
        zero.make("none", TABLE, _mesh(data=4)),
        zero.make("zero2", TABLE, _mesh(data=1, fsdp=4)),
    ):
        assert place is zero.REPLICATED
        tree = {path: np.ones(3) for path in TABLE}
        assert place.split(tree) is tree
        assert place.whole(tree) is tree
        assert place.undivided() == {}


def test_another_stage_is_a_sentence():
    with pytest.raises(ValueError, match="zero is 'zero4'; it must be one of none, zero1, zero2"):
        zero.make("zero4", TABLE, _mesh(data=2))
