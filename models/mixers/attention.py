"""Softmax attention with grouped queries.

Attention Is All You Need (arXiv 1706.03762), o_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j.
Grouped queries: arXiv 2305.13245. Sliding window: arXiv 2004.05150. Query/key norm: RMSNorm a head
with a learned scale, before the rotation (arXiv 2302.05442 uses LayerNorm). Soft cap:
cap * tanh(s / cap) on the scores (Gemma 2, arXiv 2408.00118). First keys: the mask of LM-Infinite
(arXiv 2308.16137), without its bound of the distances that positions are rotated by. Sinks: a
learned logit a head in the softmax's denominator (gpt-oss, arXiv 2508.10925).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models import ring
from models.context import Context
from models.param import Dims, param
from models.projections import Heads, Projections
from pallas_kernels.flash_attention import flash_attention
from parallel.rules import spec

CASES = (
    {"heads": 4, "kv_heads": 2, "qk_norm": True},
    {"heads": 2, "window": 5, "softcap": 20.0},
    {"heads": 4, "rope": False, "bias": True},
    {"heads": 4, "kv_heads": 2, "window": 4, "first": 3, "sinks": True},
)


class Mixer(Projections):
    """heads: H query heads over kv_heads (G, H when None) of head_dim (K, D / H when None).

    window: tokens seen, oneself included; None means all. first: tokens at the start of a document
    that are seen from beyond the window too. sinks: whether a head may attend to nothing.
    rope_original_length is read by the 'llama3' scaling only. implementation: of the kernel, None
    lets the platform decide.
    """

    modes = frozenset({"causal", "bidirectional"})
    context = "none"

    def __init__(
        self,
        dims: Dims,
        *,
        rngs: nnx.Rngs,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        rope_scaling: str = "none",
        rope_factor: float = 1.0,
        rope_original_length: int = 8192,
        qk_norm: bool = False,
        window: int | None = None,
        first: int = 0,
        softcap: float | None = None,
        sinks: bool = False,
        bias: bool = False,
        implementation: str | None = None,
    ):
        if first and window is None:
            raise ValueError(
                f"first counts tokens seen from beyond the window, but there is none: set window, "
                f"or first to 0 and not {first}"
            )
        sizes = Heads.of(dims, heads, kv_heads, head_dim)
        scaling = (rope_base, rope_scaling, rope_factor, rope_original_length) if rope else None
        super().__init__(dims, sizes, rngs=rngs, scaling=scaling, qk_norm=qk_norm, bias=bias)
        self.window, self.first, self.softcap = window, first, softcap
        self.implementation = implementation
        vector = dict(decay=False, group="bias")
        self.sinks = param(rngs, (sizes.H,), ("heads",), **vector) if sinks else None

    def __call__(
        self, x: Float[Array, "B L D"], ctx: Context
    ) -> tuple[Float[Array, "B L D"], dict]:
        return self._attend(*self.project(x, ctx), ctx), {}

    def _attend(self, q, k, v, ctx):
        o = flash_attention(
            self.tempered(q),
            k,
            v,
            q_segments=ctx.segment_ids,
            kv_segments=ctx.segment_ids,
            causal=ctx.causal,
            window=self.window,
            first=self.first,
            softcap=self.softcap,
            sinks=None if self.sinks is None else self.sinks[...],
            implementation=self.implementation,
        )
        return self.write(o, ctx)

    def masked_flops(self, length: int) -> float:
        """Forward FLOPs a token of the reference on pairs that a causal mask forbids.

        Scores and weighted sum cost 4 H K a pair, and of L keys a token sees min(i, w + first).
        Packing is ignored, as is usual.
        """
        H, K = self.heads.H, self.heads.K
        w = self._slots(length)
        seen = w * (2 * length - w + 1) / (2 * length)
        return 4 * H * K * (length - seen)

    def state_size(self, length: int) -> int:
        """Elements of the decoding state of one sequence of this many tokens."""
        return 2 * self.heads.G * self.heads.K * self._slots(length)

    def _slots(self, length: int) -> int:
        return length if self.window is None else min(self.first + self.window, length)

    def init_cache(self, B: int, length: int, dtype: str) -> dict[str, Array]:
        """Keys and values of the `first` tokens, and of the last `window` others in a ring."""
        G, K = self.heads.G, self.heads.K
        shape, layout = (B, self._slots(length), G, K), spec("batch", None, "heads", None)
        return {name: jnp.zeros(shape, dtype, out_sharding=layout) for name in ("k", "v")}

    def prefill(self, x: Float[Array, "B L D"], ctx: Context, cache: dict) -> tuple[Array, dict]:
        """As `__call__` on right-padded prompts that start at position 0, filling the cache."""
        q, k, v = self.project(x, ctx)
        last = jnp.sum(ctx.valid, 1) - 1
        return self._attend(q, k, v, ctx), ring.fill(cache, {"k": k, "v": v}, last, self.first)

    def decode(self, x: Float[Array, "B 1 D"], ctx: Context, cache: dict) -> tuple[Array, dict]:
        """One token a row at ctx.positions `[B 1]`, against the cache."""
        q, k, v = self.project(x, ctx)
        now = ctx.positions[:, 0]
        cache = ring.put(cache, {"k": k, "v": v}, now, self.first)
        return self.write(self._look_up(q, cache, now), ctx), cache

    def _look_up(self, q, cache, now: Int[Array, "B"]):
        B, _, H, K = q.shape
        T, G = cache["k"].shape[1:3]
        # Said, because with G = 1 the sharding of H would go to its queries and not to G.
        q = q.reshape(B, G, H // G, K, out_sharding=spec("batch", "heads", None, None))
        q = self.tempered(q.astype(jnp.float32)) * K**-0.5
        s = jnp.einsum("bgrk,btgk->bgrt", q, cache["k"].astype(jnp.float32))
        s = s if self.softcap is None else self.softcap * jnp.tanh(s / self.softcap)
        seen = ring.held(now, T, self.first) >= 0
        s = jnp.where(seen[:, None, None], s, -jnp.inf)
        if self.sinks is None:
            p = jax.nn.softmax(s, -1)
        else:
            sinks = self.sinks[...].reshape(
                1, G, H // G, 1, out_sharding=spec(None, "heads", None, None)
            )
            lse = jax.nn.logsumexp(s, -1, keepdims=True)
            p = jnp.exp(s - jnp.logaddexp(lse, sinks))
        o = jnp.einsum("bgrt,btgk->bgrk", p, cache["v"].astype(jnp.float32))
        o = o.reshape(B, 1, H, K, out_sharding=spec("batch", None, "heads", None))
        return o.astype(cache["v"].dtype)
