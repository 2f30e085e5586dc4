"""A cache of the latest tokens in a ring of slots, with the first few kept beside it."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from parallel.rules import automatic


def held(last: Int[Array, "B"], T: int, first: int = 0) -> Int[Array, "B T"]:
    """The position that each slot holds once position `last` is written; negative where none is.

    Position p < first is in slot p, and the ring of the W = T - first others holds p in slot
    first + (p - first) % W. Where all positions have a slot, the ring has one at least.
    """
    first, last = min(first, T - 1), last[:, None]
    slot = jnp.arange(T)[None] + 0 * last  # laid out like last, as `where` wants its arguments
    ring = (last - first) - (last - slot) % (T - first)
    leading = jnp.where(slot <= last, slot, -1)
    return jnp.where(slot < first, leading, jnp.where(ring >= 0, first + ring, -1))


def fill(cache: dict, rows: dict, last: Int[Array, "B"], first: int = 0) -> dict:
    """A cache of arrays `[B T G K]` with what rows `[B L G K]` hold at and before position last."""
    T, L = next(iter(cache.values())).shape[1], next(iter(rows.values())).shape[1]
    source = jnp.clip(held(last, T, first), 0, L - 1)[:, :, None, None]
    pick = automatic(lambda a, at: jnp.take_along_axis(a, at, 1), "batch", None, "heads", None)
    return {n: pick(rows[n], source).astype(cache[n].dtype) for n in cache}


def put(cache: dict, rows: dict, now: Int[Array, "B"], first: int = 0) -> dict:
    """The cache with rows `[B 1 G K]` in the slots of position now."""
    T = next(iter(cache.values())).shape[1]
    here = (held(now, T, first) == now[:, None])[:, :, None, None]
    return {n: jnp.where(here, rows[n].astype(cache[n].dtype), cache[n]) for n in cache}


def take(cache: dict, now: Int[Array, "B"], first: int = 0) -> dict:
    """Rows `[B 1 G K]`: what the slots of position now still hold of an earlier one."""
    T = next(iter(cache.values())).shape[1]
    here = (held(now, T, first) == now[:, None])[:, :, None, None]
    return {
        n: jnp.sum(jnp.where(here, x, 0), 1, keepdims=True, dtype=x.dtype) for n, x in cache.items()
    }
