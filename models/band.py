"""Softmax over a sliding window, left in its two terms so that others may join the denominator."""

import functools

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.linear_attention.features import dot
from parallel.rules import spec

# What a block's neighbour makes it need in one piece, by argument.
WHOLE = {i: {1: f"length of {n}"} for i, n in enumerate(("q", "k", "v", "segments"))}
FLOOR = float(jnp.finfo(jnp.float32).min)
Terms = tuple[Float[Array, "B L H V"], Float[Array, "B L H"]]


def terms(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L G K"],
    v: Float[Array, "B L G V"],
    segments: Int[Array, "B L"],
    window: int,
) -> Terms:
    """sum_j exp(s_ij - c_i) v_j and sum_j exp(s_ij - c_i), float32, over a query's own window.

    s = q.k / sqrt(K) for the `window` tokens up to oneself, of one's document, and c_i the largest
    of them. Both are 0 for padding. Computed in blocks of `window` queries against theirs and the
    block before: the cost is 2 window a token.
    """
    like_q = lambda q, *_: (q, PartitionSpec(*q[:3]))
    run = functools.partial(_terms, window=window)
    return dispatch.local(run, follow=like_q, whole=WHOLE)(q, k, v, segments)


def _terms(q, k, v, segments, window: int) -> Terms:
    B, L, H, K = q.shape
    G, w = k.shape[2], min(window, L)
    n = -(-L // w)
    fill = lambda x: jnp.pad(x, [(0, 0), (0, n * w - L)] + [(0, 0)] * (x.ndim - 2))
    cut = lambda x, *rest: fill(x).reshape(B, n, w, *rest)
    q, rows = cut(q, G, H // G, K), cut(segments)
    k, v, columns = (_both(x) for x in (cut(k, G, K), cut(v, G, v.shape[3]), rows))
    distance = jnp.arange(w)[:, None] + w - jnp.arange(2 * w)[None]
    near = ((distance >= 0) & (distance < w))[None, None]
    seen = near & (rows[..., None] == columns[:, :, None]) & (columns != 0)[:, :, None]
    s = dot("bnigrk,bnjgk->bngrij", q, k) * K**-0.5
    p = _exponentials(s, seen[:, :, None, None])
    num = dot("bngrij,bnjgv->bnigrv", p.astype(v.dtype), v)
    total = jnp.einsum("bngrij->bnigr", p)
    join = lambda x: x.reshape(B, n * w, H, *x.shape[5:])[:, :L]
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


def _both(blocks):
    """Blocks [B n w ..] after those before them, [B n 2w ..]."""
    before = jnp.concatenate([jnp.zeros_like(blocks[:, :1]), blocks[:, :-1]], 1)
    return jnp.concatenate([before, blocks], 2)


def _exponentials(s, seen):
    """exp(s - max) over what is seen, 0 elsewhere."""
    s = jnp.where(seen, s, FLOOR)
    return jnp.where(seen, jnp.exp(s - jnp.max(s, -1, keepdims=True)), 0.0)
