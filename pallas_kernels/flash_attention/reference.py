"""The definition of attention: the whole score matrix, in float32."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Options:
    """What the scores go through; see `flash_attention`."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float


def visible(rows, columns, q_segments, kv_segments, options: Options):
    """Which keys each query sees.

    Args:
      rows: [L] positions of the queries, counted on the keys' positions.
      columns: [S] positions of the keys.
      q_segments, kv_segments: [B L], [B S], both or neither None.

    Returns:
      bool [B L S], or [1 L S] where rows of the batch agree, or None where everything is seen.
    """
    distance = rows[:, None] - columns[None, :]
    seen = None
    if options.causal:
        seen = distance >= 0
    if options.window is not None:
        near = (distance if options.causal else jnp.abs(distance)) < options.window
        seen = near if seen is None else seen & near
    seen = None if seen is None else seen[None]
    if q_segments is not None:
        keys = kv_segments[:, None, :]
        same = (q_segments[:, :, None] == keys) & (keys != 0)
        seen = same if seen is None else seen & same
    return seen


def forward(q, k, v, q_segments, kv_segments, options: Options):
    """Attention by its definition; jax.grad of it is the definition of the gradient.

    Args:
      q, k, v: [B L H K], [B S G K], [B S G V].
      q_segments, kv_segments: [B L], [B S] or None.

    Returns:
      o [B L H V] in q's dtype, lse [B L H] float32.
    """
    B, L, H, K = q.shape
    _, S, G, V = v.shape
    dtype = q.dtype
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    s = options.scale * jnp.einsum("BLGRK,BSGK->BGRLS", q.reshape(B, L, G, H // G, K), k)
    if options.softcap is not None:
        s = options.softcap * jnp.tanh(s / options.softcap)
    seen = visible(jnp.arange(L) + S - L, jnp.arange(S), q_segments, kv_segments, options)
    if seen is not None:
        s = jnp.where(seen[:, None, None], s, -jnp.inf)
    # A query that sees nothing has only -inf: a finite floor keeps its exponentials 0, not NaN.
    m = jax.lax.stop_gradient(jnp.max(s, -1, keepdims=True, initial=jnp.finfo(s.dtype).min))
    p = jnp.exp(s - m)
    total = jnp.sum(p, -1, keepdims=True)
    blind = total == 0
    total = jnp.where(blind, 1.0, total)
    o = jnp.einsum("BGRLS,BSGV->BLGRV", p / total, v).reshape(B, L, H, V)
    lse = jnp.where(blind, -jnp.inf, m + jnp.log(total))[..., 0]
    return o.astype(dtype), jnp.moveaxis(lse, 3, 1).reshape(B, L, H)


def backward(q, k, v, q_segments, kv_segments, o, lse, do, dlse, options: Options):
    """Gradients of q, k and v for cotangents do [B L H V] and dlse [B L H]."""
    del o, lse
    attend = lambda q, k, v: forward(q, k, v, q_segments, kv_segments, options)
    return jax.vjp(attend, q, k, v)[1]((do, dlse))
