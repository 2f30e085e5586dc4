"""What mixers that compare tokens share: queries, keys and values of heads, and the way back."""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.context import Context
from models.layers import Norm, add_bias, rope, rope_frequencies
from models.param import Dims, param
from parallel.named import named


@dataclasses.dataclass(frozen=True)
class Heads:
    """H query heads over G key heads with queries and keys of size K and values of size V.

    wider: how many times larger K is than at the base width.
    """

    H: int
    G: int
    K: int
    V: int
    wider: float = 1.0

    @classmethod
    def of(cls, dims: Dims, heads: int, kv_heads: int | None, head_dim: int | None) -> "Heads":
        """The usual sizes: G is H and K = V is D / H where they are None.

        Raises:
          ValueError: D does not divide into heads, or heads into groups.
        """
        D, H, G = dims.d_model, heads, kv_heads or heads
        if head_dim is None and D % H:
            raise ValueError(
                f"d_model {D} does not divide into {H} heads; change either or set head_dim"
            )
        if H % G:
            raise ValueError(
                f"{H} heads do not divide into groups over {G} kv_heads; G must divide H"
            )
        K = head_dim or D // H
        return cls(H, G, K, K, dims.wider if head_dim is None else 1.0)


class Projections(nnx.Module):
    """x [B L D] to q [B L H K], k [B L G K], v [B L G V], and heads' outputs back to the stream.

    scaling: of rotary positions, the arguments of `rope_frequencies` after the width; None without.
    qk_norm: RMSNorm a head before the rotation (arXiv 2302.05442 uses LayerNorm).
    """

    def __init__(
        self,
        dims: Dims,
        heads: Heads,
        *,
        rngs: nnx.Rngs,
        scaling: tuple | None,
        qk_norm: bool,
        bias: bool,
    ):
        D, H, G, K, V = dims.d_model, heads.H, heads.G, heads.K, heads.V
        if scaling is not None and K % 2:
            raise ValueError(f"rotary positions need an even head_dim and it is {K}")
        self.scaling, self.wider = scaling, heads.wider
        fans = dict(fan_in=(0,), fan_out=(1, 2), init=dims.normal(D))
        self.q = param(rngs, (D, H, K), ("embed", "heads", None), **fans)
        if K == V:
            fused = fans | dict(fan_out=(2, 3), stack=(1,))
            self.kv = param(rngs, (D, 2, G, K), ("embed", None, "heads", None), **fused)
        else:
            self.k = param(rngs, (D, G, K), ("embed", "heads", None), **fans)
            self.v = param(rngs, (D, G, V), ("embed", "heads", None), **fans)
        out = dict(fan_in=(0, 1), fan_out=(2,), init=dims.normal(H * V, residual=True))
        self.out = param(rngs, (H, V, D), ("heads", None, "embed"), **out)
        vector = dict(decay=False, group="bias")
        if bias and K != V:
            raise ValueError(f"biases need keys and values of one size, not {K} and {V}")
        self.q_bias = param(rngs, (H, K), ("heads", None), **vector) if bias else None
        self.kv_bias = param(rngs, (2, G, K), (None, "heads", None), **vector) if bias else None
        self.out_bias = param(rngs, (D,), (None,), **vector) if bias else None
        self.q_norm = Norm(K, rngs=rngs) if qk_norm else None
        self.k_norm = Norm(K, rngs=rngs) if qk_norm else None

    @property
    def heads(self) -> Heads:
        H, K = self.q.shape[-2:]
        G, V = (self.kv if hasattr(self, "kv") else self.v).shape[-2:]
        return Heads(H, G, K, V)

    def project(self, x: Float[Array, "B L D"], ctx: Context) -> tuple[Array, Array, Array]:
        """q, k and v, rotated where the mixer has rotary positions."""
        q = add_bias(jnp.einsum("bld,dhk->blhk", x, self.q[...].astype(x.dtype)), self.q_bias)
        k, v = self._keys(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.scaling is not None:
            freq = rope_frequencies(q.shape[-1], *self.scaling)
            q, k = rope(q, ctx.positions, freq), rope(k, ctx.positions, freq)
        axes = "batch", "length", "heads", None
        return named(q, "queries", *axes), named(k, "keys", *axes), named(v, "values", *axes)

    def tempered(self, q: Array) -> Array:
        """Queries for a softmax that divides q.k by sqrt(K), where it should by K as K grows.

        Queries and keys learn to agree, and then q.k grows as K (arXiv 2203.03466, definition 4.1).
        """
        return q if self.wider == 1 else q / math.sqrt(self.wider)

    def _keys(self, x):
        if hasattr(self, "kv"):
            kv = jnp.einsum("bld,dsgk->blsgk", x, self.kv[...].astype(x.dtype))
            kv = add_bias(kv, self.kv_bias)
            return kv[:, :, 0], kv[:, :, 1]
        return (jnp.einsum("bld,dgk->blgk", x, w[...].astype(x.dtype)) for w in (self.k, self.v))

    def write(self, o: Float[Array, "B L H V"], ctx: Context) -> Float[Array, "B L D"]:
        """The heads' outputs back to the stream."""
        out = self.out[...].astype(o.dtype)
        y = jnp.einsum("blhk,hkd->bld", o, out, out_sharding=ctx.stream)
        return add_bias(y, self.out_bias)
