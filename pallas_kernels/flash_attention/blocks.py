"""Which tiles of the score matrix hold a pair that is seen: what kernels skip, mask or run bare."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention.reference import Options, mark

NONE, SOME, ALL = 0, 1, 2


def kinds(T: int, C: int, L: int, S: int, q_segments, kv_segments, options: Options):
    """What queries [i T, (i + 1) T) see of keys [j C, (j + 1) C), for every tile (i, j).

    Exact by positions. Segments need not be sorted: two blocks whose ranges of ids overlap count as
    seen in part, so that a tile may be 1 where 0 is true, or, with `first`, where 2 is.

    Args:
      T, C: queries and keys a tile.
      L, S: queries and keys in all.
      q_segments, kv_segments: [B L], [B S], marked or not; both or neither None.

    Returns:
      int32 [B or 1, ceil(L / T), ceil(S / C)]: 0 where nobody sees anything, 1 where some pairs are
      seen, 2 where all are; a tile that reaches beyond L or S is never 2. Of numpy segments, and
      without segments, it is numpy and static; otherwise jax.
    """
    rows, keys = _block_edges(T, L, S - L), _block_edges(C, S, 0)
    whole = (np.arange(1, len(rows[0]) + 1) * T <= L)[:, None]
    whole = (whole & (np.arange(1, len(keys[0]) + 1) * C <= S)[None])[None]
    if q_segments is None:
        some, every = _by_position(rows, keys, options)
    else:
        some, every = _by_segment(T, C, rows, keys, q_segments, kv_segments, options)
    return some.astype(np.int32) + (some & every & whole).astype(np.int32)


def in_front(seen):
    """Where the last dimension is True, and how often.

    Returns:
      int32 [.. n]: the indices of the True in order, then the others; int32 [..]: how many are.
    """
    xp = np if isinstance(seen, np.ndarray) else jnp
    order = xp.argsort(~seen, axis=-1, stable=True)
    return order.astype(np.int32), seen.sum(-1, dtype=np.int32)


def _block_edges(block: int, size: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last position of each block."""
    starts = np.arange(0, size, block)
    return starts + shift, np.minimum(starts + block, size) - 1 + shift


def _reach(rows, keys, causal: bool, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Whether some pair and whether every pair of two ranges of positions is seen, bool [1 n m]."""
    (a, b), (c, d) = (tuple(x[:, None] for x in rows), tuple(x[None] for x in keys))
    nearest, farthest = a - d, b - c
    far = np.inf if window is None else window - 1
    back = 0 if causal else -far
    some = (c <= d) & (farthest >= back) & (nearest <= far)
    every = (c > d) | ((nearest >= back) & (farthest <= far))
    return some[None], every[None]


def _by_position(rows, keys, options: Options):
    """Without segments: a block's leading keys are seen from afar, the others within the window."""
    (c, d), first = keys, options.first
    some_leading, all_leading = _reach(rows, (c, np.minimum(d, first - 1)), options.causal, None)
    rest = np.maximum(c, first), d
    some_near, all_near = _reach(rows, rest, options.causal, options.window)
    return some_leading | some_near, all_leading & all_near


def _by_segment(T: int, C: int, rows, keys, q_segments, kv_segments, options: Options):
    xp = jnp if isinstance(kv_segments, jax.Array) else np
    kv = mark(kv_segments, options)
    q_low, q_high, q_least = _ranges(xp, q_segments, T)
    low, high, least = _ranges(xp, xp.abs(kv), C)
    overlap = lambda low, high: (
        (q_low[:, :, None] <= high[:, None]) & (low[:, None] <= q_high[:, :, None])
    )
    # One document that is no padding: no id differs from the greatest.
    same = (q_least[:, :, None] == high[:, None]) & (least[:, None] == q_high[:, :, None])
    same = same & (q_least > 0)[:, :, None] & overlap(low, high)
    some_near, all_near = _reach(rows, keys, options.causal, options.window)
    some, every = overlap(low, high) & some_near, same & all_near
    if options.first:
        some_far, all_far = _reach(rows, keys, options.causal, None)
        some = some | (overlap(*_ranges(xp, xp.maximum(-kv, 0), C)[:2]) & some_far)
        leading = (_ranges(xp, (kv < 0).astype(np.int32), C)[2] > 0)[:, None]
        every = every | (same & leading & all_far)
    return some, every


def _ranges(xp, ids, block: int):
    """Least and greatest id of each block without its padding, and the least with it, [B n]."""
    n = -(-ids.shape[1] // block)
    ids = xp.pad(ids, ((0, 0), (0, n * block - ids.shape[1])))
    ids = ids.reshape(ids.shape[0], n, block)
    some = xp.where(ids > 0, ids, np.iinfo(np.int32).max)
    return some.min(2), ids.max(2), ids.min(2)
