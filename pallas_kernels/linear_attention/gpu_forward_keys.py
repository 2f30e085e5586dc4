"""The keys' side of a chunk: their features, their sum, and the state; the pass that needs no more.

`States` gives what the keys of each piece of a row add to the state, so that the pieces can be
worked on at once.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import gpu_tiles as tiles
from pallas_kernels.flash_attention.gpu_tiles import WGMMA
from pallas_kernels.linear_attention import gpu_maps
from pallas_kernels.linear_attention.gpu_forward_block import COLUMN, KEPT, MIXED, Block, C, Shape


class Keys(Block):
    """A thread block that follows the keys."""

    def map(self, name: str, at):
        """Writes the features of a chunk's queries or keys."""
        target = getattr(self, f"phi_{name}")
        for cut, phi in self.features(name, at):
            target[at.team, :, cut] = phi

    def features(self, name: str, at):
        """(columns, features [64 64] there) of a chunk, in the dtype of the products."""
        shape = self.shape
        plgpu.barrier_wait(self.full_at(name, at.slot))
        size = shape.f if shape.form in gpu_maps.TOGETHER else min(shape.f, gpu_maps.PIECE)
        for start in range(0, shape.f, size):
            stop = min(start + size, shape.f)
            z = self.project(name, at, slice(start, stop))
            if stop == shape.f:
                plgpu.commit_smem()
                plgpu.barrier_arrive(getattr(self, f"{name}_empty").at[at.slot])
            later = lambda: plgpu.load(self.zeros.at[at.group], layout=COLUMN, optimized=False)
            halves = gpu_maps.of(shape.form, z, shape.width - start, later)
            for half, (phi, scale) in enumerate(halves):
                for i in range(0, stop - start, 64):
                    part = phi[:, i : i + 64]
                    if scale is not None:
                        scale = gpu_maps.after(scale, later())
                        part = part * gpu_maps.wide(scale, part)
                    column = half * shape.f + start + i
                    yield slice(column, column + 64), part.astype(shape.dtype)

    def project(self, name: str, at, columns: slice):
        """z [64 n] float32 of some columns."""
        size, tile = (C, columns.stop - columns.start), getattr(self, f"{name}_tile").at[at.slot]
        if not self.shape.mapped:
            x = plgpu.load(tile.at[:, columns], layout=WGMMA, optimized=False)
            return x.astype(jnp.float32)
        z = tiles.mma(size, tile, getattr(self, f"{name}_map_tile").at[at.team, :, columns])
        if not self.shape.biased:
            return z
        bias = self.biases.at[at.team, self.mapped.index(name), columns]
        return z + tiles.spread(bias, size, 1)

    def add_keys(self, at):
        """Adds the chunk's phi_k to their sum: a product with ones, exact in float32."""
        adds = self.adds_tile.at[at.v].transpose((1, 0))
        for i in range(0, self.shape.F, 64):
            cut = slice(i, i + 64)
            # Its 8 columns are alike.
            new = tiles.mma((64, 8), self.phi_k.at[at.team, :, cut].transpose((1, 0)), adds)
            old = plgpu.load(self.keys_tile.at[at.team, cut], layout=COLUMN, optimized=False)
            self.keys_tile[at.team, cut] = self.kept(old, at) + jnp.max(new, axis=1)

    def kept(self, x, at):
        """A sum as it is before the chunk's keys are added: 0 if their document is another."""
        if not self.shape.segments:
            return x
        zeros = lambda x: tiles.full(x.shape, 0.0, WGMMA if x.ndim == 2 else COLUMN)
        return lax.cond((self.flags[self.b, at.N] & KEPT) != 0, lambda x: x, zeros, x)

    def drop(self, at):
        """Sets the values of keys that are not in the state after the chunk to 0."""
        v = self.v_tile.at[at.v, at.w]

        @pl.when((self.flags[self.b, at.N] & MIXED) != 0)
        def _():
            kv = tiles.spread(self.ids.at[at.v, 1], (C, 64), 0)
            x = plgpu.load(v, layout=WGMMA, optimized=False)
            v[...] = jnp.where((kv & 1) != 0, x, jnp.zeros((), x.dtype))
            plgpu.commit_smem()

    def add_values(self, at, S):
        """The state after the chunk."""
        v = self.v_tile.at[at.v, at.w].transpose((1, 0))
        return tiles.mma(self.kept(S, at), v, self.phi_k.at[at.team])

    def free(self, at):
        """Gives the chunk's values back to be overwritten, and waits for the others."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.v_empty.at[at.v])
        self.meet("done", at)

    def write_state(self, at, S, values, keys):
        """To device memory; values [V F] and keys [F]."""
        values[pl.ds(at.column, 64)] = S

        @pl.when((self.part == 0) & (at.w == self.shape.W - 1))
        def _():
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.keys_tile.at[at.team], keys)


class States(Keys):
    """What the keys of each piece add to the state: values [B G P V F] and keys [B G P F]."""

    @staticmethod
    def starts(shape: Shape) -> bool:
        return False

    def chunk(self, at, S):
        last = at.w == self.shape.W - 1
        pl.when(last)(lambda: self.map("k", at))
        self.meet("features", at)
        plgpu.barrier_wait(self.v_full.at[at.v])
        pl.when(last)(lambda: self.add_keys(at))
        if self.shape.segments:
            self.drop(at)
        S = self.add_values(at, S)
        self.meet("weights", at)
        self.free(at)
        return S

    def finish(self, at, S):
        place = self.b, at.g, self.piece
        self.write_state(at, S, self.values.at[place], self.keys.at[place])
