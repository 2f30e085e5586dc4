"""Gradients of the queries' features: forward through the chunks with the keys' state S and z.

dphi_q = dA phi_k + g S^T + e z^T, with dA = g v^T + e where a query sees a key of its chunk. Each
consumer works out all of dA and its own features' columns, so that consumers never wait for each
other.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import gpu_tiles as tiles
from pallas_kernels.linear_attention import gpu_backward_rings as rings
from pallas_kernels.linear_attention import gpu_backward_sweep as sweeps
from pallas_kernels.linear_attention.gpu_backward_sweep import COLUMN, EIGHT, C, Plan, along


class Queries(sweeps.Sweep):
    """References: k [B L G F], v [B L G V], g [B L H V], e [B H L], ones [8 64], dphi [..]."""

    ORDER = ("g", "v", "k")

    @staticmethod
    def scratch(plan: Plan, dtype, stages: dict[str, int]) -> dict:
        W, width, tile = plan.consumers, plan.width, lambda *shape: rings.matrix(dtype, *shape)
        made = dict(
            k_smem=tile(stages["k"], W, C, width),
            v_smem=tile(stages["v"], C, plan.v),
            g_smem=tile(stages["g"], C, plan.v),
            s_smem=tile(W, width, plan.v),
            ones_smem=tile(EIGHT, C),
            e_smem=plgpu.SMEM((stages["g"], C), jnp.float32),
            z_smem=plgpu.SMEM((W, width), jnp.float32),
            out_smem=rings.matrix(jnp.float32, W, C, C),
            once=plgpu.Barrier(),
        )
        if plan.segments:
            made["kv_ids_smem"] = plgpu.SMEM((stages["v"], C), jnp.int32)
            made["q_ids_smem"] = plgpu.SMEM((stages["g"], C), jnp.int32)
        arrivals = dict(g=2 + plan.segments, v=1 + plan.segments, k=W)
        return made | rings.barriers(plan, arrivals, stages)

    def produce(self):
        plan = self.plan
        plgpu.copy_gmem_to_smem(self.ones, self.ones_smem, self.once)

        @pl.loop(0, plan.N)
        def _load(n):
            rows = self.rows(n)
            self.load_head(n * plan.R, rows, 0)
            self.load_values(n, rows)
            self.load_features("k", self.k, n, rows, self.group)
            if plan.R > 1:
                pl.loop(1, plan.R)(lambda r: self.load_head(n * plan.R + r, rows, r))

        for name, ring in self.rings.items():
            ring.drain(plan.N * (plan.R if name == "g" else 1))

    def load_head(self, n, rows, r):
        slot, full = self.rings["g"].claim(n)
        head = self.group * self.plan.R + r
        part = self.g.at[self.batch, rows, head, self.values]
        plgpu.copy_gmem_to_smem(part, self.g_smem.at[slot], full)
        plgpu.copy_gmem_to_smem(self.e.at[self.batch, head, rows], self.e_smem.at[slot], full)
        if self.plan.segments:
            mine = self.q_ids.at[self.batch, rows]
            plgpu.copy_gmem_to_smem(mine, self.q_ids_smem.at[slot], full)

    def consume(self):
        plgpu.barrier_wait(self.once)
        lax.fori_loop(0, self.plan.N, self.step, self.enter(self.plan.v))
        plgpu.wait_smem_to_gmem(0)

    def step(self, n, state):
        """One chunk: the gradients of its queries, and the state after it."""
        self, n = self.again(n)
        self.s_smem[self.wg] = state[0].astype(self.dtype)
        plgpu.commit_smem()
        v, k = self.rings["v"].wait(n), self.rings["k"].wait(n)
        if self.plan.R == 1:
            self.head(n, 0, v, k)
        else:
            pl.loop(0, self.plan.R)(lambda r: self.head(n, r, v, k))
        self, n, v, k = self.again(n, v, k)
        mine = self.k_smem.at[k, self.wg]
        if self.plan.segments:
            chunk = self.chunk(n)
            flags = self.flags[self.batch, chunk]
            state = self.reset(flags, state)

            @pl.when((flags & sweeps.PARTIAL_KEYS) != 0)
            def _mask():
                self.keep_rows(mine, self.kv_ids_smem.at[v], self.held[self.batch, chunk + 1])

        right = [self.v_smem.at[v + self.zero]]
        state = self.with_chunk(state, mine, self.ones_smem, right)
        self.rings["v"].free(n)
        self.rings["k"].free(n)
        return state

    def head(self, n, r, v, k):
        """The gradients of one query head's features in a chunk."""
        slot = self.rings["g"].wait(n * self.plan.R + r)
        self, n, r, v, k, slot = self.again(n, r, v, k, slot)
        g = self.g_smem.at[slot]
        e = plgpu.load(self.e_smem.at[slot], layout=COLUMN, optimized=False)
        if self.plan.parts[1] > 1:
            e = e * jnp.where(self.v_part == 0, 1.0, 0.0)
        da = tiles.mma((C, C), g, self.v_smem.at[v].transpose((1, 0))) + along(e, 0)
        da = jnp.where(self.seen(slot, v), da, 0.0).astype(self.dtype)
        uses = self.uses(slot, n)
        for start in range(0, self.plan.width, C):
            self.columns(n, r, start, (k, slot), da, e, uses)
        self.rings["g"].free(n * self.plan.R + r)

    def columns(self, n, r, start: int, slots, da, e, uses):
        """64 columns of one head's gradients."""
        self, n, r, k, slot = self.again(n, r, *slots)
        wg, part = self.wg, pl.ds(start, C)
        x = tiles.mma((C, C), self.g_smem.at[slot], self.s_smem.at[wg, part].transpose((1, 0)))
        x = x + along(e, 0) * tiles.spread(self.z_smem.at[wg, part], (C, C), 1)
        x = x if uses is None else jnp.where(uses, x, 0.0)
        x = tiles.mma(x, da, self.k_smem.at[k, wg, :, part])
        columns = pl.ds(self.f_part * self.plan.f + wg * self.plan.width + start, C)
        head = self.group * self.plan.R + r
        self.give(x, self.dphi.at[self.v_part, self.batch, self.rows(n), head, columns])

    def seen(self, slot, v):
        rows, columns = tiles.iota((C, C), 0), tiles.iota((C, C), 1)
        seen = (columns & ~7) < rows + 1 - (columns & 7)
        if self.plan.segments:
            q, kv = self.ids(self.q_ids_smem.at[slot], 0), self.ids(self.kv_ids_smem.at[v], 1)
            seen = seen & (q == kv) & (q != 0)
        return seen

    def uses(self, slot, n):
        """Who of the queries sees the state."""
        if not self.plan.segments:
            return None
        q = self.ids(self.q_ids_smem.at[slot], 0)
        return (q == self.held[self.batch, self.chunk(n)]) & (q != 0)
