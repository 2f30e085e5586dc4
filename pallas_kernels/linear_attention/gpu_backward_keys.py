"""Gradients of values and of the keys' features: back through the chunks with the queries' sums.

With R = sum phi_q g^T and r = sum phi_q e over the later queries, dv = A^T g + phi_k R and
dphi_k = dA^T phi_q + v R^T + r. A consumer has the columns of its features of dphi_k, and one half
of dv's columns, for which it reads the other's R in shared memory.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import gpu_tiles as tiles
from pallas_kernels.linear_attention import gpu_backward_rings as rings
from pallas_kernels.linear_attention.gpu_backward_keys_chunk import Products
from pallas_kernels.linear_attention.gpu_backward_sweep import EIGHT, C, Plan


class Keys(Products):
    """References: q [B L H F], k [B L G F], v [B L G V], g [B L H V], e [B H L], e8 [B H 8 L]."""

    ORDER = ("q", "g", "k", "v")

    @staticmethod
    def scratch(plan: Plan, dtype, stages: dict[str, int]) -> dict:
        W, width, cuts = plan.consumers, plan.width, plan.v // C
        tile = lambda *shape: rings.matrix(dtype, *shape)
        made = dict(
            k_smem=tile(stages["k"], W, C, width),
            v_smem=tile(stages["v"], C, plan.v),
            q_smem=tile(stages["q"], W, C, width),
            g_smem=tile(stages["g"], cuts, C, C),
            s_smem=tile(W, cuts, width, C),
            e8_smem=tile(stages["g"], EIGHT, C),
            e_smem=plgpu.SMEM((stages["g"], C), jnp.float32),
            z_smem=plgpu.SMEM((W, width), jnp.float32),
            out_smem=rings.matrix(jnp.float32 if max(plan.parts) > 1 else dtype, W, C, C),
            written=plgpu.Barrier(num_arrivals=W),
            read=plgpu.Barrier(num_arrivals=W),
        )
        if plan.segments:
            made["kv_ids_smem"] = plgpu.SMEM((stages["v"], C), jnp.int32)
            made["q_ids_smem"] = plgpu.SMEM((stages["q"], C), jnp.int32)
            if plan.R > 1:
                made["q_read"] = plgpu.Barrier(num_arrivals=W)
        arrivals = dict(q=W + plan.segments, g=cuts + 2, k=W, v=1 + plan.segments)
        return made | rings.barriers(plan, arrivals, stages)

    def produce(self):
        plan = self.plan

        @pl.loop(0, plan.N)
        def _load(n):
            rows = self.tokens(n)
            self.load_features("k", self.k, n, rows, self.group)
            self.load_queries(n * plan.R, rows, 0)
            self.load_values(n, rows)
            self.load_gradients(n * plan.R, rows, 0)
            if plan.R > 1:

                @pl.loop(1, plan.R)
                def _head(r):
                    self.load_queries(n * plan.R + r, rows, r)
                    self.load_gradients(n * plan.R + r, rows, r)

        for name, ring in self.rings.items():
            ring.drain(plan.N * (plan.R if name in "qg" else 1))

    def load_queries(self, n, rows, r):
        head = self.group * self.plan.R + r
        slot, full = self.load_features("q", self.q, n, rows, head)
        if self.plan.segments:
            mine = self.q_ids.at[self.batch, rows]
            plgpu.copy_gmem_to_smem(mine, self.q_ids_smem.at[slot], full)

    def load_gradients(self, n, rows, r):
        slot, full = self.rings["g"].claim(n)
        head = self.group * self.plan.R + r
        for cut in range(self.plan.v // C):
            columns = pl.ds(self.v_part * self.plan.v + cut * C, C)
            part = self.g.at[self.batch, rows, head, columns]
            plgpu.copy_gmem_to_smem(part, self.g_smem.at[slot, cut], full)
        plgpu.copy_gmem_to_smem(self.e.at[self.batch, head, rows], self.e_smem.at[slot], full)
        eight = self.e8.at[self.batch, head, :, rows]
        plgpu.copy_gmem_to_smem(eight, self.e8_smem.at[slot], full)

    def consume(self):
        state = lax.fori_loop(0, self.plan.N, self.step, self.enter(C))
        plgpu.wait_smem_to_gmem(0)
        if self.plan.leaves:
            pl.when(self.piece == 0)(lambda: self.leave(state))

    def leave(self, state):
        """Writes the gradient of the state before the row."""
        at = self.batch, self.group, self.features(self.wg)
        for cut, x in enumerate(state):
            columns = pl.ds(self.v_part * self.plan.v + cut * C, C)
            self.values_out[*at, columns] = x
        self.keys_out[self.v_part, *at] = self.keys_state()

    def step(self, n, state):
        """One chunk: gradients of its keys and values, and the sums with its queries."""
        self, n = self.again(n)
        for cut, x in enumerate(state):
            self.s_smem[self.wg, cut] = x.astype(self.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.written)
        self.rings["k"].wait(n), self.rings["v"].wait(n)
        return self.alone(n, state) if self.plan.R == 1 else self.grouped(n, state)

    def alone(self, n, state):
        """A chunk with one query head: results leave one after the other."""
        self.rings["q"].wait(n), self.rings["g"].wait(n)
        a = self.weights(n, n)
        plgpu.barrier_wait(self.written)
        for cut in self.cuts:
            x = tiles.mma(self.values_start(n, cut), a, self.right(n, cut))
            self.give_values(x, n, cut)
        da = self.gradients(n, n)
        starts = range(0, self.plan.width, C)
        for start in starts:
            x = self.features_start(n, start)
            if start == starts[-1]:
                self.free_keys(n)
            self.give_features(tiles.mma(x, da, self.mine(n, start)), n, start)
        plgpu.barrier_wait(self.read)
        return self.after(n, n, self.kept(n, state))

    def grouped(self, n, state):
        """A chunk with many query heads, whose parts are added up in registers."""
        plan, starts = self.plan, range(0, self.plan.width, C)
        plgpu.barrier_wait(self.written)
        dv = tuple(self.values_start(n, cut) for cut in self.cuts)
        dphi = tuple(self.features_start(n, start) for start in starts)

        def head(r, carry):
            dv, dphi, state = carry
            m = n * plan.R + r
            self.rings["q"].wait(m), self.rings["g"].wait(m)
            dv = add(self.weights(n, m), [self.right(m, cut) for cut in self.cuts], dv)
            dphi = add(self.gradients(n, m), [self.mine(m, start) for start in starts], dphi)
            if plan.segments:
                plgpu.barrier_arrive(self.q_read)
                plgpu.barrier_wait(self.q_read)
            return dv, dphi, self.after(n, m, state)

        dv, dphi, state = lax.fori_loop(0, plan.R, head, (dv, dphi, self.kept(n, state)))
        self.free_keys(n)
        for cut, x in zip(self.cuts, dv, strict=True):
            self.give_values(x, n, cut)
        for start, x in zip(starts, dphi, strict=True):
            self.give_features(x, n, start)
        plgpu.barrier_wait(self.read)
        return state

    def free_keys(self, n):
        """Says that keys, values and the state in shared memory have been read."""
        if self.plan.segments:
            plgpu.commit_smem()  # ids are read before TMA, another proxy, writes the next
        plgpu.barrier_arrive(self.read)
        self.rings["v"].free(n)
        self.rings["k"].free(n)


def add(a, right: list, sums: tuple) -> tuple:
    """Each of sums with a times its right factor."""

    def products(*sums):
        for x, b in zip(sums, right, strict=True):
            x.add(a, b)
        return tuple(x.value() for x in sums)

    return tiles.accumulate(products, *sums)
