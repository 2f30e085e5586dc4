"""Which mesh axes a named dimension is split over: the one table that decides every sharding."""

import math
from collections.abc import Callable, Iterable

import jax
from jax.sharding import AxisType, PartitionSpec

MESH_AXES = ("replica", "data", "fsdp", "stage", "context", "expert", "tensor")

Layout = tuple[tuple[str, ...], ...]  # mesh axes a dimension

# A weight's D goes to fsdp and an activation's D to nothing, so activations name None there.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "data", "fsdp", "expert"),
    "length": ("context",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "layers": (),
}


def explicit_axes() -> frozenset[str]:
    """Mesh axes that are part of array types at this point of the trace (none without a mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    )


def partition(*names: str | None, axes=frozenset(MESH_AXES)) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry these logical names.

    Raises:
      ValueError: an unknown name, a rule that names an unknown mesh axis, or two dimensions that
        would land on one mesh axis.
    """
    owner: dict[str, int] = {}
    entries = []
    for dim, name in enumerate(names):
        if name is not None and name not in RULES:
            raise ValueError(
                f"logical axis {name!r} of dimension {dim} is not in parallel/rules.py; "
                f"known: {', '.join(RULES)}"
            )
        mine = tuple(a for a in _rule(name) if a in axes)
        for axis in mine:
            if axis in owner:
                raise ValueError(
                    f"dimensions {owner[axis]} ({names[owner[axis]]!r}) and {dim} ({name!r}) "
                    f"would both be split over mesh axis {axis!r}; name one of them None"
                )
            owner[axis] = dim
        entries.append(mine)
    return of_layout(entries)


def layout_of(spec: PartitionSpec, ndim: int | None = None) -> Layout:
    """A spec with one tuple of mesh axes a dimension, empty ones added up to `ndim`."""
    read = lambda entry: entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    entries = tuple(map(read, spec))
    return entries + ((),) * (0 if ndim is None else ndim - len(entries))


def of_layout(layout: Iterable[tuple[str, ...]]) -> PartitionSpec:
    """`layout_of` undone, in the one spelling that JAX's own specs have."""
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in layout))


def ways(mesh, name: str | None) -> int:
    """Over how many devices of a mesh a dimension of this logical name is split."""
    return math.prod(mesh.shape[axis] for axis in _rule(name))


def _rule(name: str | None) -> tuple[str, ...]:
    """The mesh axes of a known name. A typing error here would leave its dimension whole."""
    rule = RULES[name] if name else ()
    if unknown := [axis for axis in rule if axis not in MESH_AXES]:
        raise ValueError(
            f"the rule of {name!r} in parallel/rules.py names mesh axis {unknown[0]!r}, which is "
            f"unknown; known: {', '.join(MESH_AXES)}"
        )
    return rule


def spec(*names: str | None) -> PartitionSpec | None:
    """`partition` over the axes that are Explicit here; None where there are none.

    This lets one model file run without a mesh, under Explicit axes, inside `auto_axes` and inside
    `shard_map`.
    """
    axes = explicit_axes()
    return partition(*names, axes=axes) if axes else None


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Reshard x to the layout these names mean; x itself without Explicit axes.

    Raises:
      ValueError: as `partition`, and names or sizes that do not fit the dimensions of x.
    """
    if len(names) != x.ndim:
        raise ValueError(
            f"{len(names)} names, {names}, were given for the {x.ndim} dimensions of {x.shape}; "
            f"name each one, or None"
        )
    target = spec(*names)
    if target is None:
        return x
    _check_fits(x.shape, names, target)
    return jax.reshard(x, target)


def _check_fits(shape, names, target: PartitionSpec) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    for dim, (size, name, axes) in enumerate(zip(shape, names, layout_of(target), strict=True)):
        if size % math.prod(mesh.shape[axis] for axis in axes):
            over = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            raise ValueError(
                f"dimension {dim} ({name!r}) of {shape} does not divide over {over}; change the "
                f"size or the mesh"
            )


def automatic(fn: Callable, *names: str | None) -> Callable:
    """fn with its shardings left to the compiler and its one output laid out by these names.

    For the odd operation whose layout JAX cannot tell from types alone.
    """
    out = spec(*names)
    return fn if out is None else jax.sharding.auto_axes(fn, out_sharding=out)


def layout(like: jax.ShapeDtypeStruct) -> PartitionSpec:
    """The PartitionSpec of an abstract array, which has no sharding where it is replicated."""
    return PartitionSpec() if like.sharding is None else like.sharding.spec
