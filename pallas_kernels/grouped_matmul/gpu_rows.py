"""Grouped products by rows on Hopper: y = x w_g, and dx = dy w_g^T, which reads w as it lies.

A thread block takes output tiles in turn: which rows and which group, `gpu_order.visits` says. A
tile that holds rows of other groups is multiplied whole, and only its own rows are stored; a tile
of rows of no group is a sum over nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import gpu_tiles
from pallas_kernels.grouped_matmul import gpu_order, gpu_ring
from pallas_kernels.grouped_matmul.gpu_cut import CONSUMERS, DEPTH, Cut


def product(x, w, sizes, cut: Cut, transposed: bool, name: str):
    """x [M K] times w [G K N] (transposed: [G N K]) by groups, [M N] in x's dtype.

    M must be a multiple of 8, K and N of 64.
    """
    M, G, N = x.shape[0], w.shape[0], w.shape[1 if transposed else 2]
    columns = -(-N // cut.block_n)
    cores = min(gpu_tiles.cores(), gpu_order.most(M, G, cut.block_m) * columns)
    tile = (cut.block_n, DEPTH) if transposed else (DEPTH, cut.block_n)
    kernel = plgpu.kernel(
        functools.partial(_kernel, cut, transposed, cores, columns),
        out_type=jax.ShapeDtypeStruct((M, N), x.dtype),
        grid=(cores,),
        grid_names=("core",),
        num_threads=CONSUMERS + 1,
        thread_name="group",
        kernel_name=name,
        scratch_types=gpu_ring.scratch(cut, x.dtype, (cut.rows, DEPTH), tile),
    )
    return kernel(*gpu_order.visits(sizes, M, cut.block_m), x, w)


def _kernel(cut: Cut, transposed: bool, cores: int, columns: int, *refs, **scratch):
    visits, count, x, w, y = refs
    rows = count[0]

    def entry(t):
        """What `gpu_order.visits` says of a tile, its column, and its steps."""
        v, column = gpu_order.place(t, rows, columns, cut.panel)
        visit = *_, which = [visits[v, i] for i in range(4)]
        return *visit, column, jnp.where(which == w.shape[0], 0, x.shape[1] // DEPTH)

    # Rows and columns are multiplied out where they are used, so that the compiler sees of what
    # they are multiples.
    def load(done, block, low, high, which, column, steps):
        place = w.at[which], block * gpu_order.ALIGN, column * cut.block_n
        fetch = functools.partial(_fetch, cut, transposed, x, *place, done, scratch)
        pl.loop(0, steps)(fetch)
        return done + steps

    def multiply(group, done, block, low, high, which, column, steps):
        turn = lambda b: b.transpose((1, 0)) if transposed else b
        total = gpu_ring.multiply(cut, steps, done, scratch, group, lambda a: a, turn)
        low, high = (jnp.clip(n - group * cut.rows, 0, cut.rows) for n in (low, high))
        row = block * gpu_order.ALIGN + group * cut.rows
        place = y, row, column * cut.block_n, low, high
        _store(cut, total.astype(y.dtype), *place, group, scratch["out"])
        return done + steps

    each = functools.partial(gpu_ring.each, rows * columns, cores, entry)
    gpu_ring.roles(
        lambda: gpu_ring.drain(cut, each(load, jnp.int32(0)), scratch),
        lambda group: each(functools.partial(multiply, group), jnp.int32(0)),
    )


def _fetch(cut: Cut, transposed: bool, x, w, row, column, done, scratch: dict, k):
    """Asks for step k of a tile: [rows DEPTH] of x for each warpgroup, and of w for both."""
    slot, depth = gpu_ring.claim(cut, done + k, scratch), pl.ds(k * DEPTH, DEPTH)
    full = scratch["full"].at[slot]
    for part in range(CONSUMERS):
        own = pl.ds(row + part * cut.rows, cut.rows)
        plgpu.copy_gmem_to_smem(x.at[own, depth], scratch["a_tile"].at[slot, part], full)
    own = pl.ds(column, cut.block_n)
    matrix = w.at[own, depth] if transposed else w.at[depth, own]
    plgpu.copy_gmem_to_smem(matrix, scratch["b_tile"].at[slot], full)


def _store(cut: Cut, out, y, row, column, low, high, group, unions):
    """Writes rows [low, high) of a warpgroup's part of a tile."""
    whole = (low == 0) & (high == cut.rows)

    def give(w):
        every = lambda: gpu_ring.store(cut, out, y, row, column, unions[w])
        some = lambda: gpu_ring.store_some(cut, out, y, row, column, low, high, unions[w])
        pl.when(whole)(every)
        pl.when(~whole & (low < high))(some)

    gpu_ring.each_group(group, give)
