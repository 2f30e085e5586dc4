"""What one thread block of the gradients' kernel does, however its consumers share the work."""

import dataclasses
import math
import types

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import blocks
from pallas_kernels.flash_attention import gpu_tiles as tiles
from pallas_kernels.flash_attention.gpu_tiles import LOG2E
from pallas_kernels.flash_attention.reference import Options

CONSUMERS = 2
KEYS = 64  # rows of one matrix instruction
ROWS = 64  # queries whose scores are in registers at once
FAR = 2**30  # beyond every position
UNSEEN = -1e15  # its exponential is 0, its square finite
FLOAT32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes: as in `backward`, D for padded heads, T queries and C keys a tile, and the ring's.

    adds: whether parts of dq are added up in device memory. partial: whether some tile needs a
    mask. segments, capped: whether there are segments, a soft cap.
    """

    B: int
    L: int
    H: int
    S: int
    G: int
    D: int
    T: int
    C: int
    stages: int
    adds: bool
    partial: bool
    segments: bool
    capped: bool


class Tile(types.SimpleNamespace):
    """The references of a kernel by name, and where this thread block and warpgroup are.

    A form lays k, v and queries out as [.. 64 or T, columns] buffers behind leading dimensions, so
    that what a warpgroup needs is found by an index: the interpreter knows no moving windows.
    """

    pieces = 1  # in which the columns of q and do lie

    def __init__(self, plan: Plan, options: Options, **refs):
        super().__init__(plan=plan, options=options, **refs)
        self.batch, self.head = lax.axis_index("batch"), lax.axis_index("head")
        self.tile, self.wg = lax.axis_index("tile"), lax.axis_index("wg")
        self.list = self.batch if self.order.shape[0] > 1 else 0
        self.count = self.counts[self.list, self.tile]
        self.steps = self.count * (plan.H // plan.G)

    @classmethod
    def scratch(cls, plan: Plan, dtype) -> dict:
        """Shared memory and barriers that all forms have."""
        T, stages, columns = plan.T, plan.stages, plan.D // cls.pieces
        ring = plgpu.SMEM((stages, cls.pieces, T, columns), dtype, transforms=tiles.TILED)
        free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
        made = dict(q_smem=ring, do_smem=ring, q_free=free, do_free=free)
        made["rows_smem"] = plgpu.SMEM((stages, 2, T), jnp.float32)
        # Numbers 0 to 63, then segments of the keys, then those of the queries in the ring.
        lines = 1 + plan.segments * (plan.C // KEYS + stages * T // ROWS)
        made["integers"] = plgpu.SMEM((lines, ROWS), jnp.int32)
        q_copies = cls.pieces + 1 + plan.segments * (T // ROWS)
        made["q_ready"] = plgpu.Barrier(num_arrivals=q_copies, num_barriers=stages)
        made["do_ready"] = plgpu.Barrier(num_arrivals=cls.pieces, num_barriers=stages)
        made["done"] = plgpu.Barrier(num_arrivals=CONSUMERS)
        return made

    @classmethod
    def shared(cls, plan: Plan, dtype) -> int:
        """Bytes of shared memory: buffers begin at multiples of 1024; barriers need less."""
        made = cls.scratch(plan, dtype).values()
        buffers = [x for x in made if not isinstance(x, plgpu.Barrier)]
        sizes = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in buffers)
        return sum(-(-size // 1024) * 1024 for size in sizes) + 1023

    @staticmethod
    def keys_ready(plan: Plan, k_smem, v_smem):
        """The barrier of what is loaded once: keys, values, their segments, row numbers."""
        copies = sum(math.prod(x.shape[:2]) for x in (k_smem, v_smem))
        return plgpu.Barrier(num_arrivals=copies + 1 + plan.segments * (plan.C // KEYS))

    def entry(self, n):
        """Query head of step n, and its tile of queries with what they see."""
        if self.plan.H == self.plan.G:
            return self.head, self.order[self.list, self.tile, n]
        count = jnp.maximum(self.count, 1)
        head = self.head * (self.plan.H // self.plan.G) + lax.div(n, count)
        return head, self.order[self.list, self.tile, lax.rem(n, count)]

    def place(self, n, head, entry):
        """Where step n is: slot of the ring, parity, query head, first query, what is seen."""
        plan = self.plan
        # Not known to the compiler to be 0, since no entry is negative: it keeps the addresses and
        # descriptors of a loop in registers unless they seem to change.
        zero = entry >> 31
        return types.SimpleNamespace(
            zero=zero,
            slot=lax.rem(n, jnp.int32(plan.stages)) + zero,
            parity=lax.rem(n, jnp.int32(2)),
            head=head,
            row=(entry >> 2) * plan.T,
            kind=entry & 3,
            wg=self.wg + zero,
        )

    def produce(self):
        """Loads keys and values once and the queries of every step, ahead of their use."""
        plgpu.set_max_registers(40, action="decrease")
        plan = self.plan
        self.load_keys()

        @pl.loop(0, self.steps)
        def _load(n):
            self.load_queries(self.place(n, *self.entry(n)), n >= plan.stages)

        # A barrier that was waited for must be seen to its last phase.
        @pl.loop(self.steps, self.steps + plan.stages)
        def _drain(n):
            @pl.when(n >= plan.stages)
            def _wait():
                slot = lax.rem(n, jnp.int32(plan.stages))
                plgpu.barrier_wait(self.q_free.at[slot])
                plgpu.barrier_wait(self.do_free.at[slot])

    def load_keys(self):
        plgpu.copy_gmem_to_smem(self.numbers, self.integers.at[0], self.kv_ready)
        for source, target in ((self.k, self.k_smem), (self.v, self.v_smem)):
            parts, cuts, _, columns = target.shape
            for part in range(parts):
                for cut in range(cuts):
                    rows = pl.ds(self.tile * self.plan.C + part * KEYS, KEYS)
                    at = self.batch, rows, self.head, pl.ds(cut * columns, columns)
                    plgpu.copy_gmem_to_smem(source.at[at], target.at[part, cut], self.kv_ready)
        if self.plan.segments:
            for part in range(self.plan.C // KEYS):
                keys = pl.ds(self.tile * self.plan.C + part * KEYS, KEYS)
                mine = self.kv_segments.at[self.batch, keys]
                plgpu.copy_gmem_to_smem(mine, self.integers.at[1 + part], self.kv_ready)

    def load_queries(self, at, again):
        rows, ready = pl.ds(at.row, self.plan.T), self.q_ready.at[at.slot]
        pl.when(again)(lambda: plgpu.barrier_wait(self.q_free.at[at.slot]))
        self.load_ring(self.q, self.q_smem, at, ready)
        pair = self.rows.at[self.batch, at.head, :, rows]
        plgpu.copy_gmem_to_smem(pair, self.rows_smem.at[at.slot], ready)
        for sub in range(self.plan.segments * self.plan.T // ROWS):
            mine = self.q_segments.at[self.batch, pl.ds(at.row + sub * ROWS, ROWS)]
            plgpu.copy_gmem_to_smem(mine, self.q_segments_of(at, sub), ready)
        pl.when(again)(lambda: plgpu.barrier_wait(self.do_free.at[at.slot]))
        self.load_ring(self.do, self.do_smem, at, self.do_ready.at[at.slot])

    def q_segments_of(self, at, sub: int):
        T, C = self.plan.T, self.plan.C
        return self.integers.at[1 + C // KEYS + at.slot * (T // ROWS) + sub]

    def load_ring(self, source, ring, at, ready):
        columns = ring.shape[3]
        for piece in range(self.pieces):
            cut = pl.ds(piece * columns, columns)
            part = source.at[self.batch, pl.ds(at.row, self.plan.T), at.head, cut]
            plgpu.copy_gmem_to_smem(part, ring.at[at.slot, piece], ready)

    def consume(self):
        """Goes through all steps with dk and dv in registers, and writes them."""
        plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(self.kv_ready)
        zeros = tiles.full((KEYS, self.columns()), 0.0)

        def step(n, carry):
            *sums, head, entry = carry
            # The next entry comes from device memory while this step runs.
            following = self.entry(jnp.minimum(n + 1, self.steps - 1))
            return *self.step(self.place(n, head, entry), *sums), *following

        start = (zeros, zeros, *self.entry(jnp.int32(0)))
        dk, dv, *_ = lax.fori_loop(0, self.steps, step, start)
        plgpu.barrier_arrive(self.done)
        plgpu.barrier_wait(self.done)
        self.write(self.dk, self.k_smem, dk * self.options.scale)
        self.write(self.dv, self.v_smem, dv)
        plgpu.wait_smem_to_gmem(0)

    def probabilities(self, s, at, part, sub: int = 0):
        """p in the inputs' dtype, and p times the soft cap's derivative in float32.

        s: product [64 64] of the keys `part` of the tile and the queries `sub` of the step.
        """
        cap, scale = self.options.softcap, self.options.scale
        # In powers of two from here on.
        s = s * (scale * LOG2E) if cap is None else (cap * LOG2E) * tiles.tanh(s * (scale / cap))
        if self.plan.partial:
            # A capped score that is not seen stays finite, since its square is needed.
            unseen = -jnp.inf if cap is None else UNSEEN
            masked = lambda s: jnp.where(self.seen(at, part, sub), s, unseen)
            s = lax.cond(at.kind == blocks.SOME, masked, lambda s: s, s)
        rows = pl.ds(sub * ROWS, ROWS)
        p = jnp.exp2(s - along_queries(self.rows_smem.at[at.slot, 0, rows]))
        weight = p if cap is None else p * (1 - jnp.square(s * (1 / (cap * LOG2E))))
        return p.astype(self.k_smem.dtype), weight

    def seen(self, at, part, sub: int):
        """Which of 64 keys which queries see, bool [64 64]: at most three comparisons an element.

        What depends on the key alone the compiler works out once for each of a thread's two keys.
        Numbers of the queries come from memory, and stay there until they are needed: those of an
        iota would be kept in registers.
        """
        plan, options = self.plan, self.options
        shape = KEYS, ROWS
        key = tiles.iota(shape, 0) + (self.tile * plan.C + part * KEYS)
        start = at.row + sub * ROWS + plan.S - plan.L
        position = along_queries(self.integers.at[0]) + start
        upper = lower = key if plan.S % plan.C == 0 else jnp.where(key < plan.S, key, FAR)
        kv = None
        if plan.segments:
            kv = plgpu.load(self.integers.at[1 + part], layout=tiles.WGMMA.reduce(1))
            kv = lax.broadcast_in_dim(kv, shape, (0,))
        if options.first:
            leading = (key < min(options.first, plan.S)) if kv is None else (kv < 0)
            lower = jnp.where(leading, FAR, lower)
            upper = upper if options.causal else jnp.where(leading, -FAR, upper)
        ahead = 1 if options.causal else options.window
        seen = upper < (plan.S if ahead is None else position + ahead)
        if options.window is not None:
            seen = seen & (lower > position - options.window)
        if plan.segments:
            ids = jnp.where(kv == 0, FAR, jnp.abs(kv))
            seen = seen & (ids == along_queries(self.q_segments_of(at, sub)))
        return seen

    def give(self, dq, at, rows, columns):
        """Adds this warpgroup's part of a tile of dq to the sum in device memory."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.dq_smem[at.wg] = dq
        plgpu.commit_smem()
        copy = 0 if self.plan.adds else self.tile
        target = self.dq.at[copy, self.batch, at.head, rows, columns]
        operation = "add" if self.plan.adds else None
        plgpu.copy_smem_to_gmem(self.dq_smem.at[at.wg], target, reduction_op=operation)


def along_queries(ref):
    """A vector over queries [64] in shared memory, for each of 64 keys."""
    x = plgpu.load(ref, layout=tiles.WGMMA.reduce(0))
    return lax.broadcast_in_dim(x, (KEYS, *x.shape), (1,))
