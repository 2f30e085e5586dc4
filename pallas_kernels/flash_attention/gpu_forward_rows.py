"""What a warpgroup of the forward kernel does with its 64 queries.

The scores of tile t and the values of tile t - 1 are issued together; softmax of tile t runs while
tensor cores still weigh values. Sums and maxima stay in registers, and so do the weights p, which
are the left operand of the next product.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import gpu_tiles
from pallas_kernels.flash_attention.gpu_tiles import LOG2E, ROWS, WGMMA
from pallas_kernels.flash_attention.reference import Options

FLOOR = -1e30  # below any scaled score: a row that saw nothing yet has this maximum


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call; T queries and C keys a tile, W warpgroups that multiply."""

    L: int
    S: int
    R: int
    K: int
    V: int
    T: int
    C: int
    stages: int
    turns: bool
    share: bool
    dtype: jnp.dtype

    @property
    def W(self) -> int:
        return self.T // ROWS


def multiply(shape: Shape, options: Options, place, each, me, o, lse, scratch):
    """One warpgroup's rows of every piece."""
    if shape.turns:
        last = me == shape.W - 1
        pl.when(last)(lambda: plgpu.barrier_arrive(scratch["turn"].at[0]))

    def piece(n, done):
        group = lax.optimization_barrier(me)
        _, _, i, tiles = place(n)
        row = i * shape.T + group * ROWS
        slot = lambda t: lax.rem(done + t, shape.stages)
        # What is worked out once more here and below leaves its registers to the loops.
        start = lambda t: place(lax.optimization_barrier(n))[3].at(t) * shape.C
        mask = _mask(shape, options, start, row, group, slot, scratch)
        plgpu.barrier_wait(scratch["q_full"].at[group])
        acc, m, total = _rows(shape, options, tiles, mask, slot, group, scratch)
        n, group = lax.optimization_barrier((n, me))
        b, h, i, _ = place(n)
        row = i * shape.T + group * ROWS
        _store(shape, acc, m, total, o.at[b, :, h], lse.at[b, h], row, group, scratch)
        return done + tiles.count

    each(piece)
    plgpu.wait_smem_to_gmem(0)
    if shape.turns:
        pl.when(me == 0)(lambda: plgpu.barrier_wait(scratch["turn"].at[0]))


def _rows(shape: Shape, options: Options, tiles, mask, slot, group, scratch):
    """Unnormalised values [64 V], maxima and sums [64] of 64 rows over their tiles."""
    q, k, v = (scratch[f"{name}_tile"] for name in "qkv")
    scores = (ROWS, shape.C)

    def wait(name, t):
        plgpu.barrier_wait(scratch[f"{name}_full"].at[slot(t)])

    def wait_next(name, t):
        pl.when(t + 1 < tiles.count)(lambda: wait(name, t + 1))

    def free(name, t):
        plgpu.barrier_arrive(scratch[f"{name}_empty"].at[slot(t)])

    def step(masked, t, carry):
        acc, p, m, total = carry
        _take_turn(shape, group, scratch)

        def products(s, acc):
            # So many descriptors of wide queries, known before the loop, would crowd the registers.
            mine = lax.optimization_barrier(group) if shape.K > 128 else group
            s.add(q.at[mine], k.at[slot(t)].transpose((1, 0)))
            wait("v", t - 1)
            acc.add(p, v.at[slot(t - 1)])
            _pass_turn(shape, group, scratch)
            seen = mask(t) if masked else None
            scores = s.value(1)
            free("k", t)
            # Without the barriers and a wait in between, compilers work all this out after the
            # values, or make the next left operand before: tensor cores would wait for it.
            softmax = _softmax(scores, seen, m, total, options)
            p_next, *rows, decay = lax.optimization_barrier(softmax)
            wait_next("k", t)
            out, p_next = lax.optimization_barrier((acc.value(), p_next))
            free("v", t - 1)
            out = out * lax.broadcast_in_dim(decay, out.shape, [0])
            return out, p_next.astype(shape.dtype), *rows

        return gpu_tiles.accumulate(products, scores, acc)

    wait("k", 0)
    s = gpu_tiles.mma(scores, q.at[group], k.at[slot(0)].transpose((1, 0)))
    seen = mask and mask(0)
    free("k", 0)
    column = WGMMA.reduce(1)
    m, total = gpu_tiles.full((ROWS,), FLOOR, column), gpu_tiles.full((ROWS,), 0.0, column)
    p, m, total, _ = _softmax(s, seen, m, total, options)
    wait_next("k", 0)
    carry = gpu_tiles.full((ROWS, shape.V), 0.0), p.astype(shape.dtype), m, total
    first = 1
    if mask:
        carry = lax.fori_loop(1, tiles.masked, functools.partial(step, True), carry)
        first = jnp.maximum(tiles.masked, 1)
    carry = lax.fori_loop(first, tiles.count, functools.partial(step, False), carry)
    acc, p, m, total = carry
    if not shape.share:
        plgpu.barrier_arrive(scratch["q_empty"].at[group])
    wait("v", tiles.count - 1)
    acc = gpu_tiles.mma(acc, p, v.at[slot(tiles.count - 1)])
    free("v", tiles.count - 1)
    return acc, m, total


def _take_turn(shape: Shape, group, scratch):
    if shape.turns:
        plgpu.barrier_wait(scratch["turn"].at[group])


def _pass_turn(shape: Shape, group, scratch):
    if shape.turns:
        plgpu.barrier_arrive(scratch["turn"].at[lax.rem(group + 1, shape.W)])


def _softmax(s, seen, m, total, options: Options):
    """Adds scores s [64 C] to rows with maximum m, in units of log2, and sum total.

    Returns:
      p = exp2(s - new maximum) [64 C], the maximum, the sum, and the factor of what came before.
    """
    factor, offset = options.scale * LOG2E, 0.0
    if options.softcap is not None:
        # tanh x = 1 - 2 / (1 + exp 2x), to float32's precision; the hardware's own has 11 bits.
        s = 1 / (-1 - jnp.exp2(s * (2 * LOG2E * options.scale / options.softcap)))
        factor, offset = 2 * options.softcap * LOG2E, options.softcap * LOG2E
    if seen is not None:
        s = jnp.where(seen, s, -jnp.inf)
    peak = jnp.maximum(m, jnp.max(s, axis=1) * factor + offset)
    p = jnp.exp2(s * factor - lax.broadcast_in_dim(peak - offset, s.shape, [0]))
    decay = jnp.exp2(m - peak)
    return p, peak, total * decay + jnp.sum(p, axis=1), decay


def _mask(shape: Shape, options: Options, start_of, row, group, slot, scratch):
    """t -> what rows [row, row + 64) see of the keys of tile t, bool [64 C]; None for all."""
    size, segments = (ROWS, shape.C), "k_ids" in scratch
    if not (options.causal or options.window or segments or shape.S % shape.C):
        return None

    def mask(t):
        # Were its range known, compilers would join the two parts of a column that `visible` tells
        # apart, and keep every column in a register through all loops.
        start = lax.optimization_barrier(start_of(t))
        columns, rows = gpu_tiles.iota(size, 1), None
        if options.causal or options.window is not None:
            rows = gpu_tiles.iota(size, 0) + (row + shape.S - shape.L - start)
        ids = (None, None)
        if segments:
            ids = gpu_tiles.spread(scratch["q_ids"].at[group], size, 0)
            ids = ids, gpu_tiles.spread(scratch["k_ids"].at[slot(t)], size, 1)
            plgpu.commit_smem()  # these are read before TMA, another proxy, writes the next
        return gpu_tiles.visible(rows, columns, shape.S, *ids, options, start)

    return mask


def _store(shape: Shape, acc, m, total, o, lse, row, group, scratch):
    """Writes the normalised rows, and frees the queries' tile where it holds them on their way."""
    tile = scratch["q_tile" if shape.share else "o_tile"].at[group]
    lse_tile = scratch["lse_tile"].at[group]
    factor = 1 / jnp.where(total > 0, total, 1.0)
    if not shape.share:  # then the last piece's rows have left already
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out = (acc * lax.broadcast_in_dim(factor, acc.shape, [0])).astype(shape.dtype)
    for part in range(0, shape.V, 64):
        tile[:, part : part + 64] = out[:, part : part + 64]
    lse_tile[...] = m * math.log(2) + jnp.log(total)
    plgpu.commit_smem()
    rows = pl.ds(row, ROWS)
    plgpu.copy_smem_to_gmem(tile, o.at[rows])
    plgpu.copy_smem_to_gmem(lse_tile, lse.at[rows])
    if shape.share:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(scratch["q_empty"].at[group])
