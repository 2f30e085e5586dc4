"""The forward kernel's chunks: what queries see of each other's keys, and of the state before."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import gpu_tiles as tiles
from pallas_kernels.flash_attention.gpu_tiles import WGMMA
from pallas_kernels.linear_attention.gpu_forward_block import COLUMN, C, Shape
from pallas_kernels.linear_attention.gpu_forward_keys import Keys
from pallas_kernels.linear_attention.reference import EPS

TOTALS = ("near", "far", "both")  # of the queries, over their chunk's keys, and those before


class Forward(Keys):
    """One warpgroup of a team maps queries and weighs, the last one maps keys and follows them."""

    mapped = ("q", "k")

    @classmethod
    def scratch(cls, shape: Shape) -> dict:
        tile, line = cls.tile(shape), cls.line
        T = shape.teams
        made = dict(a_tile=tile(T, C, C), o_tile=tile(T * shape.W, C, 64))
        return super().scratch(shape) | made | dict(totals=line(T, len(TOTALS), C))

    def totals_at(self, name: str, at):
        return self.totals.at[at.team, TOTALS.index(name)]

    def chunk(self, at, S):
        first, last = at.w == 0, at.w == self.shape.W - 1
        pl.when(first)(lambda: self.map("q", at))
        pl.when(last)(lambda: self.map("k", at))
        self.meet("features", at)
        plgpu.barrier_wait(self.v_full.at[at.v])
        pl.when(first)(lambda: self.weigh(at))

        @pl.when(last)
        def _():
            self.sum_far(at)
            self.add_keys(at)

        out = self.recall(at, S)
        self.meet("weights", at)
        out, S = self.products(at, out, S)
        self.write(at, out)
        self.free(at)
        return S

    def weigh(self, at):
        """The weights inside the chunk, and their sums."""
        a = tiles.mma((C, C), self.phi_q.at[at.team], self.phi_k.at[at.team].transpose((1, 0)))
        seen = tiles.iota((C, C), 1) <= tiles.iota((C, C), 0) + at.zero
        if self.shape.segments:
            kv = tiles.spread(self.ids.at[at.v, 1], (C, C), 1) >> 1
            q = tiles.spread(self.ids.at[at.v, 0], (C, C), 0) >> 1
            seen = seen & (q == kv) & (kv != 0)
        a = jnp.where(seen, a, 0.0)
        self.totals_at("near", at)[...] = jnp.sum(a, axis=1)
        self.a_tile[at.team] = a.astype(self.shape.dtype)

    def sum_far(self, at):
        """The queries' totals over the keys before the chunk, in float32."""
        far = None
        for i in range(0, self.shape.F, 64):
            phi = plgpu.load(self.phi_q.at[at.team, :, i : i + 64], layout=WGMMA, optimized=False)
            keys = tiles.spread(self.keys_tile.at[at.team, i : i + 64], phi.shape, 1)
            part = jnp.sum(phi.astype(jnp.float32) * keys, axis=1)
            far = part if far is None else far + part
        if self.shape.segments:
            q = plgpu.load(self.ids.at[at.v, 0], layout=COLUMN, optimized=False)
            far = jnp.where((q & 1) != 0, far, 0.0)
        self.totals_at("far", at)[...] = far

    def recall(self, at, S):
        """What the queries read from the state before the chunk, [64 values, 64 queries]."""

        def run(out):
            for i in range(0, self.shape.F, 64):
                cut = slice(i, i + 64)
                phi = self.phi_q.at[at.team, :, cut].transpose((1, 0))
                out.add(S[:, cut].astype(self.shape.dtype), phi)
                out.value(1)  # else all of S were in registers twice
            return out.value()

        out = tiles.accumulate(run, (64, C))
        if self.shape.segments:
            q = tiles.spread(self.ids.at[at.v, 0], (64, C), 1)
            out = jnp.where((q & 1) != 0, out, 0.0)
        return out

    def products(self, at, out, S):
        """Adds the chunk's values to what its queries read, and to the state."""
        v = self.v_tile.at[at.v, at.w].transpose((1, 0))
        a, phi = self.a_tile.at[at.team].transpose((1, 0)), self.phi_k.at[at.team]
        if self.shape.segments:
            out = tiles.mma(out, v, a)
            self.drop(at)
            return out, self.add_values(at, S)

        def both(out, S):
            out.add(v, a)
            S.add(v, phi)
            return out.value(1), S.value()

        return tiles.accumulate(both, out, S)

    def write(self, at, out):
        """The normalised outputs of the chunk, and what they were divided by."""
        shape, tile = self.shape, self.o_tile.at[at.team * self.shape.W + at.w]
        near, far = (
            plgpu.load(self.totals_at(name, at), layout=WGMMA.reduce(0), optimized=False)
            for name in ("near", "far")
        )
        total = near + far + EPS
        out = (out * lax.broadcast_in_dim(1 / total, out.shape, [1])).astype(shape.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tile.transpose((1, 0))[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
        rows = pl.ds(at.N * C, C)

        @pl.when((at.w == 0) & (self.part == 0))
        def _():
            both = self.totals_at("both", at)
            both[...] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(both, self.total.at[self.b, at.h, rows])

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, self.o.at[self.b, rows, at.h, pl.ds(at.column, 64)])

    def finish(self, at, S):
        last = self.piece == self.shape.pieces - 1
        own = lax.rem(at.h, self.shape.H // self.shape.G) == 0

        @pl.when(last & own)  # one query head of a key head writes
        def _():
            place = self.b, at.g
            self.write_state(at, S, self.values.at[place], self.keys.at[place])
