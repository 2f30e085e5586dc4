"""Entering manual (per-shard) code from anywhere: no region yet, inside one, or half inside one.

Collective helpers are written per shard against axis names and call `manual`; whoever composes
them need not know which of them already opened a region.

What jax 0.11.2 does, and what this file therefore does (each case has a test):

- A region inside another one that checks varying axes runs forward, but its gradient is lost: the
  residuals are laid out over the enclosing axes again ("already bound by a parent"). Inside an
  unchecked one (`check=False`) values and gradients are right, in scans and under every remat
  policy. So whoever opens a region that others nest in opens it unchecked; a region to be nested
  in a checked one raises. One flat region over all axes is always right, and `manual` then calls
  the function as it is.
- XLA aborts the process (no exception) where a nested region's axis comes before an enclosing
  one's in the mesh, unless every axis is manual then. This raises instead, at size 1 too.
- `psum_scatter`, and so the gradient of `all_gather`, do not lower while other axes of the mesh
  are Explicit. The two functions here go through the remaining axes as well; being linear, they
  save nothing, so they may be used in checked regions too. (In unchecked ones their gradients
  also average over the remaining axes, which costs a reduction.)

In an unchecked region a gradient taken inside, with respect to a value that all shards share, is
each shard's own part; in a checked one it is summed over the shards already.
"""

import functools
import math

import jax
from jax.sharding import PartitionSpec as P

from parallel.rules import layout_of


def manual(fn, axes, in_specs, out_specs, *, check=True):
    """`fn` over the shards of `axes`, entering only the axes that are not manual already.

    fn: written per shard; may use collectives over `axes`. Differentiated arrays are arguments.
    axes: a mesh axis name or several. Those not manual yet must come after the manual ones in
      the mesh (replica, data, fsdp, stage, context, expert, tensor).
    in_specs, out_specs: PartitionSpecs that name axes of `axes` only, pytree prefixes of the
      arguments and of the result, as for `jax.shard_map`. Where an axis is manual already, the
      caller holds shards of it and passes them; that axis is dropped from the specs. Operands are
      resharded to `in_specs` first and keep their other axes, which become the minor ones of a
      shared dimension.
    check: varying-axis checks (`check_vma`); a region inside an unchecked one is unchecked too.

    Raises ValueError without a mesh, for an unknown axis, for a spec that names an axis outside
    `axes`, for sizes that do not divide, and where the enclosing region is checked or holds a
    later axis of the mesh.
    """
    wanted = (axes,) if isinstance(axes, str) else tuple(axes)
    _check_specs(wanted, (in_specs, out_specs))

    @functools.wraps(fn)
    def call(*args):
        mesh = _mesh(wanted)
        new = tuple(a for a in wanted if a not in mesh.manual_axes)
        if not new:
            return fn(*args)
        nested = bool(mesh.manual_axes)
        if nested:
            _check_nesting(mesh, new)
        ins, outs = (jax.tree.map(lambda s: _keep(s, new), t) for t in (in_specs, out_specs))
        args = jax.tree.map(
            functools.partial(_place, mesh, new), args, jax.tree.broadcast(ins, args)
        )
        return jax.shard_map(
            fn,
            in_specs=ins,
            out_specs=outs,
            axis_names=set(new),
            check_vma=check and not nested,
        )(*args)

    return call


def all_gather(x, axis, dim):
    """The shards of manual `axis`, concatenated along dimension `dim`, on every shard of it.

    Raises ValueError if `dim` is also divided over an Explicit axis: the order would be lost.
    """
    op = functools.partial(jax.lax.all_gather, axis_name=axis, axis=dim, tiled=True)
    return _over_the_rest(op, x, axis, dim)


def psum_scatter(x, axis, dim):
    """The sum over manual `axis`, of which every shard keeps its own part of dimension `dim`.

    Raises ValueError if `dim` is also divided over an Explicit axis or not divisible.
    """
    size = jax.lax.axis_size(axis)
    if x.shape[dim] % size:
        raise ValueError(f"Dimension {dim} of {x.shape} does not divide by {axis}={size}.")
    op = functools.partial(jax.lax.psum_scatter, axis_name=axis, scatter_dimension=dim, tiled=True)
    return _over_the_rest(op, x, axis, dim)


def _over_the_rest(op, x, axis, dim):
    """Applies a collective that is elementwise in the remaining axes with these manual too."""
    mesh = _mesh((axis,))
    if axis not in mesh.manual_axes:
        raise ValueError(
            f"Axis {axis!r} is not manual here: call this inside manual(fn, {axis!r})."
        )
    if not mesh.explicit_axes:
        return op(x)
    spec = jax.typeof(x).sharding.spec
    spec = P(*layout_of(spec, x.ndim))
    if spec[dim]:
        raise ValueError(
            f"Dimension {dim} of {x.shape} is divided over {spec[dim]} besides {axis!r}."
        )
    return jax.shard_map(
        op,
        in_specs=spec,
        out_specs=spec,
        axis_names=set(mesh.explicit_axes),
        check_vma=_checked(mesh),
    )(x)


def _mesh(wanted):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(
            f"There is no mesh to be manual over {wanted} in: call jax.set_mesh(...) first; "
            f"axes of size 1 are enough."
        )
    unknown = [a for a in wanted if a not in mesh.axis_names]
    if unknown:
        raise ValueError(f"The mesh has no axis {unknown}; it has {mesh.axis_names}.")
    return mesh


def _check_nesting(mesh, new):
    outer = mesh.manual_axes
    if _checked(mesh):
        raise ValueError(
            f"A region over {new} inside a checked one over {outer} would lose its gradient. Open "
            f"the outer region with check=False, or one flat region over all these axes."
        )
    order = mesh.axis_names.index
    everything = len(outer) + len(new) == len(mesh.axis_names)
    if min(map(order, new)) < max(map(order, outer)) and not everything:
        raise ValueError(
            f"A region over {new} inside one over {outer} is not possible: XLA wants the outer "
            f"axes first in the mesh {mesh.axis_names}. Open one flat region over all of them, or "
            f"swap the two."
        )


def _checked(mesh):
    """Whether the enclosing region tracks varying axes: an unchecked one types nothing so."""
    axis = mesh.manual_axes[0]
    return axis in jax.typeof(jax.lax.axis_index(axis)).mat.varying


def _keep(spec, axes):
    return P(*(tuple(a for a in names if a in axes) for names in layout_of(spec)))


def _check_specs(wanted, specs):
    for spec in jax.tree.leaves(specs):
        if not isinstance(spec, P):
            raise TypeError(f"A spec must be a PartitionSpec, not {spec!r}.")
        outside = [a for names in layout_of(spec) for a in names if a not in wanted]
        if outside:
            raise ValueError(f"{spec} names {outside}, which is not among the axes {wanted}.")


def _place(mesh, new, x, spec):
    """Reshards x so that the new manual axes lie as `spec` says; its other axes stay."""
    kind = jax.typeof(x)
    if len(spec) > kind.ndim:
        raise ValueError(f"{spec} has more entries than {kind.str_short()} has dimensions.")
    wanted = layout_of(spec, kind.ndim)
    for i, names in enumerate(wanted):
        parts = math.prod(mesh.shape[a] for a in names)
        if kind.shape[i] % parts:
            raise ValueError(
                f"Dimension {i} of {kind.str_short()} does not divide by "
                f"{' x '.join(f'{a}={mesh.shape[a]}' for a in names)}."
            )
    present = layout_of(kind.sharding.spec, kind.ndim)
    target = tuple(
        tuple(a for a in w if a in mesh.explicit_axes) + tuple(a for a in p if a not in new)
        for w, p in zip(wanted, present, strict=True)
    )
    if target == present:
        return x
    return jax.reshard(x, kind.sharding.spec.update(partitions=target))
