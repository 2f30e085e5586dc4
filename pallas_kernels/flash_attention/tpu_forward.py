"""Attention's forward pass on a TensorCore.

A step of the grid holds T queries of a head and up to P keys of its key head in VMEM and runs over
tiles of C keys. A tile is worked off in strips of D queries, whose products and softmax the
compiler interleaves. The causal diagonal comes first and starts the sums; of it and of a window's
far end only the D-wide pieces that hold a visible pair are computed, and of a short window only a
band around the diagonal.

Source: FlashAttention-2, arXiv 2307.08691, Algorithm 1.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention import tpu_tiles
from pallas_kernels.flash_attention.reference import Options, mark
from pallas_kernels.flash_attention.tpu_forward_kernel import Shape, blocks_of, kernel, row_of
from pallas_kernels.flash_attention.tpu_tiles import LANES, SKIP, START

NAME = "flash_attention_forward"


def forward(q, k, v, q_segments, kv_segments, options: Options, config):
    """o [B L H V] in q's dtype and lse [B L H] float32; `config` as `pallas_tpu.Config`."""
    (B, L, H, _), (S, G, _) = q.shape, v.shape[1:]
    T, C = config.T, config.C
    # A maximum is taken before the scale: that must be positive.
    scale = abs(options.scale) or 1.0
    q = q if options.scale > 0 else -q if options.scale else 0 * q
    options = dataclasses.replace(options, scale=scale, config=None)
    kv_segments = mark(kv_segments, options)
    table = tpu_tiles.table(T, C, config.P, L, S, q_segments, kv_segments, options)
    m = table.codes.shape[2]
    segments = () if q_segments is None else _segments(q_segments, kv_segments, m * C)
    # XLA's projections can write [B H L K] as they are; [B L H K] would be copied.
    q, k, v = (x.swapaxes(1, 2) for x in (q, _pad_keys(k, m * C), _pad_keys(v, m * C)))
    shape = Shape(
        *(T, C, config.D, config.ahead, L, S, m),
        held=min(config.P // C, m),
        shared=table.codes.shape[0] == 1,
        present=table.present,
        starts=table.starts,
        band=table.band,
    )
    # Small arrays might else be placed in VMEM whole, and the vector unit move their blocks.
    q, k, v = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (q, k, v))
    scalars = tpu_tiles.pack(table.codes), table.ranges.reshape(-1)
    tpu_tiles.check_scalars(sum(4 * x.size for x in scalars))
    o, lse = _call(shape, options, (B, H, G), q, k, v, segments)(*scalars, *segments, q, k, v)
    return o.swapaxes(1, 2), lse[:, :, 0, :L].swapaxes(1, 2)


def executions(q, k, v, q_segments, kv_segments, options: Options, config) -> list[float]:
    """Runs of the program's heavy pieces in one call, in its order; segments in numpy."""
    (B, L, H, _), (S, _, V) = q.shape, v.shape[1:]
    table = tpu_tiles.table(config.T, config.C, config.P, L, S, q_segments, kv_segments, options)
    heads = H * (B if table.codes.shape[0] == 1 else 1)
    count = lambda code: float(heads * (table.codes == code).sum())
    rows = B * H * table.codes.shape[1]
    runs = [count(START)] * (START in table.present)
    # Setting the sums to 0 is stores and nothing else: a short piece is a light one.
    stores = config.T // 8 * (2 + math.ceil(V / LANES))
    if not table.starts and stores >= 64 * (1 + (pltpu.get_tpu_info().mxu_column_size > LANES)):
        runs.append(rows - count(START))
    runs += [count(code) for code in table.present if code not in (START, SKIP)]
    return [*runs, float(rows)]


def _call(shape: Shape, options: Options, heads, q, k, v, segments):
    (B, H, G), n = heads, math.ceil(shape.L / shape.T)
    K, V = q.shape[3], v.shape[3]
    grid = B, G, H // G, n, math.ceil(shape.m / shape.held)
    pairs, size = B * H * shape.L * shape.S, q.dtype.itemsize
    return pl.pallas_call(
        functools.partial(kernel, shape=shape, options=options),
        grid_spec=_grid(shape, grid, K, V, bool(segments)),
        out_shape=(
            pltpu.HBM((B, H, shape.L, V), q.dtype),
            pltpu.HBM((B, H, 1, n * shape.T), jnp.float32),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=pltpu.get_tpu_info().vmem_capacity_bytes * 7 // 8,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (K + V),
            transcendentals=pairs,
            bytes_accessed=(2 * q.size + k.size + v.size) * size,
        ),
        name=NAME,
    )


def _pad_keys(x, size: int):
    S = x.shape[1]
    return jnp.pad(x, ((0, 0), (0, size - S), (0, 0), (0, 0))) if size > S else x


def _segments(q_segments, kv_segments, size: int):
    """Queries' segments as a column [B L 128], every lane alike, and keys' as a row [B 1 S]."""
    ids = jnp.where(q_segments == 0, tpu_tiles.NOBODY, q_segments)
    column = jnp.broadcast_to(ids[:, :, None], (*ids.shape, LANES))
    return column, jnp.pad(kv_segments, ((0, 0), (0, size - kv_segments.shape[1])))[:, None]


def _grid(shape: Shape, grid, K: int, V: int, segments: bool):
    """Blocks of the operands on the grid (batch, key heads, their queries, T queries, P keys)."""
    T, P, R = shape.T, shape.held * shape.C, grid[2]

    def held(b, i, s, ranges):
        top, bottom = blocks_of(ranges, row_of(shape, b, i, grid[3]), shape.held)
        return jnp.maximum(top - s, bottom)

    query = lambda b, g, r, i, s, *_: (b, g * R + r, i, 0)
    key = lambda b, g, r, i, s, _, ranges: (b, g, held(b, i, s, ranges), 0)
    specs = [
        pl.BlockSpec((None, None, T, K), query),
        pl.BlockSpec((None, None, P, K), key),
        pl.BlockSpec((None, None, P, V), key),
    ]
    if segments:
        column = pl.BlockSpec((None, T, LANES), lambda b, g, r, i, s, *_: (b, i, 0))
        at = lambda b, g, r, i, s, _, ranges: (b, 0, held(b, i, s, ranges))
        specs = [column, pl.BlockSpec((None, 1, P), at), *specs]
    lse = pl.BlockSpec((None, None, 1, T), lambda b, g, r, i, s, *_: (b, g * R + r, 0, i))
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=grid,
        in_specs=specs,
        out_specs=(pl.BlockSpec((None, None, T, V), query), lse),
        scratch_shapes=[pltpu.VMEM((T, width), jnp.float32) for width in (LANES, LANES, V)],
    )
