"""Gradients with 128 keys a thread block, 64 for each consumer: for heads up to 128."""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import gpu_tiles as tiles
from pallas_kernels.flash_attention.gpu_backward_tile import (
    CONSUMERS,
    FLOAT32,
    KEYS,
    ROWS,
    Plan,
    Tile,
    along_queries,
)


class ByKeys(Tile):
    """p and ds of a consumer's keys are left operands in registers.

    Only dq needs all keys: ds goes to shared memory, and each consumer multiplies it with one half
    of k's columns, or for 128 queries one half of ds with all of k. ds has two buffers, so that one
    meeting of the consumers in a step is enough.
    """

    @classmethod
    def scratch(cls, plan: Plan, dtype) -> dict:
        T, D = plan.T, plan.D
        k_cuts = CONSUMERS if T == ROWS else 1
        k_smem = plgpu.SMEM((CONSUMERS, k_cuts, KEYS, D // k_cuts), dtype, transforms=tiles.TILED)
        v_smem = plgpu.SMEM((CONSUMERS, 1, KEYS, D), dtype, transforms=tiles.TILED)
        ds_smem = (2, CONSUMERS, T // ROWS, KEYS, ROWS)
        return super().scratch(plan, dtype) | dict(
            k_smem=k_smem,
            v_smem=v_smem,
            kv_ready=cls.keys_ready(plan, k_smem, v_smem),
            ds_smem=plgpu.SMEM(ds_smem, dtype, transforms=tiles.TILED),
            ds_ready=plgpu.Barrier(num_arrivals=CONSUMERS),
            dq_smem=plgpu.SMEM((CONSUMERS, ROWS, D // k_cuts), jnp.float32, transforms=FLOAT32),
        )

    def columns(self) -> int:
        return self.plan.D

    def step(self, at, dk, dv):
        q, do = self.q_smem.at[at.slot, 0], self.do_smem.at[at.slot, 0]
        plgpu.barrier_wait(self.q_ready.at[at.slot])
        subs = self.plan.T // ROWS
        # Before the accumulators of what follows take registers.
        start = self.scores(at, 0)

        def products(dk, dv, dq):
            for sub in range(subs):
                rows = pl.ds(sub * ROWS, ROWS)
                p, ds = self.scores(at, sub) if sub else start
                dv.add(p, do.at[rows])
                self.ds_smem[at.parity, at.wg, sub] = ds
                if sub < subs - 1:
                    dk.add(ds, q.at[rows])
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.ds_ready)
            plgpu.barrier_wait(self.ds_ready)
            self.multiply(dq, at)
            dk.add(ds, q.at[rows])  # goes on while do is freed and dq leaves
            part = dq.value(1)
            plgpu.barrier_arrive(self.do_free.at[at.slot])
            self.add_queries(part, at)
            return dk.value(), dv.value()

        dk, dv = tiles.accumulate(products, dk, dv, self.dq_smem.shape[1:])
        plgpu.barrier_arrive(self.q_free.at[at.slot])
        return dk, dv

    def scores(self, at, sub: int):
        """p and ds [64 keys, 64 queries] in the inputs' dtype."""
        rows, cuts = pl.ds(sub * ROWS, ROWS), self.k_smem.shape[1]
        q, do = self.q_smem.at[at.slot, 0, rows], self.do_smem.at[at.slot, 0, rows]
        columns = self.plan.D // cuts

        def products(s, dp):
            for cut in range(cuts):
                part = q.at[:, pl.ds(cut * columns, columns)]
                s.add(self.k_smem.at[at.wg, cut], part.transpose((1, 0)))
            if sub == 0:
                plgpu.barrier_wait(self.do_ready.at[at.slot])
            # A soft cap of wide heads leaves too few registers beside a dp under way.
            alone = self.plan.capped and self.plan.D > 64
            gradient = lambda: dp.add(self.v_smem.at[at.wg, 0], do.transpose((1, 0)))
            if not alone:
                gradient()
            p, weight = self.probabilities(s.value(0 if alone else 1), at, at.wg, sub)
            if alone:
                gradient()
            return p, weight, dp.value()

        p, weight, dp = tiles.accumulate(products, (KEYS, ROWS), (KEYS, ROWS))
        ds = weight * (dp - along_queries(self.rows_smem.at[at.slot, 1, rows]))
        return p, ds.astype(p.dtype)

    def multiply(self, dq, at):
        for part in range(CONSUMERS):
            if self.plan.T == ROWS:
                ds, k = self.ds_smem.at[at.parity, part, 0], self.k_smem.at[part, at.wg]
            else:
                ds, k = self.ds_smem.at[at.parity, part, at.wg], self.k_smem.at[part, 0]
            dq.add(ds.transpose((1, 0)), k)

    def add_queries(self, dq, at):
        T, D = dq.shape
        if self.plan.T == ROWS:
            self.give(dq, at, pl.ds(at.row, T), pl.ds(at.wg * D, D))
        else:
            self.give(dq, at, pl.ds(at.row + at.wg * T, T), pl.ds(0, D))

    def write(self, target, smem, x):
        """Writes this consumer's keys of dk or dv, through the memory that held k or v."""
        cuts, columns = smem.shape[1], smem.shape[3]
        for cut in range(cuts):
            smem[self.wg, cut] = x[:, cut * columns : (cut + 1) * columns].astype(smem.dtype)
        plgpu.commit_smem()
        rows = pl.ds(self.tile * self.plan.C + self.wg * KEYS, KEYS)
        for cut in range(cuts):
            at = self.batch, rows, self.head, pl.ds(cut * columns, columns)
            plgpu.copy_smem_to_gmem(smem.at[self.wg, cut], target.at[at])
