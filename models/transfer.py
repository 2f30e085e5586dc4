"""How far a mixer's weights are from those of softmax attention, for learning by imitation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.context import Context, over_tokens
from pallas_kernels.linear_attention.features import dot
from parallel.rules import spec

CHUNK = 128  # queries at a time: the weights of a whole row are never held
SMALLEST = 1e-12  # of weights whose logarithm is taken

# student(s, distance, rows) -> unnormalised weights [B G R i j] of the queries in `rows`, from the
# teacher's scores s [B G R i j] and how far back each key is [i j].
Student = Callable[[Array, Array, slice], Array]


def cross_entropy(q, k, student: Student, ctx: Context) -> tuple[Array, Array]:
    """Sums over valid tokens of -sum_j t_ij log a_ij, and of the least it can be, t's own entropy.

    t: softmax attention's weights, causal and within documents; a: the student's, made to sum to
    one over the same keys. Means over heads. q [B L H K], k [B L G K].
    """
    B, L, H, K = q.shape
    G, C = k.shape[2], min(CHUNK, L)
    layout = spec("batch", None, "heads", None, None)
    q = q.reshape(B, L, G, H // G, K, out_sharding=layout)

    @jax.checkpoint
    def chunk(start):
        rows = lambda x: jax.lax.dynamic_slice_in_dim(x, start, C, 1)
        s = dot("bigrk,bjgk->bgrij", rows(q), k) * K**-0.5
        distance = start + jnp.arange(C)[:, None] - jnp.arange(L)[None]
        same = rows(ctx.segment_ids)[:, :, None] == ctx.segment_ids[:, None]
        seen = (same & (distance >= 0)[None])[:, None, None]
        t = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), -1)
        a = jnp.where(seen, student(s, distance, rows), 0.0)
        log_a = jnp.log(jnp.maximum(a, SMALLEST)) - jnp.log(jnp.sum(a, -1, keepdims=True))
        mean = lambda x: -jnp.einsum("bgrij->bi", x) / H
        return mean(t * log_a), mean(t * jnp.log(jnp.where(t > 0, t, 1.0)))

    starts = jnp.minimum(jnp.arange(-(-L // C)) * C, L - C)
    parts = jax.lax.map(chunk, starts)
    return tuple(over_tokens(_whole(x, starts, L), ctx) for x in parts)


def _whole(parts: Float[Array, "n B C"], starts, L: int) -> Float[Array, "B L"]:
    """Chunks that start at `starts`, the last of which may begin inside the one before."""
    n, B, C = parts.shape
    rest = L - (n - 1) * C
    last = parts[-1][:, C - rest :]
    first = jnp.moveaxis(parts[:-1], 0, 1).reshape(B, (n - 1) * C)
    return jnp.concatenate([first, last], 1)
