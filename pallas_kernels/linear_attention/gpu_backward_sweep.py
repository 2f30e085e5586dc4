"""What the two sweeps of the gradients' kernels share: loads, the state, who meets whom.

A thread block goes through the chunks of one piece of a row for one key head, with a part of the
features and a part of the values' columns. Its state, a part of [F V], is float32 in the registers
of the consumers, each of which has some features; for the products of a chunk it is written to
shared memory in the inputs' dtype.
"""

import dataclasses
import math
import types

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import gpu_tiles as tiles
from pallas_kernels.linear_attention.gpu_backward_rings import Ring

C = 64  # tokens a chunk: rows of one matrix instruction
COLUMN = tiles.WGMMA.reduce(1)
EIGHT = 8  # columns of the smallest product: the sum of features is one with eight columns
PARTIAL_KEYS, UNUSED, RESET = 1, 2, 4  # flags of a chunk


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one sweep.

    B, H, G, F, V: of the call, F and V padded. N: chunks of a piece of a row. pieces: of a row.
    f, v: features and columns of values that a thread block has. stages: tiles of each kind in
    shared memory, at most. segments: whether there are any. enters: whether a state comes in.
    leaves: whether the state of the row's end is asked for.
    """

    B: int
    H: int
    G: int
    F: int
    V: int
    N: int
    pieces: int
    f: int
    v: int
    stages: int
    segments: bool
    enters: bool
    leaves: bool

    @property
    def R(self) -> int:
        return self.H // self.G

    @property
    def consumers(self) -> int:
        return 2 if self.f > C else 1

    @property
    def width(self) -> int:
        """Features of a consumer."""
        return self.f // self.consumers

    @property
    def parts(self) -> tuple[int, int]:
        """Of features and of values."""
        return self.F // self.f, self.V // self.v

    @property
    def blocks(self) -> int:
        return self.B * self.G * self.pieces * math.prod(self.parts)


class Sweep(types.SimpleNamespace):
    """The references of a kernel by name, and where this thread block and warpgroup are."""

    def __init__(self, plan: Plan, stages: dict[str, int], **refs):
        super().__init__(plan=plan, zero=0, **refs)
        self.wg, rest = lax.axis_index("wg"), lax.axis_index("block")
        self.dtype = self.k_smem.dtype
        sizes = (*plan.parts, plan.pieces, plan.G)
        at = []
        for size in sizes:
            at.append(lax.rem(rest, jnp.int32(size)))
            rest = lax.div(rest, jnp.int32(size))
        (self.f_part, self.v_part, self.piece, self.group), self.batch = at, rest
        full, empty = (
            (lambda n: getattr(self, f"{n}_full")),
            (lambda n: getattr(self, f"{n}_empty")),
        )
        self.rings = {name: Ring(full(name), empty(name), s) for name, s in stages.items()}

    def again(self, *numbers):
        """This and the numbers, as if they could have changed.

        Addresses and descriptors that a loop's body works out from them then take no registers
        outside, nor from one product to the next.
        """
        found = types.SimpleNamespace.__new__(type(self))
        found.__dict__.update(vars(self))
        names = "zero", "wg", "f_part", "v_part", "piece", "group", "batch"
        places = tuple(jnp.int32(getattr(self, n)) for n in names)
        places, numbers = lax.optimization_barrier((places, tuple(map(jnp.int32, numbers))))
        found.__dict__.update(zip(names, places, strict=True))
        return found, *numbers

    def rows(self, chunk):
        """The tokens of a chunk of this piece."""
        return pl.ds((self.piece * self.plan.N + chunk) * C, C)

    def features(self, wg):
        """The features of a consumer."""
        return pl.ds(self.f_part * self.plan.f + wg * self.plan.width, self.plan.width)

    @property
    def values(self):
        return pl.ds(self.v_part * self.plan.v, self.plan.v)

    # The producer's.

    def load_features(self, name: str, source, n, rows, head):
        """One tile of features a consumer into a ring."""
        slot, full = self.rings[name].claim(n)
        for wg in range(self.plan.consumers):
            part = source.at[self.batch, rows, head, self.features(wg)]
            plgpu.copy_gmem_to_smem(part, getattr(self, f"{name}_smem").at[slot, wg], full)
        return slot, full

    def load_values(self, n, rows):
        slot, full = self.rings["v"].claim(n)
        part = self.v.at[self.batch, rows, self.group, self.values]
        plgpu.copy_gmem_to_smem(part, self.v_smem.at[slot], full)
        if self.plan.segments:
            mine = self.kv_ids.at[self.batch, rows]
            plgpu.copy_gmem_to_smem(mine, self.kv_ids_smem.at[slot], full)

    # The consumers'.

    def chunk(self, n):
        """The number of a chunk in the whole row."""
        return self.piece * self.plan.N + n

    def enter(self, columns: int):
        """The state before this piece: values [width columns], as many as fit.

        Its keys' part [width] is in shared memory, `z_smem`, which only this consumer reads.
        """
        width, cuts = self.plan.width, self.plan.v // columns
        if not self.plan.enters:
            self.z_smem[self.wg] = tiles.full((width,), 0.0, COLUMN)
            return tuple(tiles.full((width, columns), 0.0) for _ in range(cuts))
        at = self.piece, self.batch, self.group, self.features(self.wg)
        self.z_smem[self.wg] = plgpu.load(self.keys_in.at[at], layout=COLUMN, optimized=False)
        found = []
        for cut in range(cuts):
            part = pl.ds(self.v_part * self.plan.v + cut * columns, columns)
            source = self.values_in.at[*at, part]
            found.append(plgpu.load(source, layout=tiles.WGMMA, optimized=False))
        return tuple(found)

    def ids(self, ref, dim: int):
        return tiles.spread(ref, (C, C), dim)

    def reset(self, flags, values):
        """The state, or zeros where its document does not go on."""
        kept = jnp.where((flags & RESET) != 0, 0.0, 1.0)
        self.z_smem[self.wg] = self.keys_state() * kept
        return tuple(x * kept for x in values)

    def keys_state(self):
        return plgpu.load(self.z_smem.at[self.wg], layout=COLUMN, optimized=False)

    def keep_rows(self, ref, ids, document):
        """Zeros in the rows of a tile in shared memory that are not of this document."""
        ids = plgpu.load(ids, layout=COLUMN, optimized=False)
        factor = jnp.where((ids == document) & (ids != 0), 1.0, 0.0).astype(self.dtype)
        for start in range(0, ref.shape[1], C):
            part = ref.at[:, pl.ds(start, C)]
            part[...] = plgpu.load(part, layout=tiles.WGMMA) * along(factor, 0)
        plgpu.commit_smem()

    def with_chunk(self, values, features, eight, right):
        """The state with a chunk's products: features [C width] and what they are multiplied with.

        values: the state's, [width ..] each. eight: [8 C], whose rows' products are summed for the
        keys. right: [C ..] for each of values.
        """

        def products(*sums):
            *values, keys = sums
            for x, b in zip(values, right, strict=True):
                x.add(features.transpose((1, 0)), b)
            keys.add(features.transpose((1, 0)), eight.transpose((1, 0)))
            return tuple(x.value() for x in sums)

        *values, keys = tiles.accumulate(products, *values, (self.plan.width, EIGHT))
        self.z_smem[self.wg] = self.keys_state() + jnp.sum(keys, axis=1)
        return tuple(values)

    def give(self, x, target):
        """Writes a tile [64 64] to device memory, while the next one is worked out."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.out_smem[self.wg] = x.astype(self.out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.out_smem.at[self.wg], target)


def along(x, dim: int, shape=(C, C)):
    """A vector, in the layout of that dimension, over a tile."""
    return lax.broadcast_in_dim(x, shape, (dim,))
