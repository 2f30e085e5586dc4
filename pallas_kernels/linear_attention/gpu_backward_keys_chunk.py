"""The products of one chunk in the sweep back through keys and values.

Methods take n, which counts the chunks from a piece's end, and m, which counts the tiles of
queries: slots and tokens follow from them, and take no registers in between.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import gpu_tiles as tiles
from pallas_kernels.linear_attention import gpu_backward_sweep as sweeps
from pallas_kernels.linear_attention.gpu_backward_sweep import C


class Products(sweeps.Sweep):
    """References as of `gpu_backward_keys.Keys`."""

    @property
    def cuts(self) -> list:
        """Which 64 columns of dv are this consumer's; two consumers both work on the only ones."""
        shared = self.plan.consumers > 1 and self.plan.v > C
        return [self.wg] if shared else list(range(self.plan.v // C))

    def mine(self, m, start: int):
        """64 columns of this consumer's features of the queries."""
        self, m = self.again(m)
        return self.q_smem.at[self.rings["q"].slot(m), self.wg, :, pl.ds(start, C)]

    def right(self, m, cut):
        """64 columns of g."""
        self, m, cut = self.again(m, cut)
        return self.g_smem.at[self.rings["g"].slot(m), cut]

    def weights(self, n, m):
        """A^T [64 keys, 64 queries] in the inputs' dtype."""
        self, n, m = self.again(n, m)
        k, q = self.rings["k"].slot(n), self.rings["q"].slot(m)

        def products(x):
            for wg in range(self.plan.consumers):
                right = self.q_smem.at[q, self.zero + wg].transpose((1, 0))
                x.add(self.k_smem.at[k, self.zero + wg], right)
            return x.value()

        a = jnp.where(self.seen(n, m), tiles.accumulate(products, (C, C)), 0.0)
        return a.astype(self.dtype)

    def gradients(self, n, m):
        """dA^T [64 keys, 64 queries] in the inputs' dtype."""
        self, n, m = self.again(n, m)
        v, g = self.rings["v"].slot(n) + self.zero, self.rings["g"].slot(m)

        def products(x):
            for cut in range(self.plan.v // C):
                columns = self.v_smem.at[v, :, pl.ds(cut * C, C)]
                x.add(columns, self.g_smem.at[g, self.zero + cut].transpose((1, 0)))
            return x.value()

        da = tiles.accumulate(products, (C, C))
        da = da + tiles.spread(self.e_smem.at[g], (C, C), 1) * self.first()
        return jnp.where(self.seen(n, m), da, 0.0).astype(self.dtype)

    def seen(self, n, m):
        # Worked out each time: kept from product to product it would take registers.
        rows, columns = lax.optimization_barrier(tiles.iota((C, C), 0)), tiles.iota((C, C), 1)
        seen = (columns & ~7) >= rows - (columns & 7)
        if self.plan.segments:
            kv = self.ids(self.kv_ids_smem.at[self.rings["v"].slot(n)], 0)
            q = self.ids(self.q_ids_smem.at[self.rings["q"].slot(m)], 1)
            seen = seen & (q == kv) & (kv != 0)
        return seen

    def of_added(self, n, x):
        """x in the rows of keys that are in the state after the chunk, else zeros."""
        if not self.plan.segments:
            return x
        self, n = self.again(n)
        kv = self.ids(self.kv_ids_smem.at[self.rings["v"].slot(n)], 0)
        return jnp.where((kv == self.held[self.batch, self.chunk(n) + 1]) & (kv != 0), x, 0.0)

    def values_start(self, n, cut):
        """The state's part of 64 columns of dv."""
        self, n, cut = self.again(n, cut)
        k = self.rings["k"].slot(n)

        def products(x):
            for wg in range(self.plan.consumers):
                x.add(self.k_smem.at[k, self.zero + wg], self.s_smem.at[self.zero + wg, cut])
            return x.value()

        return self.of_added(n, tiles.accumulate(products, (C, C)))

    def features_start(self, n, start: int):
        """The state's part of 64 columns of dphi_k."""
        self, n = self.again(n)
        v, part = self.rings["v"].slot(n) + self.zero, pl.ds(start, C)

        def products(x):
            for cut in range(self.plan.v // C):
                columns = self.v_smem.at[v, :, pl.ds(cut * C, C)]
                state = self.s_smem.at[self.wg, self.zero + cut, part]
                x.add(columns, state.transpose((1, 0)))
            return x.value()

        x = tiles.accumulate(products, (C, C))
        keys = tiles.spread(self.z_smem.at[self.wg, part], (C, C), 1) * self.first()
        return self.of_added(n, x + keys)

    def kept(self, n, state):
        """The state, or zeros where its document does not go on."""
        if not self.plan.segments:
            return state
        self, n = self.again(n)
        return self.reset(self.flags[self.batch, self.chunk(n)], state)

    def after(self, n, m, state):
        """The state with one head's queries of a chunk, which no consumer reads any more."""
        self, n, m = self.again(n, m)
        q, g = self.rings["q"].slot(m) + self.zero, self.rings["g"].slot(m) + self.zero
        mine = self.q_smem.at[q, self.wg]
        if self.plan.segments:
            at = self.chunk(n)

            @pl.when((self.flags[self.batch, at] & sweeps.UNUSED) != 0)
            def _mask():
                self.keep_rows(mine, self.q_ids_smem.at[q], self.held[self.batch, at])

        right = [self.g_smem.at[g, self.zero + cut] for cut in range(len(state))]
        state = self.with_chunk(state, mine, self.e8_smem.at[g], right)
        if self.plan.R > 1:
            plgpu.commit_smem()  # e and ids are read before TMA, another proxy, writes the next
        self.rings["q"].free(m)
        self.rings["g"].free(m)
        return state

    def give_values(self, x, n, cut):
        self, n, cut = self.again(n, cut)
        columns = pl.ds(self.v_part * self.plan.v + cut * C, C)
        target = self.dv.at[self.f_part, self.batch, self.tokens(n), self.group, columns]
        if self.plan.v > C or self.plan.consumers == 1:
            self.give(x, target)
        else:
            pl.when(self.wg == 0)(lambda: self.give(x, target))

    def give_features(self, x, n, start: int):
        self, n = self.again(n)
        columns = pl.ds(self.f_part * self.plan.f + self.wg * self.plan.width + start, C)
        at = self.v_part, self.batch, self.tokens(n), self.group, columns
        self.give(x, self.dphi.at[at])

    def chunk(self, n):
        """The number of the n-th chunk from a piece's end in the whole row."""
        return super().chunk(self.plan.N - 1 - n)

    def tokens(self, n):
        return self.rows(self.plan.N - 1 - n)

    def first(self):
        """1, but 0 in all parts of the values save the first: e and r count once."""
        return 1.0 if self.plan.parts[1] == 1 else jnp.where(self.v_part == 0, 1.0, 0.0)
