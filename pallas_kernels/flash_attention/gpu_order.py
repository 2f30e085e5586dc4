"""In which order the Hopper kernel takes pieces of work, and the tiles of keys of each piece.

The sums of softmax do not depend on the order of keys, so tiles that need a mask come first and
bare ones after them: two loops without a branch inside.
"""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention import blocks
from pallas_kernels.flash_attention.reference import Options

CACHE = 32 * 2**20  # bytes of keys and values that stay in 50 MB of L2 beside queries and outputs


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of keys of a block of queries: `masked` with a mask first, `count` in all, >= 1."""

    masked: object
    count: object
    at: Callable  # t -> the tile's index


@dataclasses.dataclass(frozen=True)
class Work:
    """Pieces of work, each a block of T queries of one head.

    Heads whose keys and values fit into L2 together form a section; within it blocks come in turn,
    with causality the longest first, so that cores that take them round robin end together.
    """

    B: int
    H: int
    blocks: int
    section: int
    reverse: bool

    @property
    def pieces(self) -> int:
        return self.B * self.H * self.blocks

    def at(self, n):
        """Batch row, head and block of piece n."""
        s = n // (self.section * self.blocks)
        heads = self.section
        if self.B * self.H % heads:
            heads = jnp.minimum(heads, self.B * self.H - s * heads)
        rest = n - s * (self.section * self.blocks)
        i, head = lax.div(rest, heads), s * self.section + lax.rem(rest, heads)
        return (
            lax.div(head, self.H),
            lax.rem(head, self.H),
            self.blocks - 1 - i if self.reverse else i,
        )


def work(q, k, v, T: int, options: Options) -> Work:
    """How the cores share q [B L H K]; see `Work`."""
    B, L, H, _ = q.shape
    S, G = k.shape[1:3]
    held = S * (k.shape[3] + v.shape[3]) * k.dtype.itemsize
    section = min(max(CACHE // held, 1) * (H // G), B * H)
    return Work(B, H, math.ceil(L / T), section, options.causal)


def by_position(i, T: int, C: int, L: int, S: int, options: Options) -> Tiles:
    """Tiles of C keys for queries [i T, (i + 1) T) without segments, worked out in the kernel."""
    low = i * T + (S - L)
    high = jnp.minimum(i * T + T, L) + (S - L) - 1
    most = math.ceil(S / C)
    whole, stop = (
        0 * low + S,
        0 * low + S,
    )  # ends of the keys that every row sees, and that some see
    if options.causal:
        whole, stop = low + 1, high + 1
    elif options.window is not None:
        whole, stop = low + options.window, high + options.window
    whole, stop = (jnp.clip(x, 0, S) for x in (whole, stop))
    start, bare = 0 * low, 0 * low
    if options.window is not None:
        start = jnp.maximum(low - options.window + 1, 0)
        bare = jnp.maximum(high - options.window + 1, 0)
    blind = stop <= start
    end = lax.div(stop + (C - 1), C)
    begin = jnp.where(blind, end if options.causal else most, lax.div(start, C))
    end = jnp.maximum(begin, jnp.where(blind, begin, end))
    bare = jnp.clip(lax.div(bare + (C - 1), C), begin, end)
    whole = jnp.clip(lax.div(whole, C), bare, end)
    far = jnp.minimum(begin, math.ceil(min(options.first, S) / C))
    return _split(far, begin, bare, whole, end)


def _split(far, begin, bare, whole, end) -> Tiles:
    """Tiles [0, far) and [begin, end), of which [bare, whole) need no mask."""
    right, left = end - whole, bare - begin
    masked = right + left + far
    count = masked + whole - bare

    def at(t):
        middle = jnp.where(t < right + left, begin + t - right, t - right - left)
        outer = jnp.where(t < right, end - 1 - t, middle)
        return jnp.where(t < masked, outer, whole - 1 - (t - masked))

    blind = count == 0
    return Tiles(jnp.where(blind, 1, masked), jnp.where(blind, 1, count), lambda t: at(t) * ~blind)


def listed(T: int, C: int, L: int, S: int, q_segments, kv_segments, options: Options):
    """The same for segments, as a list for each block of queries, int32 [B n 2 + m].

    An entry holds how many tiles need a mask, how many there are, then their indices.
    """
    kinds = jnp.asarray(blocks.kinds(T, C, L, S, q_segments, kv_segments, options))
    rank = jnp.where(kinds == blocks.SOME, 0, jnp.where(kinds == blocks.ALL, 1, 2))
    order = jnp.argsort(rank, axis=2, stable=True).astype(jnp.int32)
    masked = jnp.sum(rank == 0, 2, dtype=jnp.int32)
    count = jnp.sum(rank < 2, 2, dtype=jnp.int32)
    masked = jnp.where(count == 0, 1, masked)
    return jnp.concatenate([masked[..., None], jnp.maximum(count, 1)[..., None], order], 2)


def from_list(lists, b, i) -> Tiles:
    """What `listed` says of block i of batch row b."""
    return Tiles(lists[b, i, 0], lists[b, i, 1], lambda t: lists[b, i, 2 + t])
