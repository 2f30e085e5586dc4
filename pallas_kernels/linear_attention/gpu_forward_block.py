"""What the forward pass' kernels share: loading, feature maps, and the state of the keys.

A thread block has one head or two ("teams" of warpgroups), and of each a piece of the row and 64
values a warpgroup. It goes through the piece in chunks of 64 tokens. A last warpgroup loads them by
TMA, ahead of the others, which map them in turn, each one its own array of the chunk.

The state is held transposed, S^T [V F], as accumulators in registers, 64 values a warpgroup: so it
is the left operand of its product with the queries' features, and never leaves. With 256 features
it takes 128 of a thread's 240 registers, and everything else is made to fit beside it.
"""

import dataclasses
import math
import types

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import gpu_tiles as tiles
from pallas_kernels.flash_attention.gpu_tiles import TILED, WGMMA
from pallas_kernels.linear_attention import gpu_maps

C = 64  # tokens a chunk: the rows of one matrix instruction
KEPT, MIXED = 1, 2  # of a chunk: the state before it is kept, some keys are not in that after it
MEETINGS = ("features", "weights", "done")  # of a team, in every chunk
COLUMN = WGMMA.reduce(1)
LOADING, MULTIPLYING = 24, 240  # registers of a thread


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call, as in `linear_attention`; K, V and f padded to multiples of 64.

    width: of f what is not padding. W: warpgroups a head, of 64 values each. teams: heads a thread
    block. pieces: a row's, of `chunks` chunks each. stages: chunks of queries and keys in shared
    memory, and one less than of values. mapped, biased, started, segments: whether there are maps,
    biases, a state, segments.
    """

    B: int
    L: int
    H: int
    G: int
    K: int
    V: int
    f: int
    width: int
    form: str
    W: int
    teams: int
    pieces: int
    stages: int
    mapped: bool
    biased: bool
    started: bool
    segments: bool
    dtype: jnp.dtype

    @property
    def F(self) -> int:
        return self.f * gpu_maps.HALVES.get(self.form, 1)

    @property
    def N(self) -> int:
        return -(-self.L // C)

    @property
    def chunks(self) -> int:
        return -(-self.N // self.pieces)


class Block(types.SimpleNamespace):
    """References of a kernel by name, and which heads, piece and values this thread block has.

    Buffers have a leading dimension for slots and teams, so that what a warpgroup needs is found by
    an index: the interpreter knows no moving windows.
    """

    mapped = ("k",)  # arrays that are mapped, each by the warpgroup of its place here, or the last

    def __init__(self, shape: Shape, **refs):
        super().__init__(shape=shape, **refs)
        self.b, self.head = lax.axis_index("batch"), lax.axis_index("head")
        self.piece, self.part = lax.axis_index("piece"), lax.axis_index("values")
        self.first = self.piece * shape.chunks
        self.count = jnp.minimum(shape.chunks, shape.N - self.first)

    @classmethod
    def scratch(cls, shape: Shape) -> dict:
        """Shared memory and barriers."""
        T, W, F, ring = shape.teams, shape.W, shape.F, shape.stages * shape.teams
        tile, line, barrier = cls.tile(shape), cls.line, cls.barrier
        values = ring + T
        made = dict(
            v_tile=tile(values, W, C, 64),
            adds_tile=tile(values, 8, C),
            keys_tile=line(T, F),
            zeros=line(T * W, C, dtype=jnp.int32),
            # One for all: a thread keeps track of each array of barriers in a register.
            full=barrier(ring * len(cls.mapped)),
            v_full=barrier(values, W + 1 + 2 * shape.segments),
            v_empty=barrier(values, W),
        )
        for name in cls.mapped:
            made[f"{name}_tile"] = tile(ring, C, shape.K)
            made[f"{name}_empty"] = barrier(ring)
            made[f"phi_{name}"] = tile(T, C, F)
            if shape.mapped:
                made[f"{name}_map_tile"] = tile(T, shape.K, shape.f)
        if once := len(cls.mapped) * (shape.mapped + shape.biased) + cls.starts(shape):
            made["once"] = barrier(T, once)
        if shape.biased:
            made["biases"] = line(T, len(cls.mapped), shape.f)
        if shape.segments:
            made["ids"] = line(values, 2, C, dtype=jnp.int32)
        return made | ({"met": barrier(len(MEETINGS), W)} if W > 1 else {})

    @staticmethod
    def tile(shape: Shape):
        return lambda *size: plgpu.SMEM(size, shape.dtype, transforms=TILED)

    @staticmethod
    def line(*size, dtype=jnp.float32):
        return plgpu.SMEM(size, dtype)

    @staticmethod
    def barrier(n: int, arrivals: int = 1):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=n)

    @staticmethod
    def starts(shape: Shape) -> bool:
        """Whether a piece begins with a given state."""
        return shape.started

    @classmethod
    def shared(cls, shape: Shape) -> int:
        """Bytes of shared memory: buffers begin at multiples of 1024; barriers need less."""
        buffers = [x for x in cls.scratch(shape).values() if not isinstance(x, plgpu.Barrier)]
        sizes = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in buffers)
        return sum(-(-size // 1024) * 1024 for size in sizes) + 1023

    def run(self):
        group, consumers = lax.axis_index("group"), self.shape.W * self.shape.teams

        @pl.when(group == consumers)
        def _():
            plgpu.set_max_registers(LOADING, action="decrease")
            self.load()

        @pl.when(group < consumers)
        def _():
            plgpu.set_max_registers(MULTIPLYING, action="increase")
            self.multiply(group)

    def heads(self, team):
        """The query head and the key head of a team."""
        head = self.head * self.shape.teams + team
        return head, lax.div(head, self.shape.H // self.shape.G)

    def load(self):
        """Fills the ring as fast as it is emptied."""
        teams, stages = range(self.shape.teams), self.shape.stages
        for team in teams:
            self.load_once(team)

        @pl.loop(0, self.count)
        def _(n):
            for team in teams:
                for name in self.mapped:
                    self.fill(name, n, team, stages, self.tokens(name, n, team))
                self.fill("v", n, team, stages + 1, self.with_values(n, team))

        # Who waits on a barrier at all must have seen its last arrival before the kernel ends.
        for name in (*self.mapped, "v"):
            ring = stages + (name == "v")

            @pl.loop(jnp.maximum(self.count - ring, 0), self.count)
            def _(n, name=name, ring=ring):
                for team in teams:
                    slot = lax.rem(n, ring) * len(teams) + team
                    plgpu.barrier_wait(getattr(self, f"{name}_empty").at[slot])

    def load_once(self, team: int):
        """Loads maps, biases and the sum of the keys so far."""
        shape, heads = self.shape, dict(zip("qk", self.heads(team), strict=True))
        pairs = []
        for i, name in enumerate(self.mapped):
            at = heads[name]
            if shape.mapped:
                target = getattr(self, f"{name}_map_tile").at[team]
                pairs.append((getattr(self, f"{name}_map").at[at], target))
            if shape.biased:
                pairs.append((getattr(self, f"{name}_bias").at[at], self.biases.at[team, i]))
        if self.starts(shape):
            before = self.keys_before.at[self.b, heads["k"], self.piece]
            pairs.append((before, self.keys_tile.at[team]))
        for source, target in pairs:
            plgpu.copy_gmem_to_smem(source, target, self.once.at[team])

    def tokens(self, name: str, n, team: int):
        """What is to be mapped of chunk n, as (source, ring)."""
        head = dict(zip("qk", self.heads(team), strict=True))[name]
        rows = pl.ds((self.first + n) * C, C)
        yield getattr(self, name).at[self.b, rows, head], getattr(self, f"{name}_tile")

    def with_values(self, n, team: int):
        """What comes with the values of chunk n: (source, ring), or with a place in the slot."""
        shape, N = self.shape, self.first + n
        rows, (_, g) = pl.ds(N * C, C), self.heads(team)
        for w in range(shape.W):
            columns = pl.ds((self.part * shape.W + w) * 64, 64)
            yield self.v.at[self.b, rows, g, columns], self.v_tile, w
        if shape.segments:
            yield self.adds.at[self.b, N], self.adds_tile
            yield self.q_segments.at[self.b, rows], self.ids, 0
            yield self.kv_segments.at[self.b, rows], self.ids, 1
        else:
            yield self.adds.at[0, jnp.where(N == shape.N - 1, 1, 0)], self.adds_tile

    def fill(self, name: str, n, team: int, ring: int, copies):
        slot = lax.rem(n, jnp.int32(ring)) * self.shape.teams + team
        empty = getattr(self, f"{name}_empty").at[slot]
        pl.when(n >= ring)(lambda: plgpu.barrier_wait(empty))
        full = self.v_full.at[slot] if name == "v" else self.full_at(name, slot)
        for source, target, *place in copies:
            plgpu.copy_gmem_to_smem(source, target.at[(slot, *place)], full)

    def full_at(self, name: str, slot):
        """The barrier of a slot of queries or keys."""
        return self.full.at[slot + self.mapped.index(name) * self.shape.stages * self.shape.teams]

    def multiply(self, group):
        """Goes through the chunks with 64 values of the state, and writes it after the last."""
        shape = self.shape
        me = self.place(0 * self.count, group)
        if hasattr(self, "once"):
            plgpu.barrier_wait(self.once.at[me.team])
        self.zeros[me.group] = plgpu.layout_cast(jnp.zeros(C, jnp.int32), COLUMN)
        S = tiles.full((64, shape.F), 0.0)
        if self.starts(shape):
            before = self.values_before.at[self.b, me.g, self.piece, pl.ds(me.column, 64)]
            S = plgpu.load(before, layout=WGMMA, optimized=False)
        else:

            @pl.when(me.w == shape.W - 1)  # which alone reads and adds to it
            def _():
                self.keys_tile[me.team] = tiles.full((shape.F,), 0.0, COLUMN)

        # What is worked out from the group once more leaves its registers to the loop.
        step = lambda n, S: self.chunk(self.place(n, lax.optimization_barrier(group)), S)
        S = lax.fori_loop(0, self.count, step, S)
        self.finish(me, S)
        plgpu.wait_smem_to_gmem(0)

    def place(self, n, group):
        """Where chunk n is: its number in the row, its slots, and who asks."""
        shape = self.shape
        # Not known to the compiler to be 0: it would keep addresses and descriptors of the whole
        # loop in registers, which the state needs.
        zero = lax.optimization_barrier(n) >> 31
        team = lax.div(group, jnp.int32(shape.W)) if shape.teams > 1 else 0
        w = lax.rem(group, jnp.int32(shape.W)) if shape.W > 1 else 0
        h, g = self.heads(team)
        team, w = team + zero, w + zero
        slot = lambda ring: lax.rem(n, jnp.int32(ring)) * shape.teams + team
        return types.SimpleNamespace(
            zero=zero,
            group=group + zero,
            team=team,
            w=w,
            h=h,
            g=g,
            column=(self.part * shape.W + w) * 64,
            N=self.first + n,
            slot=slot(shape.stages),
            v=slot(shape.stages + 1),
        )

    def meet(self, name: str, at):
        """All warpgroups of a team wait for each other, and see what they wrote."""
        plgpu.commit_smem()
        if self.shape.W > 1:
            barrier = self.met.at[MEETINGS.index(name) + at.zero]
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)
