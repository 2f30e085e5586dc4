"""The definition of attention: the whole score matrix, in float32, or float64 for such inputs."""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Options:
    """What the scores go through, see `flash_attention`.

    config: the implementation's own, or None. lse_gradient: whether dlse may be other than 0.
    """

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    first: int = 0
    config: Any = None
    lse_gradient: bool = True


def mark(kv_segments, options: Options):
    """Segments of the keys [B S], negated where a key is among the first of its document.

    A document is the keys of one id, in one piece or not. Ids are positive, so that a query is of
    a key's document where `q == |kv|`, and sees it from afar if also `kv < 0`. Marking twice
    changes nothing; with `first` 0 nothing is marked.
    """
    if kv_segments is None or not options.first:
        return kv_segments
    xp = jnp if isinstance(kv_segments, jax.Array) else np
    ids = xp.abs(kv_segments)
    S = ids.shape[1]
    # In order of ids, keys of one id keep their own order and are a run: its start gives the rank.
    order = xp.argsort(ids, axis=1, stable=True)
    run = xp.take_along_axis(ids, order, 1)
    index = xp.arange(S)[None]
    starts = xp.where(xp.diff(run, axis=1, prepend=-1) != 0, index, 0)
    rank = index - (
        jax.lax.cummax(starts, axis=1) if xp is jnp else np.maximum.accumulate(starts, 1)
    )
    rank = xp.take_along_axis(rank, xp.argsort(order, axis=1), 1)
    return xp.where(rank < options.first, -ids, ids)


def visible(rows, columns, q_segments, kv_segments, options: Options):
    """Which keys each query sees.

    Args:
      rows: [L] positions of the queries, counted on the keys' positions.
      columns: [S] positions of the keys.
      q_segments, kv_segments: [B L], [B S] as `mark` gives them, both or neither None.

    Returns:
      bool [B L S], or [1 L S] where rows of the batch agree, or None where everything is seen.
    """
    distance = (rows[:, None] - columns[None, :])[None]
    conditions = [distance >= 0] if options.causal else []
    if options.window is not None:
        near = (distance if options.causal else jnp.abs(distance)) < options.window
        if options.first:
            whole_row = columns[None] < options.first
            leading = whole_row if kv_segments is None else kv_segments < 0
            near = near | leading[:, None]
        conditions.append(near)
    if q_segments is not None:
        keys = jnp.abs(kv_segments) if options.first else kv_segments
        conditions.append((q_segments[:, :, None] == keys[:, None]) & (keys != 0)[:, None])
    return functools.reduce(operator.and_, conditions) if conditions else None


def scores(q, k, q_segments, kv_segments, options: Options):
    """s_ij [B G R L S], -inf where query i does not see key j; R = H / G."""
    (B, L, H, K), (_, S, G, _) = q.shape, k.shape
    s = options.scale * jnp.einsum("BLGRK,BSGK->BGRLS", q.reshape(B, L, G, H // G, K), k)
    if options.softcap is not None:
        s = options.softcap * jnp.tanh(s / options.softcap)
    kv_segments = mark(kv_segments, options)
    seen = visible(jnp.arange(L) + S - L, jnp.arange(S), q_segments, kv_segments, options)
    return s if seen is None else jnp.where(seen[:, None, None], s, -jnp.inf)


def forward(q, k, v, q_segments, kv_segments, options: Options):
    """Attention by its definition.

    Args:
      q, k, v: [B L H K], [B S G K], [B S G V].
      q_segments, kv_segments: [B L], [B S] or None.

    Returns:
      o [B L H V] in q's dtype, lse [B L H] float32 (float64 if q is).
    """
    dtype = q.dtype
    q, k, v = _exact(q, k, v)
    s = scores(q, k, q_segments, kv_segments, options)
    # A query that sees nothing has only -inf: a finite floor keeps its exponentials 0, not NaN.
    m = jnp.max(s, -1, keepdims=True, initial=jnp.finfo(s.dtype).min)
    p = jnp.exp(s - m)
    total = jnp.sum(p, -1, keepdims=True)
    blind = total == 0
    total = jnp.where(blind, 1.0, total)
    o = jnp.einsum("BGRLS,BSGV->BLGRV", p / total, v)
    lse = jnp.where(blind, -jnp.inf, m + jnp.log(total))[..., 0]
    return _heads(o).astype(dtype), _heads(jnp.moveaxis(lse, 3, 1))


def backward(q, k, v, q_segments, kv_segments, o, lse, do, dlse, options: Options):
    """Gradients of q, k and v for cotangents do [B L H V] and dlse [B L H].

    With `p_ij = exp(s_ij - lse_i)`: `dv_j = sum_i p_ij do_i`, `ds_ij = p_ij (do_i . v_j - delta_i)`
    and `delta_i = do_i . o_i - dlse_i`. o and lse may be those with sinks.
    """
    dtypes, G = (q.dtype, k.dtype, v.dtype), k.shape[2]
    q, k, v, o, do = _exact(q, k, v, o, do)
    lse, delta = row_terms(o, lse, do, dlse)
    lse, delta = (jnp.moveaxis(_groups(x, G), 1, 3)[..., None] for x in (lse, delta))
    s, pull = jax.vjp(lambda q, k: scores(q, k, q_segments, kv_segments, options), q, k)
    p = jnp.exp(s - lse)
    dv = jnp.einsum("BGRLS,BLGRV->BSGV", p, _groups(do, G))
    dp = jnp.einsum("BLGRV,BSGV->BGRLS", _groups(do, G), v)
    gradients = (*pull(p * (dp - delta)), dv)
    return tuple(x.astype(dtype) for x, dtype in zip(gradients, dtypes, strict=True))


def row_terms(o, lse, do, dlse):
    """What the backward pass needs of each query: `p = exp(s - lse)` and `ds = p (dp - delta)`.

    Returns:
      lse [B L H], inf where a query saw nothing so that its p is 0; delta [B L H], do . o - dlse.
    """
    delta = jnp.sum(do.astype(lse.dtype) * o.astype(lse.dtype), -1) - dlse
    return jnp.where(lse == -jnp.inf, jnp.inf, lse), delta


def _exact(*args):
    return [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in args]


def _groups(x, G: int):
    """[B L H ..] -> [B L G R ..]."""
    return x.reshape(*x.shape[:2], G, x.shape[2] // G, *x.shape[3:])


def _heads(x):
    """[B L G R ..] -> [B L H ..]."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])
