"""What the Hopper kernels of grouped products share: a ring of tiles, a sum over it, the way out.

One warpgroup fills the ring by TMA, ahead of two that multiply. A step of the sum is issued while
the one before still runs, and only then is the tile before given back.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import gpu_tiles
from pallas_kernels.grouped_matmul.gpu_cut import CONSUMERS, Cut

LOADER, MULTIPLIER = 40, 232  # registers of a thread


def scratch(cut: Cut, dtype, a: tuple[int, int], b: tuple[int, int], masked: bool = False) -> dict:
    """Shared memory for tiles a, of each warpgroup, and b, of both, and for what leaves.

    masked: whether the loading warpgroup looks at tiles before it hands them on.
    """
    tile = lambda *shape: plgpu.SMEM(shape, dtype, transforms=gpu_tiles.TILED)
    barrier = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=cut.stages)
    plain = plgpu.SMEM((cut.rows, cut.pieces * 64), dtype)
    made = dict(
        a_tile=tile(cut.stages, CONSUMERS, *a),
        b_tile=tile(cut.stages, *b),
        full=barrier(CONSUMERS + 1),
        empty=barrier(CONSUMERS),
        # Not one for both warpgroups: each may use another form of its own.
        out=[plgpu.RefUnion(tile(cut.pieces, cut.rows, 64), plain) for _ in range(CONSUMERS)],
    )
    return made | (dict(edge=barrier(CONSUMERS + 1)) if masked else {})


def multiply(cut: Cut, steps, done, scratch: dict, group, a_of, b_of):
    """The sum over the next `steps` tiles of the ring, float32 [rows block_n].

    Args:
      done: steps that were before.
      a_of, b_of: of tiles in shared memory, make [rows DEPTH] and [DEPTH block_n].
    """
    slot = lambda k: lax.rem(done + k, cut.stages)
    free = lambda k: plgpu.barrier_arrive(scratch["empty"].at[slot(k)])

    def operands(k):
        a, b = scratch["a_tile"].at[slot(k), group], scratch["b_tile"].at[slot(k)]
        return a_of(a), b_of(b)

    def body(sums):
        def step(k, state):
            plgpu.barrier_wait(scratch["full"].at[slot(k)])
            state = sums.finish(k - 1, 1, sums.issue(k, state))
            pl.when(k > 0)(lambda: free(k - 1))
            return state

        state = lax.fori_loop(0, steps, step, sums.start)
        state = sums.finish(steps - 1, 0, state)
        pl.when(steps > 0)(lambda: free(steps - 1))
        return sums.value(state)

    shape = cut.rows, cut.block_n
    if gpu_tiles.interpreting():
        return body(_Values(shape, operands))
    run = lambda acc: body(_Registers(acc, operands))
    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


class _Registers:
    """A sum in the registers of a warpgroup, to which tensor cores add."""

    start = None

    def __init__(self, acc, operands):
        self.acc, self.operands = acc, operands

    def issue(self, k, state):
        plgpu.wgmma(self.acc, *self.operands(k))

    def finish(self, k, pending: int, state):
        """Waits until at most `pending` products still run, and so for that of step k."""
        plgpu.wgmma_wait(pending)

    def value(self, state):
        return self.acc[...]


class _Values:
    """The same for the interpreter, whose race detector does not see what tensor cores read.

    They read at any time between issue and wait, so tiles are read at both; the fence stands for
    reads that are of the asynchronous proxy.
    """

    def __init__(self, shape: tuple[int, int], operands):
        self.start, self.operands = jnp.zeros(shape, jnp.float32), operands

    def read(self, k):
        return [x if isinstance(x, jax.Array) else x[...] for x in self.operands(k)]

    def issue(self, k, total):
        self.read(k)
        return total

    def finish(self, k, pending: int, total):
        def add(total):
            total += jnp.dot(*self.read(k), preferred_element_type=jnp.float32)
            plgpu.commit_smem()
            return total

        return lax.cond(k >= 0, add, lambda total: total, total)

    def value(self, total):
        return total


def each(tiles, cores: int, entry, body, carry):
    """carry = body(carry, *entry(t)) for the tiles t = core, core + cores, .. below `tiles`."""

    def step(state):
        t, carry, here = state
        # The next entry comes from device memory while this tile is worked on.
        following = entry(jnp.minimum(t + cores, tiles - 1))
        return t + cores, body(carry, *here), following

    core = lax.axis_index("core")
    start = core, carry, entry(jnp.minimum(core, tiles - 1))
    return lax.while_loop(lambda state: state[0] < tiles, step, start)[1]


def roles(load, multiply):
    """Runs load() in the last warpgroup and multiply(group) in the others."""
    group = lax.axis_index("group")

    @pl.when(group == CONSUMERS)
    def _():
        plgpu.set_max_registers(LOADER, action="decrease")
        load()

    @pl.when(group < CONSUMERS)
    def _():
        plgpu.set_max_registers(MULTIPLIER, action="increase")
        multiply(group)
        plgpu.wait_smem_to_gmem(0)


def claim(cut: Cut, n, scratch: dict):
    """The slot of the ring for step n of all, once it is empty."""
    slot = lax.rem(n, cut.stages)
    pl.when(n >= cut.stages)(lambda: plgpu.barrier_wait(scratch["empty"].at[slot]))
    return slot


def drain(cut: Cut, done, scratch: dict):
    """Sees the last arrivals: who waits on a barrier must, before the kernel ends."""

    @pl.loop(jnp.maximum(done - cut.stages, 0), done)
    def _(n):
        plgpu.barrier_wait(scratch["empty"].at[lax.rem(n, cut.stages)])


def each_group(group, body):
    """body(w) in warpgroup w, with w a number: what a union of references holds is told apart."""
    for w in range(CONSUMERS):
        pl.when(group == w)(lambda w=w: body(w))


def store(cut: Cut, out, target, row, column, union):
    """Writes out [rows block_n] to target at (row, column), row a multiple of 8; does not wait."""
    pieces = union[0]
    for piece in range(cut.block_n // 64):
        tile = pieces.at[piece % cut.pieces]
        # All but so many pieces have left, so the one that was here too.
        plgpu.wait_smem_to_gmem(cut.pieces - 1, wait_read_only=True)
        tile[...] = out[:, piece * 64 : piece * 64 + 64]
        plgpu.commit_smem()
        columns = pl.ds(column + piece * 64, 64)
        plgpu.copy_smem_to_gmem(tile, target.at[pl.ds(row, cut.rows), columns])


def store_some(cut: Cut, out, target, row, column, low, high, union):
    """Writes rows [low, high) of out, fewer than all, to the same place; waits.

    The number of rows is a sum of powers of two, each of which is one copy or none.
    """
    tile, width = union[1], cut.pieces * 64
    for start in range(0, cut.block_n, width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tile[...] = out[:, start : start + width]
        plgpu.commit_smem()
        first = low
        for size in (2**i for i in reversed(range(int(math.log2(cut.rows))))):
            some = ((high - low) & size) != 0

            @pl.when(some)
            def _(first=first, size=size, start=start):
                at = pl.ds(row + first, size), pl.ds(column + start, width)
                plgpu.copy_smem_to_gmem(tile.at[pl.ds(first, size)], target.at[at])

            first = first + jnp.where(some, size, 0)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
