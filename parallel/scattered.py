"""Reduce-scattering a gradient where it arises: a value that is whole, a gradient that is in parts.

Per shard, in a region over `data` (parallel/manual.py) whose other mesh axes may be Explicit. Every
device keeps 1 / N of what it holds of a dimension. A gradient in JAX has the type of what it is a
gradient of, so a second argument of a part's shape stands beside the value and receives it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


def scatter(x: jax.Array, dim: int) -> jax.Array:
    """The sum over `data`, of which every device keeps a part of what it holds of dimension `dim`.

    Not `manual.psum_scatter`, which refuses a dimension that is divided over other axes too: here
    `land` puts the parts in order.
    """
    spec = jax.typeof(x).sharding.spec
    op = functools.partial(
        jax.lax.psum_scatter, axis_name="data", scatter_dimension=dim, tiled=True
    )
    rest = set(jax.sharding.get_abstract_mesh().explicit_axes)
    return jax.shard_map(op, in_specs=spec, out_specs=spec, axis_names=rest, check_vma=False)(x)


def total(tree, axes: tuple[str, ...]):
    """The sum over these axes. One of size 1 is left out: not every compiler drops it."""
    axes = tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)
    return jax.lax.psum(tree, axes) if axes else tree


def land(x: jax.Array, spec: P, held: P) -> jax.Array:
    """Parts that left their region along a new first dimension, as one array laid out by `held`.

    spec: of the array without `data`; held: with it, after the other axes of its dimension. Said
    from inside the region it would come before them, and devices would exchange what they hold;
    so nothing moves.
    """
    return jax.shard_map(lambda x: x[0], in_specs=P("data", *spec), out_specs=held)(x)


def part(x: jax.Array, dim: int) -> jax.Array:
    """Zeros like what `scatter` gives for a gradient like x."""
    shape = [size // jax.lax.axis_size("data") ** (i == dim) for i, size in enumerate(x.shape)]
    return jnp.zeros(shape, x.dtype, out_sharding=jax.typeof(x).sharding.spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scattered(dim, value, part):
    """`value`, whose gradient is summed over `data` and goes to `part`, a 1 / N of dimension `dim`.

    `part` is there for its gradient's sake; its own value means nothing.
    """
    return value


scattered.defvjp(
    lambda dim, value, part: (value, None),
    lambda dim, _, gradient: (None, scatter(gradient, dim % gradient.ndim)),
)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("value", "part"), meta_fields=("dim",)
)
@dataclasses.dataclass(frozen=True)
class Stacked:
    """Weights of all layers, or of one within a loop over layers; an array once read, `x[...]`.

    As they are read inside the loop, each layer's gradient is scattered there, and the stack of
    gradients that the loop leaves behind is one of parts. dim: counted from the end.
    """

    value: jax.Array
    part: jax.Array
    dim: int

    def __getitem__(self, at):
        x = scattered(self.dim, self.value, self.part)
        return x if at is ... else x[at]
