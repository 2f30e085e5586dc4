"""A vocabulary divided over devices: looking up rows of a table, and the ids that a shard holds.

Megatron-LM (arXiv 1909.08053, section 3): every device looks up the ids of its own part, takes
zeros for the others, and the parts are summed. Logits stay divided: their maximum, the sum of
exponentials and the target's logit are reductions over the vocabulary, so only `[B L]` moves.

The look-up is one region over all Explicit axes inside the two rules of a `custom_vjp`. Nothing
differentiates through the region, so it may stand inside another one, checked or not.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from parallel.rules import explicit_axes, layout_of


def look_up(table: jax.Array, ids: jax.Array, out: P | None) -> jax.Array:
    """Rows of `table` `[W D]` at `ids` `[...]`: `[... D]`, laid out as `out` says.

    Exact, being a sum of one row and zeros. The gradient is summed where the rows lie, in float32,
    so a device never holds more of the table, or of its gradient, than its own W/n rows. A table
    whose W is in one piece is looked up as it is. ids: 0 .. W - 1; others give zeros where W is
    divided.

    Raises ValueError where D is divided, or ids over the axes of W.
    """
    rows, width = jax.typeof(table).sharding.spec if explicit_axes() else (None, None)
    if _size(rows) == 1:
        return _whole(table, out)(*_vary(table, ids))
    if width is not None:
        raise ValueError(
            f"Dimension 1 of the table {table.shape} is divided over {width!r}; gather it before "
            f"rows are looked up."
        )
    places = P(*out[:-1])
    return _divided(table.shape[0], rows, places)(*_vary(table, jax.reshard(ids, places)))


def numbers(logits: jax.Array) -> jax.Array:
    """The ids 0 .. W - 1 of `logits` `[... W]`, int32 `[1 ... W]`, divided over devices like W."""
    shape = (1,) * (logits.ndim - 1) + logits.shape[-1:]
    out = None
    if explicit_axes():
        out = P(*[None] * (logits.ndim - 1), jax.typeof(logits).sharding.spec[-1])
    return jax.lax.broadcasted_iota(jnp.int32, shape, logits.ndim - 1, out_sharding=out)


def _whole(table, out: P | None):
    """(table, ids) -> rows, of a table in one piece."""
    get = lambda table, ids: table.at[ids].get(out_sharding=out)
    if table.dtype == jnp.float32:
        return get
    kind = jax.typeof(table)

    def gradient(ids, dy):
        # A sum of thousands of rows in bfloat16 stops growing at 256 times their size.
        zeros = jnp.zeros(kind.shape, jnp.float32, out_sharding=kind.sharding)
        _, pull = jax.vjp(lambda table: get(table, ids), _vary(zeros, ids, dy)[0])
        return pull(dy.astype(jnp.float32))[0].astype(dy.dtype), None

    run = jax.custom_vjp(get)
    run.defvjp(lambda table, ids: (get(table, ids), ids), gradient)
    return run


def _divided(W: int, axes, places: P):
    """(table, ids) -> rows, of a table whose W lies over `axes`, for ids that lie at `places`."""
    batch = tuple(name for names in layout_of(places) for name in names)
    if both := set(layout_of(P(axes))[0]) & set(batch):
        raise ValueError(
            f"Rows of a table and the ids to look up are both divided over {sorted(both)}."
        )
    size = W // _size(axes)

    def local(ids):
        """Ids counted from the first row here; one too large where the row is elsewhere."""
        ids = ids - jax.lax.axis_index(axes) * size
        return jnp.where((ids >= 0) & (ids < size), ids, size)

    def rows(table, ids):
        return jax.lax.psum(table.at[local(ids)].get(mode="fill", fill_value=0), axes)

    def gradient(ids, dy):
        zeros = jnp.zeros((size, dy.shape[-1]), jnp.float32)
        total = zeros.at[local(ids)].add(dy.astype(jnp.float32), mode="drop")
        # Axes of one device need no reduction, but where types are checked they must see one.
        over = batch if _varying([ids]) else [name for name in batch if _size(name) > 1]
        return jax.lax.psum(total, tuple(over)).astype(dy.dtype)

    table, out = P(axes, None), P(*places, None)
    forward = _region(rows, (table, places), out)
    backward = _region(gradient, (places, out), table)
    run = jax.custom_vjp(forward)
    run.defvjp(
        lambda table, ids: (forward(table, ids), ids), lambda ids, dy: (backward(ids, dy), None)
    )
    return run


def _region(fn, in_specs, out_specs):
    """fn on shards; a region inside one that checks varying axes must check them too."""

    def call(*args):
        axes = jax.sharding.get_abstract_mesh().explicit_axes
        return jax.shard_map(
            fn,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(axes),
            check_vma=bool(_varying(args)),
        )(*args)

    return call


def _vary(*args):
    """Marks what differs over manual axes in one argument as differing in all.

    A gradient of what is the same on all devices is then summed by JAX, outside the rules.
    """
    axes = _varying(args)
    missing = lambda x: tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    mark = lambda x: jax.lax.pcast(x, missing(x), to="varying") if missing(x) else x
    return [mark(x) for x in args]


def _varying(args) -> frozenset:
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in args))


def _size(entry) -> int:
    """Over how many devices a dimension with this entry in its spec is divided."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in layout_of(P(entry))[0])
