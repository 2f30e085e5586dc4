"""What the Hopper kernels share: products on tensor cores, masks, the order of tiles and of work.

Products run on warpgroups' accumulators, asynchronously. The CPU interpreter of this JAX knows
neither a start of an accumulator nor a left operand in registers, so `accumulate` gives it sums of
ordinary values; everything else of a kernel is the same program in both.
"""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import get_abstract_mesh

from pallas_kernels import dispatch
from pallas_kernels.flash_attention.reference import Options

SHARED = 232448  # bytes of shared memory that a thread block can have
LOG2E = math.log2(math.e)
ROWS = 64  # queries a warpgroup's matrix instruction takes
HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")
WGMMA = plgpu.Layout.WGMMA
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # 16-bit, as wgmma reads it


def check(q, k, v):
    """Declines what the Hopper kernels cannot do.

    Raises:
      NotImplementedError: another platform or generation, a dtype or head size that has no kernel.
    """
    if dispatch.platform() != "gpu":
        raise NotImplementedError(f"The Hopper kernel does not run on a {dispatch.platform()}.")
    if not HOPPER.search(dispatch.device_kind()):
        raise NotImplementedError(
            f"The Hopper kernel needs compute capability 9.0, which a {dispatch.device_kind()} "
            f"does not have."
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"Tensor cores multiply bfloat16 or float16 at full rate, not {q.dtype}: cast q, k and "
            f"v, or use the implementation 'xla'."
        )
    if max(k.shape[3], v.shape[3]) > 256:
        raise NotImplementedError(
            f"The Hopper kernel takes head sizes up to 256, not {k.shape[3]} and {v.shape[3]}."
        )
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise NotImplementedError(f"The Hopper kernel needs tokens: q {q.shape}, k {k.shape}.")


def cores() -> int:
    """Streaming multiprocessors of the device that the program is traced for, 132 if unknown."""
    device = get_abstract_mesh().abstract_device
    return (jax.devices()[0].core_count if device is None else device.num_cores) or 132


def pad(x, D: int | None = None):
    """[B S G K] with zeros behind K, up to D or a multiple of 64, and S, up to a multiple of 8.

    Shared memory's tiles of 8 rows and 64 columns are copied whole.
    """
    rows, columns = -x.shape[1] % 8, -x.shape[3] % 64 if D is None else D - x.shape[3]
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, columns))) if rows or columns else x


def lengthen(segments, block: int):
    """[B L] with padding behind, up to whole blocks."""
    return jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % block)))


def interpreting() -> bool:
    """Whether kernels traced now are interpreted on the CPU."""
    from jax._src import config  # there is no public way to know

    return config.pallas_tpu_interpret_mode_context_manager.value is not None


class _Sum:
    """An accumulator for the interpreter: the products so far, as a value.

    Tensor cores read shared memory at any time between issue and wait. So it is read at both, for
    the race detector to see who writes before, after or between; the fence stands for reads that
    are of the asynchronous proxy, as loads by TMA are.
    """

    def __init__(self, start, queue: list):
        self.sum, self.queue = start, queue

    def add(self, a, b):
        read = lambda x: x if isinstance(x, jax.Array) else x[...]
        read(a), read(b)

        def run():
            self.sum += jnp.dot(read(a), read(b), preferred_element_type=jnp.float32)

        self.queue.append(run)

    def value(self, pending: int = 0):
        while len(self.queue) > pending:
            self.queue.pop(0)()
        plgpu.commit_smem()
        return self.sum


class _Registers:
    """An accumulator in the registers of a warpgroup."""

    def __init__(self, ref, start):
        self.ref = ref
        if start is not None:
            ref[...] = start

    def add(self, a, b):
        plgpu.wgmma(self.ref, a, b)

    def value(self, pending: int = 0):
        return plgpu.wgmma_accumulator_load(self.ref, wait_n=pending)


def accumulate(body: Callable, *starts):
    """Runs `body(*accumulators)` and returns its result.

    `x.add(a, b)` issues x += a b for a [M N'] in registers or shared memory and b [N' N] in shared
    memory, and goes on at once; `x.value(n)` waits until at most n of the products issued last
    still run, and reads x. Take the value of every accumulator before the body ends.

    Args:
      body: takes one accumulator for each start.
      starts: what an accumulator begins with: float32 [M N] in the layout WGMMA, or for zeros the
        shape (M, N).
    """
    shapes = [x if isinstance(x, tuple) else x.shape for x in starts]
    starts = [None if isinstance(x, tuple) else x for x in starts]
    if interpreting():
        queue = []
        zeros = [jnp.zeros(shape, jnp.float32) for shape in shapes]
        pairs = zip(zeros, starts, strict=True)
        return body(*(_Sum(zero if start is None else start, queue) for zero, start in pairs))

    def run(*refs):
        return body(*map(_Registers, refs, starts))

    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def mma(acc, a, b):
    """acc + a b, awaited; acc is float32 [M N] or for zeros its shape; see `accumulate`."""

    def run(x):
        x.add(a, b)
        return x.value()

    return accumulate(run, acc)


def full(shape: tuple[int, ...], value: float, layout=WGMMA):
    """A float32 constant in registers, in a layout of the accumulators."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def iota(shape: tuple[int, int], dim: int):
    """int32 0, 1, .. along one dimension, in the layout of the accumulators."""
    line = plgpu.broadcasted_iota(jnp.int32, shape[dim : dim + 1], 0, layout=WGMMA.reduce(1 - dim))
    return jax.lax.broadcast_in_dim(line, shape, [dim])


def spread(ref, shape: tuple[int, int], dim: int):
    """Shared memory's [n] along one dimension of a tile, in the layout of the accumulators."""
    line = plgpu.load(ref, layout=WGMMA.reduce(1 - dim), optimized=False)
    return jax.lax.broadcast_in_dim(line, shape, [dim])


def visible(rows, columns, S: int, q_segments, kv_segments, options: Options, start=0):
    """Whether a query sees a key, for arrays that broadcast with each other.

    Args:
      rows: positions of the queries, less start; None where neither causality nor window asks (a
        kernel must not hold an array that nothing reads: its layout could not be inferred).
      columns: positions of the keys, less start.
      S: number of keys; a later position is padding.
      q_segments, kv_segments: ids of each, kv_segments as `reference.mark` gives them; or None.
      start: where positions are counted from. With keys along the second dimension of a tile let it
        be the tile's first key, and columns its `iota`: an element then costs one comparison.
    """
    # Of an iota the first term is constant, and the compiler keeps no register for each column.
    below = lambda bound: (columns & ~7) < bound - (columns & 7)
    seen = below(jnp.minimum(rows + 1, S - start) if options.causal else S - start)
    if options.window is not None:
        near = (columns & ~7) > (rows - options.window) - (columns & 7)
        if not options.causal:
            near = near & below(rows + options.window)
        if options.first and kv_segments is None:
            near = near | below(options.first - start)
        elif options.first:
            near = near | (kv_segments < 0)
        seen = seen & near
    if q_segments is None:
        return seen
    ids = jnp.abs(kv_segments) if options.first else kv_segments
    return seen & (q_segments == ids) & (ids != 0)


def tanh(x):
    """tanh to float32's precision: with the hardware's own 11 bits a cap of 50 errs by 0.02."""
    return 1 - 2 / (1 + jnp.exp2(2 * LOG2E * x))
