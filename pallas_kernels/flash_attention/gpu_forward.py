"""The forward kernel for Hopper: one warpgroup loads, the others multiply and exponentiate.

A core takes pieces of work, blocks of queries of one head, in turn. Its first warpgroups hold 64
queries each; the last one fills a ring of key and value tiles in shared memory by TMA, ahead of
them. A warpgroup issues the scores of the next tile and the values of this one, and works out the
next tile's softmax while the tensor cores run; warpgroups issue by turns, so that one's softmax
meets another's products. Source: FlashAttention-3, arXiv 2407.08608.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import gpu_order, gpu_tiles
from pallas_kernels.flash_attention.gpu_forward_rows import Shape, multiply
from pallas_kernels.flash_attention.gpu_tiles import ROWS, SHARED, TILED
from pallas_kernels.flash_attention.reference import Options, mark

REGISTERS = {2: (32, 240), 3: (32, 160)}  # of the loading thread and the others, by warpgroups


def forward(q, k, v, q_segments, kv_segments, options: Options, config):
    """o [B L H V] in q's dtype and lse [B L H] float32; `config` as `pallas_gpu.Config`.

    Raises:
      ValueError: the configuration does not fit shared memory, or cannot share it.
    """
    (L, H), (S, G), V = q.shape[1:3], k.shape[1:3], v.shape[3]
    T, C = config.block_q, config.block_kv
    # Scores are compared before they are scaled: the scale must be positive.
    q, scale = (q, options.scale) if options.scale > 0 else (-q, -options.scale)
    q, scale = (q, scale) if scale else (0 * q, 1.0)
    options = dataclasses.replace(options, scale=scale, config=None)
    work = gpu_order.work(q, k, v, T, options)
    segments = ()
    if q_segments is not None:
        kv_segments = mark(kv_segments, options)
        lists = gpu_order.listed(T, C, L, S, q_segments, kv_segments, options)
        lengthen = gpu_tiles.lengthen
        segments = lengthen(q_segments, T), lengthen(kv_segments, C), lists
    q, k, v = map(gpu_tiles.pad, (q, k, v))
    sizes = (L, S, H // G, q.shape[3], v.shape[3], T, C)
    shape = Shape(*sizes, config.stages, config.turns, config.share, q.dtype)
    _check(shape)
    o, lse = _call(shape, options, work, bool(segments))(q, k, v, *segments)
    return o[:, :L, :, :V], jnp.swapaxes(lse[:, :, :L], 1, 2)


def _check(shape: Shape):
    if shape.share and shape.K != shape.V:
        raise ValueError(
            f"Outputs of {shape.V} columns cannot leave through queries of {shape.K}: share only "
            f"heads whose keys and values are padded to one size."
        )
    rows = shape.T * (shape.K + (0 if shape.share else shape.V))
    need = 2 * (rows + shape.stages * shape.C * (shape.K + shape.V)) + 2**13
    if need > SHARED:
        raise ValueError(
            f"{shape.stages} tiles of {shape.C} keys beside {shape.T} queries take {need} bytes of "
            f"shared memory, of which there are {SHARED}: use fewer stages or smaller tiles."
        )


def _call(shape: Shape, options: Options, work: gpu_order.Work, segments: bool):
    cores = min(gpu_tiles.cores(), work.pieces)
    rows = work.blocks * shape.T
    o = jax.ShapeDtypeStruct((work.B, -(-shape.L // 8) * 8, work.H, shape.V), shape.dtype)
    lse = jax.ShapeDtypeStruct((work.B, work.H, rows), jnp.float32)
    return plgpu.kernel(
        functools.partial(_kernel, shape, options, work, cores),
        out_type=(o, lse),
        grid=(cores,),
        grid_names=("core",),
        num_threads=shape.W + 1,
        thread_name="group",
        kernel_name="flash_attention_forward",
        scratch_types=_scratch(shape, segments),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _scratch(shape: Shape, segments: bool) -> dict:
    tile = lambda n, rows, size: plgpu.SMEM((n, rows, size), shape.dtype, transforms=TILED)
    barrier = lambda n, arrivals=1: plgpu.Barrier(num_arrivals=arrivals, num_barriers=n)
    W, stages = shape.W, shape.stages
    scratch = dict(
        q_tile=tile(W, ROWS, shape.K),
        k_tile=tile(stages, shape.C, shape.K),
        v_tile=tile(stages, shape.C, shape.V),
        lse_tile=plgpu.SMEM((W, ROWS), jnp.float32),
        q_full=barrier(W, 1 + segments),
        q_empty=barrier(W),
        k_full=barrier(stages, 1 + segments),
        k_empty=barrier(stages, W),
        v_full=barrier(stages),
        v_empty=barrier(stages, W),
    )
    if not shape.share:
        scratch["o_tile"] = tile(W, ROWS, shape.V)
    if segments:
        scratch["q_ids"] = plgpu.SMEM((W, ROWS), jnp.int32)
        scratch["k_ids"] = plgpu.SMEM((stages, shape.C), jnp.int32)
    return scratch | ({"turn": barrier(W)} if shape.turns else {})


def _kernel(shape: Shape, options: Options, work: gpu_order.Work, cores: int, *refs, **scratch):
    *inputs, o, lse = refs
    q, k, v, *segments = inputs
    core, group = lax.axis_index("core"), lax.axis_index("group")

    def place(n):
        b, h, i = work.at(n)
        if segments:
            return b, h, i, gpu_order.from_list(segments[2], b, i)
        return b, h, i, gpu_order.by_position(i, shape.T, shape.C, shape.L, shape.S, options)

    def each(body):
        """Carries a number through the pieces core, core + cores, .. of this core."""
        more = lambda carry: carry[0] < work.pieces
        step = lambda carry: (carry[0] + cores, body(*carry))
        return lax.while_loop(more, step, (core, jnp.int32(0)))[1]

    low, high = REGISTERS[shape.W]

    @pl.when(group == shape.W)
    def _():
        plgpu.set_max_registers(low, action="decrease")
        _load(shape, place, each, cores, q, k, v, segments[:2], scratch)

    @pl.when(group < shape.W)
    def _():
        plgpu.set_max_registers(high, action="increase")
        multiply(shape, options, place, each, group, o, lse, scratch)


def _load(shape: Shape, place, each, cores: int, q, k, v, segments, scratch):
    """Fills the ring, and the queries' tiles, as fast as they are emptied."""
    stages = shape.stages

    def fill(name, slot, again, source, ids=None):
        full = scratch[f"{name}_full"].at[slot]
        pl.when(again)(lambda: plgpu.barrier_wait(scratch[f"{name}_empty"].at[slot]))
        plgpu.copy_gmem_to_smem(source, scratch[f"{name}_tile"].at[slot], full)
        if ids is not None:
            plgpu.copy_gmem_to_smem(ids, scratch[f"{name}_ids"].at[slot], full)

    def piece(n, done):
        b, h, i, tiles = place(n)
        g = lax.div(h, shape.R)
        ids = [x.at[b] for x in segments] or [None, None]
        cut = lambda x, part: None if x is None else x.at[part]
        for w in range(shape.W):
            rows = pl.ds(i * shape.T + w * ROWS, ROWS)
            fill("q", w, n >= cores, q.at[b, rows, h], cut(ids[0], rows))

        def tile(t, done):
            keys = pl.ds(tiles.at(t) * shape.C, shape.C)
            slot, again = lax.rem(done, stages), done >= stages
            fill("k", slot, again, k.at[b, keys, g], cut(ids[1], keys))
            fill("v", slot, again, v.at[b, keys, g])
            return done + 1

        return lax.fori_loop(0, tiles.count, tile, done)

    done = each(piece)

    # Who waits on a barrier at all must have seen its last arrival before the kernel ends.
    @pl.loop(jnp.maximum(done - stages, 0), done)
    def _(n):
        plgpu.barrier_wait(scratch["k_empty"].at[lax.rem(n, stages)])
        plgpu.barrier_wait(scratch["v_empty"].at[lax.rem(n, stages)])

    for w in range(shape.W):
        plgpu.barrier_wait(scratch["q_empty"].at[w])
