"""The forward kernel's own program: what one step of the grid does to its queries' sums."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention import tpu_tiles
from pallas_kernels.flash_attention.reference import Options
from pallas_kernels.flash_attention.tpu_tiles import FAR, LANES, LOG2E, MASKED, SKIP, START, WHOLE
from pallas_kernels.products import NN, NT, dot

# A row's maximum before it sees a key, and a score that is not seen: far enough below that its
# exponential is 0. Both finite, so that no difference is NaN.
LOWEST = -(2.0**120)
UNSEEN = -(2.0**126)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call; m tiles of keys, `held` of them in VMEM; the rest as `Table` has it."""

    T: int
    C: int
    D: int
    ahead: int
    L: int
    S: int
    m: int
    held: int
    shared: bool  # one table for all of the batch
    present: tuple[int, ...]
    starts: bool
    band: tuple[int, int] | None


def row_of(shape: Shape, b, i, n: int):
    return i if shape.shared else b * n + i


def blocks_of(ranges, row, held: int):
    """The last and the first block of P keys that a row of tiles visits."""
    start, stop, first = (ranges[3 * row + x] for x in range(3))
    top = jnp.maximum(jnp.maximum(stop - 1, first), 0) // held
    # Where only the START is seen, start is 0 and would call for every block below.
    return top, jnp.where(stop > start, start // held, top)


def kernel(words, ranges, *refs, shape: Shape, options: Options):
    *segments, q, k, v, o, lse, top, total, acc = refs
    b, i, s = pl.program_id(0), pl.program_id(3), pl.program_id(4)
    row = row_of(shape, b, i, pl.num_programs(3))
    start, stop, first = (ranges[3 * row + x] for x in range(3))
    last, bottom = blocks_of(ranges, row, shape.held)
    base = (last - s) * shape.held
    state = top, total, acc
    tile = functools.partial(_tile, shape, options, segments, (q, k, v), state, i, base)
    if START in shape.present:
        pl.when((s == 0) & (first >= 0))(lambda: tile(START, first))
    if not shape.starts:
        pl.when((s == 0) & (first < 0))(lambda: _start(*state))
    if looped := [code for code in shape.present if code != START]:
        visit = functools.partial(_visit, words, row, shape, tile, looped)
        # Blocks below the row's first one are those that the row does not need.
        high = jnp.where(last - s < bottom, 0, jnp.minimum(stop, base + shape.held))
        jax.lax.fori_loop(jnp.maximum(start, base), high, visit, None)
    pl.when(s == pl.num_programs(4) - 1)(lambda: _finish(o, lse, *state, _unit(options)))


def _visit(words, row, shape: Shape, tile, looped, j, _):
    if looped == [WHOLE]:
        return tile(WHOLE, j)
    code = tpu_tiles.code_at(words, row, shape.m, j)
    for kind in looped:
        if kind != SKIP:
            pl.when(code == kind)(functools.partial(tile, kind, j))


def _start(top, total, acc):
    top[...] = jnp.full_like(top, LOWEST)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)


def _tile(shape: Shape, options: Options, segments, qkv, state, i, base, code: int, j):
    """Lets the queries of block i see the keys of tile j, of which those from `base` are held."""
    (q, k, v), (C, D) = qkv, (shape.C, shape.D)
    pieces = [_columns(r, shape, code) for r in range(shape.T // D)]

    def keys(r):
        first, size = pieces[r]
        at = (j - base) * C + first
        if code == START and shape.band:
            at = jnp.clip(at, 0, shape.m * C - size)
        return pl.ds(pl.multiple_of(at, LANES), size)

    def scores(r):
        rows, columns = pl.ds(r * D, D), keys(r)
        s = dot(q[rows], k[columns], NT)
        place = i * shape.T + r * D + shape.S - shape.L, base * C + columns.start
        return _part(s, shape, options, segments, rows, columns, place, code)

    ready = [scores(r) for r in range(min(shape.ahead, len(pieces)))]
    for r in range(len(pieces)):
        if r + shape.ahead < len(pieces):
            ready.append(scores(r + shape.ahead))
        _add(state, pl.ds(r * D, D), ready[r], v[keys(r)], _unit(options), code == START)


def _columns(r: int, shape: Shape, code: int) -> tuple[int, int]:
    """First and number of the columns, from a tile's own on, that strip r may see."""
    D = shape.D
    if code == START and shape.band:
        before, after = shape.band
        return r * D - before, before + D + after
    if code == START:
        return 0, (r + 1) * D
    return (r * D, shape.T - r * D) if code == FAR else (0, shape.C)


def _part(s, shape: Shape, options: Options, segments, rows, columns, place, code: int):
    """Scores in units of `_unit`, capped, and UNSEEN where they are not seen."""
    if options.softcap is not None:
        s = jnp.tanh(s * (options.scale / options.softcap))
    if code == WHOLE:
        return s
    cut, end = _masked(s.shape[1], shape, options, bool(segments), code)
    row, column = place[0], place[1] + cut
    ids = (None, None)
    if segments:
        ids = segments[0][rows], segments[1][:, pl.ds(columns.start + cut, end - cut)]
    size = shape.D, end - cut
    seen = tpu_tiles.mask(column - row, column, shape.S, size, *ids, options)
    pieces = [s[:, :cut]] if cut else []
    pieces.append(jnp.where(seen, s[:, cut:end], UNSEEN))
    pieces += [s[:, end:]] if end < s.shape[1] else []
    return jnp.concatenate(pieces, 1)


def _unit(options: Options) -> float:
    """What scores are kept in units of: as their maximum is subtracted first, it costs nothing."""
    return options.scale if options.softcap is None else options.softcap


def _masked(size: int, shape: Shape, options: Options, segments: bool, code: int):
    """Which of a strip's columns [cut, end) may hold a pair that is not seen."""
    if segments or code == MASKED or shape.band:
        return 0, size
    if code == FAR:
        return 0, shape.D
    short = options.window is not None and options.window < shape.T
    return (0 if short else size - shape.D), size


def _add(state, rows, s, v, unit: float, fresh: bool):
    """Adds a strip of scores to its queries' maximum, sum of exponentials and sum of values."""
    top, total, acc = state
    peak = jnp.max(s, 1, keepdims=True)
    peak = jnp.maximum(LOWEST if fresh else top[rows], jnp.broadcast_to(peak, (s.shape[0], LANES)))
    p = jnp.exp2((s - _spread(peak, s.shape[1])) * (unit * LOG2E))
    added = jnp.broadcast_to(jnp.sum(p, 1, keepdims=True), peak.shape)
    values = dot(p.astype(v.dtype), v, NN)
    if not fresh:
        old = jnp.exp2((top[rows] - peak) * (unit * LOG2E))
        added = added + total[rows] * old
        values = values + acc[rows] * _spread(old, values.shape[1])
    top[rows], total[rows], acc[rows] = peak, added, values


def _spread(x, width: int):
    """[N 128] with all lanes alike -> [N width]."""
    return jnp.tile(x, (1, math.ceil(width / LANES)))[:, :width]


def _finish(o, lse, top, total, acc, unit: float):
    # The largest score counts 1, so a sum below 1 is that of a query that saw nothing: 0.
    part = _inverse(jnp.maximum(total[...], 1.0), o.dtype)
    o[...] = (acc[...] * _spread(part, acc.shape[1])).astype(o.dtype)
    for x in range(0, top.shape[0], LANES):
        rows = pl.ds(x, LANES)
        each = top[rows] * (unit * LOG2E) + jnp.log2(total[rows])
        lse[:, rows] = _diagonal(each) * (1 / LOG2E)


def _inverse(x, dtype):
    """1 / x, as exact as this dtype needs: one of Newton's steps makes 16 bits of 8."""
    if dtype == jnp.float32:
        return 1 / x
    guess = pltpu.reciprocal(x, approx=True)
    return guess * (2 - x * guess)


def _diagonal(x):
    """[128 128] with all lanes alike -> [1 128]: its diagonal."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, x.shape, d) for d in (0, 1))
    return jnp.sum(jnp.where(i == j, x, 0.0), 0, keepdims=True)
