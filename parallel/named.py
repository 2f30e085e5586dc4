"""Names of activations, given where they are made and read back from the traced program."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from parallel.rules import partition


class Tag(str):
    """A checkpoint name that knows the logical axes of its array, one (or None) a dimension.

    It equals the plain string, so remat policies that save by name see nothing else.
    """

    axes: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Found:
    """A named value of a program.

    axes: what `named` was told; None for a bare checkpoint name, and where vmap added dimensions.
    aval: its type, with the sharding.  scans: lengths of the scans around it, outermost first.
    """

    name: str
    axes: tuple[str | None, ...] | None
    aval: Any
    scans: tuple[int, ...]


def named(x: jax.Array, name: str, *axes: str | None) -> jax.Array:
    """x itself, under a name that remat policies and `train --explain` see.

    axes: one logical name (or None) a dimension, those of training: a decoding step may hold a
    dimension whole. They lay nothing out; `--explain` compares them with what the program has.
    Use the result in place of x: a backward pass that reads both would keep both.

    Raises ValueError for an unknown axis, for two dimensions that would land on one mesh axis, and
    where axes and dimensions differ in number.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"{name!r} names {len(axes)} dimensions, {axes}, of an array of {x.ndim}")
    try:
        partition(*axes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    tag = Tag(name)
    tag.axes = axes
    return checkpoint_name(x, tag)


def find(jaxpr, scans: tuple[int, ...] = ()) -> Iterator[Found]:
    """Every named value of a jaxpr in its order, also inside loops, remat, calls and regions.

    What a backward pass computes anew comes again.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name":
            name, aval = eqn.params["name"], eqn.outvars[0].aval
            axes = getattr(name, "axes", None)
            known = axes is not None and len(axes) == aval.ndim
            yield Found(str(name), axes if known else None, aval, scans)
        inside = scans
        if eqn.primitive.name == "scan":
            inside = (*scans, eqn.params["length"])
        for value in eqn.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(part, core.ClosedJaxpr):
                    yield from find(part.jaxpr, inside)
                elif isinstance(part, core.Jaxpr):
                    yield from find(part, inside)
