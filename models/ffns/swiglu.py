"""SwiGLU, y = (silu(x W_gate) * (x W_up)) W_down (GLU Variants, arXiv 2002.05202)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.context import Context
from models.layers import add_bias
from models.param import Dims, param
from parallel.named import named

CASES = ({"bias": True},)


class FFN(nnx.Module):
    """width: F; None is 8/3 D rounded up to a multiple of 64, about a 4 D layer's parameters."""

    def __init__(self, dims: Dims, *, rngs: nnx.Rngs, width: int | None = None, bias: bool = False):
        D, F = dims.d_model, width or -(-8 * dims.d_model // (3 * 64)) * 64
        up = dict(fan_in=(0,), fan_out=(2,), stack=(1,), init=dims.normal(D))
        self.up = param(rngs, (D, 2, F), ("embed", None, "ffn"), **up)
        down = dict(fan_in=(0,), fan_out=(1,), init=dims.normal(F, residual=True))
        self.down = param(rngs, (F, D), ("ffn", "embed"), **down)
        vector = dict(decay=False, group="bias")
        self.up_bias = param(rngs, (2, F), (None, "ffn"), **vector) if bias else None
        self.down_bias = param(rngs, (D,), (None,), **vector) if bias else None

    def __call__(
        self, x: Float[Array, "B L D"], ctx: Context
    ) -> tuple[Float[Array, "B L D"], dict]:
        h = add_bias(jnp.einsum("bld,dsf->blsf", x, self.up[...].astype(x.dtype)), self.up_bias)
        h = jax.nn.silu(h[:, :, 0]) * h[:, :, 1]
        h = named(h, "ffn_hidden", "batch", "length", "ffn")
        down = self.down[...].astype(x.dtype)
        y = jnp.einsum("blf,fd->bld", h, down, out_sharding=ctx.stream)
        return add_bias(y, self.down_bias), {}
