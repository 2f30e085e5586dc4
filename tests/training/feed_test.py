"""What each device gets is its part of the global batch, from any row on."""

import threading

import jax
import numpy as np
import pytest

from data.batch import Batch
from tests import tiny
from training.feed import feed


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("data")]


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"replica": 2, "context": 4},
        {"replica": 2, "data": 2, "context": 2},
    ],
)
@pytest.mark.parametrize("position", [0, 2**33 + 5])
def test_pieces_make_up_the_global_batch(root, mesh, position):
    sizes = {f"mesh__{axis}": size for axis, size in ({"data": 1} | mesh).items()}
    built = tiny.setup(root, 8, data__batch_size=16, data__micro_batches=2, **sizes)
    with feed(built.data, built.program.batch, position) as batches:
        for step in range(2):
            actual, expected = next(batches), built.data.batch(position + 16 * step)
            for name, a, e, like in zip(
                Batch._fields, actual, expected, built.program.batch, strict=True
            ):
                np.testing.assert_array_equal(a, e, name)
                assert a.sharding == like.sharding
                assert (a.shape, a.dtype) == (like.shape, like.dtype)
                for shard in a.addressable_shards:
                    np.testing.assert_array_equal(shard.data, e[shard.index], name)


@pytest.mark.parametrize("broken", [False, True])
def test_threads_end_with_the_block(root, broken):
    built = tiny.setup(root, data__prefetch=2)
    before = threads()
    try:
        with feed(built.data, built.program.batch, 7) as batches:
            next(batches)
            assert len(threads()) == len(before) + 1
            if broken:
                raise RuntimeError
    except RuntimeError:
        pass
    assert threads() == before


def test_a_host_builds_only_the_rows_of_its_devices(root, monkeypatch):
    """As if the other half of the mesh were another host's."""
    built = tiny.setup(root, 4, data__batch_size=8, mesh__data=4)
    sharding = built.program.batch.inputs.sharding
    everyone = sharding.addressable_devices_indices_map((1, 8, 32))
    mine = dict(list(everyone.items())[2:])
    rows, build = [], built.data.iterate
    monkeypatch.setattr(
        built.data, "iterate", lambda at, indices: rows.append(indices) or build(at, indices)
    )
    kind = type(sharding)
    monkeypatch.setattr(kind, "addressable_devices_indices_map", lambda self, shape: mine)
    with feed(built.data, built.program.batch, 0), jax.set_mesh(built.mesh):
        pass
    assert rows == [list(mine.values())]
    assert [index[1] for index in rows[0]] == [slice(4, 6), slice(6, 8)]
