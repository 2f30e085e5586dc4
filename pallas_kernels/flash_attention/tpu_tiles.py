"""What of a tile of scores is seen: a table for the scalar core, and masks for the vector unit."""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention import blocks
from pallas_kernels.flash_attention.reference import Options

LANES = 128
LOG2E = math.log2(math.e)
# Codes of a tile: nothing seen, some pairs, all, the start of a row's sums (the causal diagonal,
# or a band around it that holds all that the row sees), the far end of a window.
SKIP, MASKED, WHOLE, START, FAR = range(5)
BITS = 4
PER_WORD = 32 // BITS
# Segment of a query that is padding: no key bears it.
NOBODY = np.iinfo(np.int32).min


@dataclasses.dataclass(frozen=True)
class Table:
    """What the queries of each block visit.

    codes: int32 [B or 1, n, m] of n blocks of queries and m of keys; numpy if known before the run.
    ranges: int32 [B or 1, n, 3]: tiles [start, stop) besides the START, and its index or -1.
    present: the codes that occur between, or may. starts: whether every row has a START.
    band: keys before and after a query that are visited around the diagonal, or None.
    """

    codes: np.ndarray | jax.Array
    ranges: np.ndarray | jax.Array
    present: tuple[int, ...]
    starts: bool
    band: tuple[int, int] | None


def table(T: int, C: int, P: int, L: int, S: int, q_segments, kv_segments, options: Options):
    """The `Table` of tiles of T queries and C keys, of which P are held at a time."""
    at = _band(T, C, P, L, S, options)
    sizes = T, C, P, L, S
    codes = _codes(sizes, None, None, options, at)
    present, starts = _visited(codes), bool((codes == START).any(2).all())
    if q_segments is not None:
        codes = _codes(sizes, q_segments, kv_segments, options, at)
        # A document's end may leave a tile in part or unseen.
        present |= {SKIP, MASKED} if WHOLE in present else {SKIP}
        starts = False
    return Table(codes, _ranges(codes), tuple(sorted(present)), starts, at)


def _visited(codes) -> set[int]:
    """The codes that occur where a row of tiles is visited."""
    start, stop, first = (x[:, :, None] for x in np.moveaxis(_ranges(codes), 2, 0))
    index = np.arange(codes.shape[2])[None, None]
    return set(codes[((start <= index) & (index < stop)) | (index == first)].tolist())


def _band(T: int, C: int, P: int, L: int, S: int, options: Options) -> tuple[int, int] | None:
    """Keys before and after a strip's own that a short window reaches, if that is all it sees."""
    if options.window is None or options.first or S < L or not aligned(T, C, P, S - L):
        return None
    reach = math.ceil((options.window - 1) / LANES) * LANES
    band = reach, 0 if options.causal else reach
    return band if sum(band) <= T and max(whole(S, T, C), sum(band) + T) <= P else None


def aligned(T: int, C: int, P: int, place: int) -> bool:
    """Whether keys at the place of T queries, moved by `place`, are whole tiles of one block."""
    return T % C == 0 and P % T == 0 and place % T == 0


def whole(S: int, T: int, C: int) -> int:
    """Keys with padding: whole tiles, and of the keys beside T queries all where T is larger."""
    unit = T if T % C == 0 else C
    return math.ceil(S / unit) * unit


def _codes(sizes, q_segments, kv_segments, options: Options, band):
    T, C, P, L, S = sizes
    kinds = blocks.kinds(T, C, L, S, q_segments, kv_segments, options)
    xp = jnp if isinstance(kinds, jax.Array) else np
    kinds = xp.pad(kinds, ((0, 0), (0, 0), (0, whole(S, T, C) // C - kinds.shape[2])))
    n, m = kinds.shape[1:]
    ahead = np.arange(m)[None] * C - np.arange(n)[:, None] * T - (S - L)
    if band is not None:
        seen = (kinds != SKIP).any(2, keepdims=True) & (ahead == 0)[None]
        return xp.where(seen, START, SKIP).astype(np.int32)
    places = [(START, 0)] if options.causal else []
    if options.causal and options.window is not None and not options.first:
        places.append((FAR, -options.window))
    for code, place in places:
        if aligned(T, C, P, S - L) and place % T == 0:
            kinds = _joined(xp, kinds, ahead - place, T, C, code)
    return kinds.astype(np.int32)


def _joined(xp, kinds, ahead, T: int, C: int, code: int):
    """Gives the tiles of T keys from where `ahead` is 0, worked off at once, to their first."""
    (n, m), u = ahead.shape, T // C
    some = (kinds.reshape(-1, n, m // u, u) != SKIP).any(3).repeat(u, 2)
    own, first = (ahead >= 0) & (ahead < T), ahead == 0
    return xp.where(own[None], xp.where(some & first[None], code, SKIP), kinds)


def _ranges(codes):
    xp = jnp if isinstance(codes, jax.Array) else np
    m = codes.shape[2]
    index = np.arange(m)[None, None]
    other = (codes != SKIP) & (codes != START)
    stop = xp.max(xp.where(other, index + 1, 0), 2)
    start = xp.minimum(xp.min(xp.where(other, index, m), 2), stop)
    first = xp.max(xp.where(codes == START, index, -1), 2)
    return xp.stack([start, stop, first], 2).astype(np.int32)


def pack(codes):
    """Codes as words of the scalar memory, int32, flat: eight tiles a word."""
    xp = jnp if isinstance(codes, jax.Array) else np
    codes = xp.pad(codes, ((0, 0), (0, 0), (0, -codes.shape[2] % PER_WORD)))
    shifts = np.arange(PER_WORD, dtype=np.int32) * BITS
    words = codes.reshape(*codes.shape[:2], -1, PER_WORD) << shifts[None, None, None]
    return words.sum(3).astype(np.int32).reshape(-1)


def check_scalars(size: int):
    """Declines tables of `size` bytes that do not fit into the scalar memory.

    Raises:
      NotImplementedError: they do not.
    """
    room = pltpu.get_tpu_info().smem_capacity_bytes * 7 // 8
    if size > room:
        raise NotImplementedError(
            f"What the tiles see takes {size} bytes of scalar memory, and there are {room}: use "
            f"larger tiles, or split the sequence over devices."
        )


def code_at(words, row, m: int, j):
    """The code of tile j in a row of m tiles; row counts over batch and blocks of queries."""
    word = words[row * math.ceil(m / PER_WORD) + j // PER_WORD]
    return (word >> (j % PER_WORD * BITS)) & (2**BITS - 1)


def mask(ahead, column, S: int, shape, q_segments, kv_segments, options: Options):
    """Which pairs of a piece of scores are seen, bool [shape].

    Args:
      ahead: how far the first key stands before the first query, traced.
      column: position of the first key, traced.
      S: number of keys in all; later columns are padding.
      shape: (queries, keys).
      q_segments, kv_segments: [queries, 128], every lane alike and NOBODY for padding, and
        [1, keys] as `reference.mark` gives them; or None.
    """
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, shape, d) for d in (0, 1))
    conditions = []
    if options.causal:
        conditions.append(rows - columns >= ahead)
    elif q_segments is None:
        conditions.append(columns < S - column)
    if options.window is not None:
        near = rows - columns < ahead + options.window
        if not options.causal:
            near = near & (rows - columns > ahead - options.window)
        if options.first:
            leading = columns < options.first - column if q_segments is None else kv_segments < 0
            near = near | leading
        conditions.append(near)
    if q_segments is not None:
        ids = jnp.abs(kv_segments) if options.first else kv_segments
        conditions.append(jnp.tile(q_segments, (1, shape[1] // LANES)) == ids)
    return functools.reduce(operator.and_, conditions)
