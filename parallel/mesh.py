"""The device mesh: always all axes, each of size 1 unless the config says otherwise."""

import math

import jax

from parallel.rules import MESH_AXES


def sizes(count: int, **wanted: int) -> dict[str, int]:
    """Axis sizes for `count` devices; at most one axis may be -1 and takes what is left.

    Raises:
      ValueError: an unknown axis, a size that is neither positive nor -1, or a product that does
        not match the devices.
    """
    unknown = set(wanted) - set(MESH_AXES)
    if unknown:
        raise ValueError(f"mesh axis {min(unknown)!r} is unknown; known: {', '.join(MESH_AXES)}")
    result = {axis: wanted.get(axis, 1) for axis in MESH_AXES}
    for axis, size in result.items():
        if size != -1 and size < 1:
            raise ValueError(f"mesh.{axis} is {size}; it must be positive, or -1 for the rest")
    open_axes = [axis for axis, size in result.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh axes {' and '.join(open_axes)} are both -1; leave only one open")
    fixed = math.prod(size for size in result.values() if size != -1)
    shape = " x ".join(f"{a}={s}" for a, s in result.items() if s != 1)
    if open_axes:
        if count % fixed:
            raise ValueError(
                f"{count} devices do not divide into the {fixed} of {shape}; "
                f"change mesh.{open_axes[0]} or the fixed axes"
            )
        result[open_axes[0]] = count // fixed
    elif fixed != count:
        raise ValueError(
            f"the mesh {shape or 'of size 1'} needs {fixed} devices and there are {count}; "
            f"set one axis to -1 to take the rest"
        )
    return result


def make(devices=None, **wanted: int) -> jax.sharding.Mesh:
    """A mesh with Explicit axes over all devices (or those given)."""
    devices = jax.devices() if devices is None else devices
    shape = sizes(len(devices), **wanted)
    return jax.make_mesh(tuple(shape.values()), tuple(shape), devices=devices)
