"""BERT's masked-LM head, logits = norm(gelu(x W + b)) E^T + c (arXiv 1810.04805, section 3.1)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.layers import Norm, add_bias, like
from models.param import Dims, param


class Head(nnx.Module):
    """eps: of the LayerNorm."""

    def __init__(self, dims: Dims, vocab: int, *, rngs: nnx.Rngs, tied: bool, eps: float = 1e-12):
        D = dims.d_model
        fans, self.wider = dict(fan_in=(0,), fan_out=(1,)), dims.wider
        self.dense = param(rngs, (D, D), ("embed", None), init=dims.normal(D), **fans)
        self.dense_bias = param(rngs, (D,), (None,), decay=False, group="bias")
        self.norm = Norm(D, rngs=rngs, kind="layernorm", eps=eps)
        words = dict(init=dims.head(), group="head", **fans)
        self.kernel = None if tied else param(rngs, (D, vocab), ("embed", "vocab"), **words)
        self.bias = param(rngs, (vocab,), ("vocab",), decay=False, group="bias")

    def __call__(
        self, x: Float[Array, "... D"], embedding: Float[Array, "W D"]
    ) -> Float[Array, "... W"]:
        h = add_bias(jnp.matmul(x, self.dense[...].astype(x.dtype)), self.dense_bias)
        h = self.norm(jax.nn.gelu(h, approximate=False))
        kernel = embedding.T if self.kernel is None else self.kernel[...]
        h = h if self.wider == 1 else h / self.wider
        logits = jnp.matmul(h, kernel.astype(h.dtype), preferred_element_type=jnp.float32)
        return logits + like(self.bias[...], logits)
