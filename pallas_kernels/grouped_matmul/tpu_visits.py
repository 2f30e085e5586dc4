"""Which group meets which tile of rows, in the order in which a TPU's kernels visit them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

LANES = 128


class Visits(NamedTuple):
    """What the scalar core reads, int32 [V] but for `counts`; see `visits`.

    group: whose matrix it is.  source: tile of rows to be read.  target: tile of rows it is about.
    first, last: rows [first, last) of the target that are the group's, counted from its start.
    counts: [2]: visits of groups, and those with the ones after them that only write zeros.
    """

    group: jax.Array
    source: jax.Array
    target: jax.Array
    first: jax.Array
    last: jax.Array
    counts: jax.Array


def visits(sizes, M: int, T: int, rest: bool) -> Visits:
    """Each group's tiles of T rows, in order: a tile is visited once for each group that it holds.

    Visits beyond the real ones repeat the last of these: what they name is there, so that nothing
    is moved for them. There are V = ceil(M / T) + G in all, or one less without the rest.

    Args:
      sizes: rows of each group, int32 [G].
      rest: whether rows of no group are visited too, as one more group; they read what the last
        visit of a group read. Without it an empty group has one visit.
    """
    G, tiles = sizes.shape[0], whole(M, T) // T
    if rest:
        sizes = jnp.concatenate([sizes, M - jnp.sum(sizes, keepdims=True)])
    stop = jnp.cumsum(sizes, dtype=jnp.int32)
    start = stop - sizes
    begin = jnp.minimum(start // T, tiles - 1)
    after = jnp.cumsum(jnp.where(sizes > 0, (stop - 1) // T - begin + 1, 0 if rest else 1))
    counts = jnp.stack([after[G - 1], after[-1]])

    def at(count):
        v = jnp.minimum(jnp.arange(tiles + G - (not rest)), jnp.maximum(count - 1, 0))
        group = jnp.searchsorted(after, v, side="right", method="compare_all")
        group = jnp.minimum(group, after.shape[0] - 1)
        earlier = jnp.where(group > 0, after[group - 1], 0)
        return group, begin[group] + v - earlier

    (group, target), (own, source) = at(counts[1]), at(counts[0])
    first = jnp.maximum(start[group] - target * T, 0)
    last = jnp.minimum(stop[group] - target * T, T)
    found = jnp.minimum(own, G - 1), source, target, first, last, counts
    return Visits(*(x.astype(jnp.int32) for x in found))


def parts(counts: np.ndarray, M: int, part: int) -> tuple[int, int]:
    """How many aligned parts of rows hold rows of a group, each counted for each, and of none."""
    stop = np.cumsum(counts)
    touched = np.where(counts > 0, -(-stop // part) - (stop - counts) // part, 0)
    rest = whole(M, part) // part - stop[-1] // part if stop[-1] < M else 0
    return int(touched.sum()), int(rest)


def check_scalars(M: int, T: int, G: int):
    """Declines tables that do not fit into the scalar memory.

    Raises:
      NotImplementedError: they do not.
    """
    size = 4 * len(Visits._fields) * (whole(M, T) // T + G)
    room = pltpu.get_tpu_info().smem_capacity_bytes * 7 // 8
    if size > room:
        raise NotImplementedError(
            f"{M} rows of {G} groups take {size} bytes of scalar memory in tiles of {T} rows, and "
            f"there are {room}: use larger tiles, or xla."
        )


def whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit
