"""Which rows a thread block of the Hopper kernels takes, and in which order.

Tiles are laid group by group, so that no product mixes groups. TMA copies whole blocks of 8 rows:
a group's first tile begins at the multiple of 8 at or before its first row, and its last tile may
end behind its last row. Rows of others in a tile are worked out and not kept.
"""

import jax.numpy as jnp
from jax import lax

ALIGN = 8  # rows that TMA copies at once


def visits(sizes, M: int, T: int):
    """The tiles of T rows that cover [0, M), group by group, those of no group last, as group G.

    Returns:
      visits int32 [V 4]: first row / 8, the first row of the tile that is of the group, the row
      after its last one, the group; count int32 [1]: how many there are, of V.
    """
    G, V = sizes.shape[0], most(M, sizes.shape[0], T)
    starts, ends, blocks = _spans(sizes)
    starts, ends = (jnp.append(x, last) for x, last in ((starts, ends[-1]), (ends, M)))
    blocks = jnp.append(blocks, ends[-2] // ALIGN)
    tiles = jnp.where(ends > starts, _ceil(ends - ALIGN * blocks, T), 0)
    after = jnp.cumsum(tiles, dtype=jnp.int32)
    v = jnp.arange(V, dtype=jnp.int32)
    # The default method is a loop of small kernels.
    group = jnp.minimum(jnp.searchsorted(after, v, side="right", method="compare_all"), G)
    block = blocks[group] + (v - (after - tiles)[group]) * (T // ALIGN)
    low = jnp.maximum(starts[group] - ALIGN * block, 0)
    # Zeros may be stored beyond the last row: TMA clips them.
    high = jnp.where(group == G, T, jnp.minimum(ends[group] - ALIGN * block, T))
    return jnp.stack([block, low, high, group], 1), after[-1:]


def most(M: int, G: int, T: int) -> int:
    """Tiles of `visits` at most: a group adds fewer than one tile and 7 rows to those it fills."""
    return (M + (G + 1) * (T + ALIGN - 2)) // T


def spans(sizes, D: int):
    """The steps of D rows over each group.

    Returns:
      int32 [G 4]: first row / 8 of the first step, the steps, the first row of the first step that
      is of the group, the row after the last one in the last step.
    """
    starts, ends, blocks = _spans(sizes)
    steps = jnp.where(sizes > 0, _ceil(ends - ALIGN * blocks, D), 0)
    high = ends - ALIGN * blocks - D * (steps - 1)
    return jnp.stack([blocks, steps, starts - ALIGN * blocks, high], 1)


def place(t, rows, columns: int, panel: int):
    """Row and column of tile t of a grid [rows columns] that is gone through by panels of rows."""
    before = lax.div(t, panel * columns) * panel
    rest, height = t - before * columns, jnp.minimum(rows - before, panel)
    return before + lax.rem(rest, height), lax.div(rest, height)


def _spans(sizes):
    """First row, row after the last, and first row / 8, of every group."""
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    starts = ends - sizes
    return starts, ends, starts // ALIGN


def _ceil(x, size: int):
    return (x + size - 1) // size
