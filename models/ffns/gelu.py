"""The transformer's two-layer network with GELU, y = gelu(x W_up) W_down (arXiv 1606.08415)."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from models.layers import TwoLayer
from models.param import Dims

CASES = ({"approximate": "none", "bias": True},)


class FFN(TwoLayer):
    """width: F, 4 D when None. approximate: 'tanh' (GPT-2) or 'none' (the error function, BERT)."""

    def __init__(
        self,
        dims: Dims,
        *,
        rngs: nnx.Rngs,
        width: int | None = None,
        bias: bool = False,
        approximate: str = "tanh",
    ):
        if approximate not in ("tanh", "none"):
            raise ValueError(f"gelu's approximate is {approximate!r}; it must be 'tanh' or 'none'")
        super().__init__(dims, rngs=rngs, width=width, bias=bias)
        self.approximate = approximate

    def activate(self, h: Float[Array, "B L F"]) -> Float[Array, "B L F"]:
        return jax.nn.gelu(h, approximate=self.approximate == "tanh")
