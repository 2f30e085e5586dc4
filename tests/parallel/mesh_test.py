"""Axis sizes from a config, and the sentences for those that do not fit."""

import jax
import pytest
from jax.sharding import AxisType

from parallel import mesh
from parallel.rules import MESH_AXES


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [
        (1, {}, {}),
        (8, {"data": -1}, {"data": 8}),
        (8, {"data": -1, "tensor": 2, "fsdp": 2}, {"data": 2, "tensor": 2, "fsdp": 2}),
        (8, {"data": 8, "fsdp": -1}, {"data": 8}),
        (12, {"context": 3, "stage": 2, "expert": 2}, {"context": 3, "stage": 2, "expert": 2}),
    ],
)
def test_sizes(count, wanted, expected):
    sizes = mesh.sizes(count, **wanted)
    assert tuple(sizes) == MESH_AXES
    assert sizes == dict.fromkeys(MESH_AXES, 1) | expected


@pytest.mark.parametrize(
    ("count", "wanted", "words"),
    [
        (8, {"model": 2}, ["'model' is unknown", "tensor"]),
        (8, {"data": 0}, ["mesh.data is 0", "-1 for the rest"]),
        (8, {"fsdp": -2}, ["mesh.fsdp is -2"]),
        (8, {"data": -1, "fsdp": -1}, ["data and fsdp are both -1"]),
        (8, {"data": -1, "tensor": 3}, ["8 devices", "the 3 of", "tensor=3", "mesh.data"]),
        (8, {"data": 2, "fsdp": 2}, ["data=2 x fsdp=2", "needs 4 devices", "there are 8", "-1"]),
        (2, {"tensor": 4}, ["needs 4 devices", "there are 2"]),
        (8, {}, ["needs 1 devices", "there are 8"]),
    ],
)
def test_sizes_that_do_not_fit_are_sentences(count, wanted, words):
    with pytest.raises(ValueError, match="mesh") as error:
        mesh.sizes(count, **wanted)
    assert all(word in str(error.value) for word in words)


def test_a_mesh_has_all_axes_and_they_are_explicit():
    made = mesh.make(data=-1, tensor=2)
    assert made.axis_names == MESH_AXES
    assert made.axis_types == (AxisType.Explicit,) * len(MESH_AXES)
    assert dict(made.shape) == dict.fromkeys(MESH_AXES, 1) | {"data": 4, "tensor": 2}
    assert mesh.make(jax.devices()[:1]).size == 1
