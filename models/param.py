"""The only place where a weight is declared, and the table that everything else reads."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from parallel.rules import spec
from parallel.weight import Entry, Table, Weight


@dataclasses.dataclass(frozen=True)
class Dims:
    """What every layer needs to know of its model.

    d_model: D.  length: the longest sequence, L.  n_layers: all layers, prefix and suffix included.
    base_d_model: the width at which the recipe was tuned (muP, arXiv 2203.03466); D without one.
    init_std: standard deviation of matrices at the start; None means 1 / sqrt(fan-in).
    scale_residual: divide the start of matrices that write to the residual stream by sqrt(2 N)
      (GPT-2).
    """

    d_model: int
    length: int
    n_layers: int
    base_d_model: int
    init_std: float | None = None
    scale_residual: bool = True

    @property
    def wider(self) -> float:
        """How many times as wide as its base the model is."""
        return self.d_model / self.base_d_model

    def normal(
        self, fan_in: int, *, residual: bool = False, few: bool = False
    ) -> tuple[str, float]:
        """The start of a matrix whose fan-in is a width, here of this size.

        residual: it writes to the residual stream.  few: its fan-out is no width, and what it gives
        falls with the width at the start (table 3 of muP).
        """
        given = self.init_std
        std = 1 / math.sqrt(fan_in) if given is None else given / math.sqrt(self.wider)
        std = std / math.sqrt(self.wider) if few else std
        deep = residual and self.scale_residual
        return "normal", std / math.sqrt(2 * self.n_layers) if deep else std

    def head(self) -> tuple[str, float]:
        """The start of the matrix to logits, of which the head divides what it gives by `wider`."""
        return "normal", 1 / math.sqrt(
            self.base_d_model
        ) if self.init_std is None else self.init_std


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], **declared
) -> nnx.Param:
    """A float32 weight of this shape; `declared` are the other fields of `Weight`."""
    if len(shape) != len(axes):
        raise ValueError(f"shape {shape} has {len(shape)} dimensions and axes {axes} {len(axes)}")
    weight = Weight(axes=axes, **declared)
    return nnx.Param(start(rngs, Entry(weight, shape)), weight=weight)


def start(rngs: nnx.Rngs, entry: Entry) -> Array:
    """A weight before training, as it is declared."""
    shape, weight, layout = entry.shape, entry.weight, spec(*entry.axes)
    match weight.init:
        case ("zeros",):
            return jnp.zeros(shape, jnp.float32, out_sharding=layout)
        case ("ones",):
            return jnp.ones(shape, jnp.float32, out_sharding=layout)
        case ("constant", value):
            return jnp.full(shape, value, jnp.float32, out_sharding=layout)
        case ("identity",):  # of each matrix over the last two dimensions
            eye = jnp.broadcast_to(jnp.eye(*shape[-2:], dtype=jnp.float32), shape)
            return eye if layout is None else jax.reshard(eye, layout)
        case ("normal", std):
            return std * jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=layout)
    raise ValueError(
        f"init {weight.init} is unknown; known: ('normal', std), ('constant', value), "
        f"('identity',), ('zeros',), ('ones',)"
    )


def flatten(state) -> dict[str, Array]:
    """A module's state as {path: array}, e.g. 'blocks/0/mixer/q'."""
    return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def restore(state, params: Mapping):
    """`flatten` undone: this (abstract) state with its arrays replaced by those of params."""
    flat = [
        (path, leaf.replace(params["/".join(map(str, path))]))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.from_flat_state(flat)


def read(module: nnx.Module) -> nnx.Module:
    """The module with each weight an array, however it is made; for loops that would make it often.

    Without this a layer makes it anew each time it runs (training/adapter.py).
    """
    once = lambda leaf: leaf.replace(leaf[...])
    return jax.tree.map(once, module, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def table(state) -> Table:
    """The parameter table of an (abstract) state."""
    return {
        "/".join(map(str, path)): Entry(leaf.get_metadata("weight"), tuple(leaf.shape))
        for path, leaf in nnx.to_flat_state(state)
    }
