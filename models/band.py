"""Softmax over a sliding window, left in its two terms so that others may join the denominator."""

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.linear_attention.features import dot
from parallel.rules import spec

# What a block's neighbour makes it need in one piece, by argument.
NAMES = ("q", "k", "v", "q_segments", "kv_segments")
WHOLE = {i: {1: f"length of {n}"} for i, n in enumerate(NAMES)}
FLOOR = float(jnp.finfo(jnp.float32).min)
Terms = tuple[Float[Array, "B L H V"], Float[Array, "B L H"]]


def terms(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    q_segments: Int[Array, "B L"],
    kv_segments: Int[Array, "B S"],
) -> Terms:
    """sum_j exp(s_ij - c_i) v_j and sum_j exp(s_ij - c_i), float32, over a query's own window.

    The window is w = S - L tokens, of which keys and values have those before the first query; 0 is
    the segment of what is not there. s = q.k / sqrt(K) for the w tokens up to oneself, of one's
    document, and c_i the largest of them. Both are 0 for padding. Computed in blocks of min(w, L)
    queries against theirs and the w before: the cost is at most 2 w a token.
    """
    like_q = lambda q, *_: (q, PartitionSpec(*q[:3]))
    return dispatch.local(_terms, follow=like_q, whole=WHOLE)(q, k, v, q_segments, kv_segments)


def _terms(q, k, v, q_segments, kv_segments) -> Terms:
    (B, L, H, K), G = q.shape, k.shape[2]
    w = k.shape[1] - L
    C = min(w, L)
    n = -(-L // C)
    fill = lambda x: jnp.pad(x, [(0, 0), (0, n * C - L)] + [(0, 0)] * (x.ndim - 2))
    cut = lambda x, *rest: x.reshape(B, n, C, *rest)
    # A block of keys after the w before it, [B n w+C ..]; a row shorter than the window is one.
    pair = lambda x: jnp.concatenate([cut(y, *x.shape[2:]) for y in (x[:, :-w], x[:, w:])], 2)
    both = pair if w == C else lambda x: x[:, None]
    q, rows = cut(fill(q), G, H // G, K), cut(fill(q_segments))
    k, v, columns = (both(fill(x)) for x in (k, v, kv_segments))
    distance = jnp.arange(C)[:, None] + w - jnp.arange(w + C)[None]
    near = ((distance >= 0) & (distance < w))[None, None]
    seen = near & (rows[..., None] == columns[:, :, None]) & (columns != 0)[:, :, None]
    s = dot("bnigrk,bnjgk->bngrij", q, k) * K**-0.5
    p = _exponentials(s, seen[:, :, None, None])
    num = dot("bngrij,bnjgv->bnigrv", p.astype(v.dtype), v)
    total = jnp.einsum("bngrij->bnigr", p)
    join = lambda x: x.reshape(B, n * C, H, *x.shape[5:])[:, :L]
    return join(num), join(total)


def of_ring(q: Float[Array, "B 1 H K"], cache: dict[str, Array], seen: Bool[Array, "B T"]) -> Terms:
    """The same two terms of one query a row, over the slots of a ring that are `seen`."""
    B, _, H, K = q.shape
    G = cache["k"].shape[2]
    q = q.reshape(B, G, H // G, K, out_sharding=spec("batch", "heads", None, None))
    s = dot("bgrk,btgk->bgrt", q, cache["k"].astype(q.dtype)) * K**-0.5
    p = _exponentials(s, seen[:, None, None])
    num = jnp.einsum("bgrt,btgv->bgrv", p, cache["v"].astype(jnp.float32))
    row = lambda x, *rest: x.reshape(
        B, 1, H, *rest, out_sharding=spec("batch", None, "heads", *[None] * len(rest))
    )
    return row(num, num.shape[-1]), row(jnp.sum(p, -1))


def _exponentials(s, seen):
    """exp(s - max) over what is seen, 0 elsewhere."""
    s = jnp.where(seen, s, FLOOR)
    return jnp.where(seen, jnp.exp(s - jnp.max(s, -1, keepdims=True)), 0.0)
