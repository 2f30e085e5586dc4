"""Squared ReLU, y = relu(x W_up)^2 W_down (Primer, arXiv 2109.08668)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.layers import TwoLayer
from models.param import Dims

CASES = ({"bias": True},)


class FFN(TwoLayer):
    """width: F, 4 D when None."""

    def __init__(self, dims: Dims, *, rngs: nnx.Rngs, width: int | None = None, bias: bool = False):
        super().__init__(dims, rngs=rngs, width=width, bias=bias)

    def activate(self, h: Float[Array, "B L F"]) -> Float[Array, "B L F"]:
        return jnp.square(jax.nn.relu(h))
