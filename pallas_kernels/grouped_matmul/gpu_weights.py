"""Gradients of the matrices on Hopper: dw_g = x_g^T dy_g, a sum over the rows of each group.

Tiles of x and dy lie in shared memory as they do in device memory, with the rows that are summed
over first, and tensor cores read both transposed. The first and the last step of a group may hold
rows of others. Whoever loads also puts zeros there, one step late, when the tile has come while
others were asked for: warpgroups that multiply know nothing of it, and do not wait for it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import gpu_tiles
from pallas_kernels.grouped_matmul import gpu_order, gpu_ring
from pallas_kernels.grouped_matmul.gpu_cut import CONSUMERS, DEPTH, Cut


def product(x, dy, sizes, cut: Cut):
    """x [M K] transposed times dy [M N] by groups, [G K N] in x's dtype; 0 for an empty group.

    M must be a multiple of 8, K and N of 64.
    """
    (K, N), G = (x.shape[1], dy.shape[1]), sizes.shape[0]
    rows, columns = -(-K // cut.block_m), -(-N // cut.block_n)
    cores = min(gpu_tiles.cores(), G * rows * columns)
    tiles = (DEPTH, cut.rows), (DEPTH, cut.block_n)
    kernel = plgpu.kernel(
        functools.partial(_kernel, cut, cores, rows, columns),
        out_type=jax.ShapeDtypeStruct((G, K, N), x.dtype),
        grid=(cores,),
        grid_names=("core",),
        num_threads=CONSUMERS + 1,
        thread_name="group",
        kernel_name="grouped_matmul_backward_weights",
        scratch_types=gpu_ring.scratch(cut, x.dtype, *tiles, masked=True),
    )
    return kernel(gpu_order.spans(sizes, DEPTH), x, dy)


def _kernel(cut: Cut, cores: int, rows: int, columns: int, *refs, **scratch):
    spans, x, dy, dw = refs

    def entry(t):
        """Group, row and column of a tile, and what `gpu_order.spans` says of the group."""
        which = lax.div(t, rows * columns)
        row, column = gpu_order.place(t - which * (rows * columns), rows, columns, cut.panel)
        return which, row, column, *(spans[which, i] for i in range(4))

    # Rows and columns are multiplied out where they are used, so that the compiler sees of what
    # they are multiples.
    corner = lambda row, column: (row * cut.block_m, column * cut.block_n)

    def load(carry, which, row, column, block, steps, low, high):
        def step(k, carry):
            n, before = carry
            slot = gpu_ring.claim(cut, n, scratch)
            first = jnp.where(k == 0, low, 0)
            last = jnp.where(k == steps - 1, high, DEPTH)
            edge = (first > 0) | (last < DEPTH)
            at = pl.ds((block + k * (DEPTH // gpu_order.ALIGN)) * gpu_order.ALIGN, DEPTH)
            fetch = lambda name: _fetch(cut, x, dy, at, *corner(row, column), slot, name, scratch)
            pl.when(edge)(lambda: fetch("edge"))
            pl.when(~edge)(lambda: fetch("full"))
            _mask(cut, *before, scratch)
            return n + 1, (edge, slot, first, last)

        return lax.fori_loop(0, steps, step, carry)

    def multiply(group, done, which, row, column, block, steps, low, high):
        turn = lambda a: a.transpose((1, 0))
        total = gpu_ring.multiply(cut, steps, done, scratch, group, turn, lambda b: b)
        out, (row, column) = total.astype(dw.dtype), corner(row, column)
        place = dw.at[which], row + group * cut.rows, column
        give = lambda w: gpu_ring.store(cut, out, *place, scratch["out"][w])
        gpu_ring.each_group(group, give)
        return done + steps

    each = functools.partial(gpu_ring.each, dw.shape[0] * rows * columns, cores, entry)

    def load_all():
        zero = jnp.int32(0)
        done, last = each(load, (zero, (jnp.bool_(False), zero, zero, zero)))
        _mask(cut, *last, scratch)
        gpu_ring.drain(cut, done, scratch)

    gpu_ring.roles(load_all, lambda group: each(functools.partial(multiply, group), jnp.int32(0)))


def _fetch(cut: Cut, x, dy, at, row, column, slot, name: str, scratch: dict):
    """Asks for the rows `at` of x, some columns for each warpgroup, and of dy for both."""
    come = scratch[name].at[slot]
    for part in range(CONSUMERS):
        own = pl.ds(row + part * cut.rows, cut.rows)
        plgpu.copy_gmem_to_smem(x.at[at, own], scratch["a_tile"].at[slot, part], come)
    own = pl.ds(column, cut.block_n)
    plgpu.copy_gmem_to_smem(dy.at[at, own], scratch["b_tile"].at[slot], come)


def _mask(cut: Cut, edge, slot, first, last, scratch: dict):
    """Where `edge`, puts zeros into the rows outside [first, last) of a slot, and hands it on."""

    def zero(tile):
        for start in range(0, tile.shape[1], 64):
            part = tile.at[:, start : start + 64]
            x = plgpu.load(part, layout=gpu_tiles.WGMMA)
            row = gpu_tiles.iota(x.shape, 0)
            # Not a product: what is outside may be NaN.
            part[...] = jnp.where((row >= first) & (row < last), x, jnp.zeros_like(x))

    @pl.when(edge)
    def _():
        plgpu.barrier_wait(scratch["edge"].at[slot])
        for part in range(CONSUMERS):
            zero(scratch["a_tile"].at[slot, part])
        zero(scratch["b_tile"].at[slot])
        plgpu.commit_smem()
        for _ in range(CONSUMERS + 1):
            plgpu.barrier_arrive(scratch["full"].at[slot])
