"""How far a mixer's weights are from those of softmax attention, for learning by imitation."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.context import Context, over_tokens
from pallas_kernels.linear_attention.features import dot
from parallel.rules import constrain, spec

CHUNK = 128  # queries at a time: the weights of a whole row are never held
SMALLEST = 1e-12  # of weights that sum to one, whose logarithm is taken
TINY = 1e-30  # of weights and sums before that: float32 has a logarithm and its inverse for it
FLOOR = -1e30  # scores of keys that are not seen

# student(s, distance, rows) -> unnormalised weights [B G R i j] of the queries in `rows`, from the
# teacher's scores s [B G R i j], FLOOR where a key is not seen, and how far back each is [i j].
Student = Callable[[Array, Array, slice], Array]


def cross_entropy(q, k, student: Student, ctx: Context) -> tuple[Array, Array]:
    """Sums over valid tokens of -sum_j t_ij log a_ij, and of the least it can be, t's own entropy.

    t: softmax attention's weights, causal and within documents; a: the student's, made to sum to
    one over the same keys. Means over heads. q [B L H K], k [B L G K].
    """
    L, H = q.shape[1:3]
    C, q = min(CHUNK, L), grouped(q, k)

    @jax.checkpoint
    def chunk(start):
        t, a = _both(q, k, student, ctx.segment_ids, start, C)
        log = lambda x: jnp.log(jnp.maximum(x, TINY))
        log_a = log(a) - log(jnp.sum(a, -1, keepdims=True))
        log_a = jnp.maximum(log_a, math.log(SMALLEST))
        mean = lambda x: -jnp.einsum("bgrij->bi", x) / H
        return mean(t * log_a), mean(t * jnp.log(jnp.where(t > 0, t, 1.0)))

    starts = jnp.minimum(jnp.arange(-(-L // C)) * C, L - C)
    parts = jax.lax.map(chunk, starts)
    laid_out = lambda x: constrain(_whole(x, starts, L), "batch", "length")
    return tuple(over_tokens(laid_out(x), ctx) for x in parts)


def weights(
    q, k, student: Student, segments: Int[Array, "B L"]
) -> tuple[Float[Array, "B H L L"], Float[Array, "B H L L"]]:
    """t and a of `cross_entropy`, each query's summing to one, of rows short enough to be held."""
    B, L, H, _ = q.shape
    t, a = _both(grouped(q, k), k, student, segments, 0, L)
    layout = spec("batch", "heads", None, None)
    flat = lambda x: x.reshape(B, H, L, L, out_sharding=layout)
    return flat(t), flat(a / jnp.maximum(jnp.sum(a, -1, keepdims=True), TINY))


def grouped(q, k) -> Float[Array, "B L G R K"]:
    """Query heads by the key head that they share."""
    (B, L, H, K), G = q.shape, k.shape[2]
    layout = spec("batch", None, "heads", None, None)
    return q.reshape(B, L, G, H // G, K, out_sharding=layout)


def _both(q, k, student: Student, segments, start, C: int) -> tuple[Array, Array]:
    """t, and a before it is made to sum to one, [B G R C L], of C queries q [B L G R K]."""
    rows = lambda x: jax.lax.dynamic_slice_in_dim(x, start, C, 1)
    # Every query is compared with every key, so a row is not split here.
    k, segments = constrain(k, "batch", None, "heads", None), constrain(segments, "batch", None)
    s = dot("bigrk,bjgk->bgrij", rows(q), k) * k.shape[-1] ** -0.5
    distance = start + jnp.arange(C)[:, None] - jnp.arange(k.shape[1])[None]
    same = rows(segments)[:, :, None] == segments[:, None]
    seen = (same & (distance >= 0)[None])[:, None, None]
    s = jnp.where(seen, s, FLOOR)
    t = jnp.where(seen, jax.nn.softmax(s, -1), 0.0)
    return t, jnp.where(seen, student(s, distance, rows), 0.0)


def _whole(parts: Float[Array, "n B C"], starts, L: int) -> Float[Array, "B L"]:
    """Chunks that start at `starts`, the last of which may begin inside the one before."""
    n, _, C = parts.shape
    return jnp.concatenate([*parts[:-1], parts[-1][:, C - (L - (n - 1) * C) :]], 1)
