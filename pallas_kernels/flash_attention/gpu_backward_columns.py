"""Gradients with 64 keys a thread block, and half of dk's and dv's columns for each consumer.

Registers hold dk and dv of 64 keys and 256 columns only if two warpgroups share them.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import gpu_tiles as tiles
from pallas_kernels.flash_attention.gpu_backward_tile import (
    CONSUMERS,
    FLOAT32,
    KEYS,
    Plan,
    Tile,
    along_queries,
)


class ByColumns(Tile):
    """The first consumer works out p, the second dp and from both ds; both multiply with all three.

    p and ds are left operands in shared memory. p has two buffers: the first consumer may be a step
    ahead while the second still multiplies with p. It comes to write ds only after the next p, and
    so after the first consumer has done with the last ds: one buffer is enough.
    """

    pieces = CONSUMERS

    @classmethod
    def scratch(cls, plan: Plan, dtype) -> dict:
        T, D = plan.T, plan.D
        keys = plgpu.SMEM((1, CONSUMERS, KEYS, D // CONSUMERS), dtype, transforms=tiles.TILED)
        square = lambda *n: plgpu.SMEM((*n, KEYS, T), dtype, transforms=tiles.TILED)
        made = {"weight_smem": square(1)} if plan.capped else {}
        return (
            super().scratch(plan, dtype)
            | made
            | dict(
                k_smem=keys,
                v_smem=keys,
                kv_ready=cls.keys_ready(plan, keys, keys),
                p_smem=square(2),
                p_ready=plgpu.Barrier(),
                ds_smem=square(1),
                ds_ready=plgpu.Barrier(),
                dq_smem=plgpu.SMEM((CONSUMERS, T, D // CONSUMERS), jnp.float32, transforms=FLOAT32),
            )
        )

    def columns(self) -> int:
        return self.plan.D // CONSUMERS

    def step(self, at, dk, dv):
        plgpu.barrier_wait(self.q_ready.at[at.slot])
        pl.when(at.wg == 0)(lambda: self.work_out_p(at))
        pl.when(at.wg == 1)(lambda: self.work_out_ds(at))
        q, do = (ring.at[at.slot, at.wg] for ring in (self.q_smem, self.do_smem))

        def products(dk, dv, dq):
            dv.add(self.p_smem.at[at.parity], do)
            plgpu.barrier_wait(self.ds_ready)
            ds = self.ds_smem.at[at.zero]
            dq.add(ds.transpose((1, 0)), self.k_smem.at[at.zero, at.wg])
            dk.add(ds, q)  # goes on while do is freed and dq leaves
            part = dq.value(1)
            plgpu.barrier_arrive(self.do_free.at[at.slot])
            columns = pl.ds(at.wg * self.columns(), self.columns())
            self.give(part, at, pl.ds(at.row, self.plan.T), columns)
            return dk.value(), dv.value()

        dk, dv = tiles.accumulate(products, dk, dv, self.dq_smem.shape[1:])
        plgpu.barrier_arrive(self.q_free.at[at.slot])
        return dk, dv

    def product(self, keys, ring, at):
        """[64 T]: the product of k and q, or of v and do."""

        def run(x):
            for piece in range(self.pieces):
                x.add(keys.at[at.zero, piece], ring.at[at.slot, piece].transpose((1, 0)))
            return x.value()

        return tiles.accumulate(run, (KEYS, self.plan.T))

    def work_out_p(self, at):
        p, weight = self.probabilities(self.product(self.k_smem, self.q_smem, at), at, 0)
        self.p_smem[at.parity] = p
        if self.plan.capped:
            self.weight_smem[at.zero] = weight.astype(p.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.p_ready)
        plgpu.barrier_wait(self.do_ready.at[at.slot])

    def work_out_ds(self, at):
        plgpu.barrier_wait(self.do_ready.at[at.slot])
        dp = self.product(self.v_smem, self.do_smem, at)
        dp = dp - along_queries(self.rows_smem.at[at.slot, 1])
        plgpu.barrier_wait(self.p_ready)
        weight = self.weight_smem.at[at.zero] if self.plan.capped else self.p_smem.at[at.parity]
        ds = plgpu.load(weight, layout=tiles.WGMMA).astype(jnp.float32) * dp
        self.ds_smem[at.zero] = ds.astype(self.ds_smem.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.ds_ready)

    def write(self, target, smem, x):
        """Writes this consumer's columns of dk or dv, through the memory that held k or v."""
        smem[0, self.wg] = x.astype(smem.dtype)
        plgpu.commit_smem()
        columns = self.columns()
        rows = pl.ds(self.tile * self.plan.C, KEYS)
        at = self.batch, rows, self.head, pl.ds(self.wg * columns, columns)
        plgpu.copy_smem_to_gmem(smem.at[0, self.wg], target.at[at])
