"""Gradients of attention on Hopper: keys stay on a multiprocessor, queries pass by.

A thread block holds one tile of keys and values. A producer warpgroup streams tiles of queries,
with do, lse and delta, through a ring in shared memory; two consumer warpgroups work out scores and
gradients again, keep dk and dv in registers, and add every tile's part of dq to device memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import blocks
from pallas_kernels.flash_attention import gpu_tiles as tiles
from pallas_kernels.flash_attention.gpu_backward_columns import ByColumns
from pallas_kernels.flash_attention.gpu_backward_keys import ByKeys
from pallas_kernels.flash_attention.gpu_backward_tile import CONSUMERS, ROWS, Plan, Tile
from pallas_kernels.flash_attention.reference import Options, mark, row_terms

# Of each head size the (block_q, block_kv) whose accumulators fit in registers.
TILES = {64: ((128, 128),), 128: ((64, 128), (64, 64)), 256: ((64, 64),)}


@dataclasses.dataclass(frozen=True)
class Backward:
    """How the gradients' kernel is cut; None leaves a size to the heads' size.

    Attributes:
      block_q, block_kv: queries a step and keys a thread block, of TILES. With 128 keys each
        consumer has 64 of them, with 64 keys one half of the columns of dk and dv.
      stages: tiles of queries in shared memory at once.
      deterministic: whether every tile of keys writes its part of dq for itself, ceil(S / block_kv)
        times dq's size in float32, and they are summed afterwards. Else parts are added in the
        order in which they come, which changes the last bits from run to run.
    """

    block_q: int | None = None
    block_kv: int | None = None
    stages: int | None = None
    deterministic: bool = False


def heuristic(K: int, V: int) -> Backward:
    """What fits registers and shared memory for keys of size K and values of size V."""
    D = head_size(K, V)
    return Backward(*TILES[D][0], stages=1 if D == 256 else 2)


def head_size(K: int, V: int) -> int:
    """What heads are padded to: 64, 128 or 256."""
    return next(size for size in (64, 128, 256) if max(K, V) <= size)


def backward(
    q, k, v, q_segments, kv_segments, o, lse, do, dlse, options: Options, config: Backward
):
    """Gradients of q, k and v, in their dtype.

    Args:
      q, k, v, o, do: [B L H K], [B S G K], [B S G V], [B L H V], [B L H V].
      q_segments, kv_segments: [B L], [B S] or None.
      lse, dlse: [B L H] float32; dlse is 0 where lse is -inf.

    Returns:
      dq [B L H K], dk [B S G K], dv [B S G V].

    Raises:
      ValueError: a configuration that these head sizes or shared memory do not allow.

    Source: FlashAttention-3, arXiv 2407.08608, whose order of products this follows.
    """
    (B, L, H, K), (S, G, V) = q.shape, v.shape[1:]
    D = head_size(K, V)
    config = _fill(config, D)
    T, C = config.block_q, config.block_kv
    kv_segments = mark(kv_segments, options)
    kinds = blocks.kinds(T, C, L, S, q_segments, kv_segments, options)
    partial = not isinstance(kinds, np.ndarray) or bool((kinds == blocks.SOME).any())
    adds = not (config.deterministic or tiles.interpreting())
    inputs = {n: tiles.pad(x, D) for n, x in (("q", q), ("k", k), ("v", v), ("do", do))}
    rows = -(-L // T) * T
    inputs |= dict(rows=_rows(o, lse, do, dlse, rows), numbers=np.arange(ROWS, dtype=np.int32))
    inputs |= dict(zip(("order", "counts"), visits(kinds), strict=True))
    if q_segments is not None:
        inputs |= dict(
            q_segments=tiles.lengthen(q_segments, T), kv_segments=tiles.lengthen(kv_segments, C)
        )
    # A sum in device memory must start from zeros, hence a reference and not an output.
    dq = jax.new_ref(jnp.zeros((1 if adds else -(-S // C), B, H, rows, D), jnp.float32))
    sizes, has = (B, L, H, S, G, D, T, C), (q_segments is not None, options.softcap is not None)
    plan = Plan(*sizes, config.stages, adds, partial, *has)
    dk, dv = _kernel(plan, tuple(inputs), q.dtype, options)(*inputs.values(), dq)
    dq = dq[...].sum(0)[:, :, :L, :K] * options.scale
    return dq.swapaxes(1, 2).astype(q.dtype), dk[:, :S, :, :K], dv[:, :S, :, :V]


def visits(kinds):
    """The tiles of queries that each tile of keys visits.

    Args:
      kinds: [B nT nC] of `blocks.kinds`.

    Returns:
      order int32 [B nC nT]: 4 i + kind for the tiles i of queries that see something, then others;
      counts int32 [B nC]: how many see something.
    """
    xp = np if isinstance(kinds, np.ndarray) else jnp
    kinds = kinds.swapaxes(1, 2)
    order, counts = blocks.in_front(kinds != blocks.NONE)
    order = 4 * order + xp.take_along_axis(kinds, order, 2)
    return order.astype(np.int32), counts


def _fill(config: Backward, D: int) -> Backward:
    guess = heuristic(D, D)
    missing = {n: x for n, x in vars(guess).items() if getattr(config, n) is None}
    config = dataclasses.replace(config, **missing)
    if (config.block_q, config.block_kv) not in TILES[D] or config.stages < 1:
        raise ValueError(
            f"Gradients of heads of {D} take block_q and block_kv of {TILES[D]} and at least one "
            f"stage, not {config}."
        )
    return config


def _form(plan: Plan, dtype) -> type[Tile]:
    form = ByKeys if plan.C == 128 else ByColumns
    size = form.shared(plan, dtype)
    if size > tiles.SHARED:
        raise ValueError(
            f"The gradients' kernel needs {size} bytes of shared memory with {plan.stages} stages, "
            f"but a thread block has {tiles.SHARED}: take fewer."
        )
    return form


def _rows(o, lse, do, dlse, rows: int):
    """lse in powers of two and delta, float32 [B H 2 rows]; exp2(s - lse) is 0 in the padding."""
    lse, delta = row_terms(o, lse, do, dlse)
    width = (0, 0), (0, rows - lse.shape[1]), (0, 0)
    both = jnp.pad(lse * tiles.LOG2E, width, constant_values=jnp.inf), jnp.pad(delta, width)
    return jnp.stack(both).transpose(1, 3, 0, 2)


def _kernel(plan: Plan, inputs: tuple[str, ...], dtype, options: Options):
    form = _form(plan, dtype)
    names = (*inputs, "dq", "dk", "dv")

    def body(*refs, **scratch):
        tile = form(plan, options, **dict(zip(names, refs, strict=True)), **scratch)
        wg = lax.axis_index("wg")
        pl.when(wg == CONSUMERS)(tile.produce)
        pl.when(wg < CONSUMERS)(tile.consume)

    like = jax.ShapeDtypeStruct((plan.B, -(-plan.S // 8) * 8, plan.G, plan.D), dtype)
    return plgpu.kernel(
        body,
        out_type=[like, like],
        scratch_types=form.scratch(plan, dtype),
        grid=(plan.B, plan.G, -(-plan.S // plan.C)),
        grid_names=("batch", "head", "tile"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="flash_attention_backward",
    )
