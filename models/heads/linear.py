"""Logits by one matrix: the embedding's own when tied (arXiv 1608.05859), else one of its own."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.param import Dims, param


class Head(nnx.Module):
    def __init__(self, dims: Dims, vocab: int, *, rngs: nnx.Rngs, tied: bool):
        D = dims.d_model
        fans = dict(fan_in=(0,), fan_out=(1,), init=dims.head(), group="head")
        self.wider = dims.wider
        self.kernel = None if tied else param(rngs, (D, vocab), ("embed", "vocab"), **fans)

    def __call__(
        self, x: Float[Array, "... D"], embedding: Float[Array, "W D"]
    ) -> Float[Array, "... W"]:
        kernel = embedding.T if self.kernel is None else self.kernel[...]
        x = x if self.wider == 1 else x / self.wider
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
