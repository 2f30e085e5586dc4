"""A grouped product in plain XLA that multiplies each row by one matrix.

On a TPU that is XLA's own ragged product. Elsewhere XLA makes of it a product of all rows with all
matrices, so here a group's rows are taken in blocks, large ones and then small ones for the rest.
How many there are is known only when it runs, which a loop's count may be: nothing differentiates
through it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

# Rows of a block: large ones for speed, small ones because half of a group's last one is wasted.
ROWS = {"cpu": (128, 32), "gpu": (1024, 128)}
# Dimensions that a product sums over, of x and of w, of both rows' or of the rows themselves.
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


def forward(x, w, sizes, config=None):
    """y [M N] in x's dtype."""
    del config
    return _by_group(x, w, sizes, NN)


def backward(x, w, sizes, dy, config=None):
    """dx [M K] and dw [G K N]."""
    del config
    return _by_group(dy, w, sizes, NT), _of_groups(x, dy, sizes).astype(w.dtype)


def _by_group(x, w, sizes, contract):
    """Each row times its group's matrix (NN) or the transpose of it (NT), 0 for a row of none."""
    if dispatch.platform() == "tpu":
        return _ragged(x, w, sizes, contract)

    def group(y, own):
        matrix, first, last = own

        def block(at, mine, y):
            rows = _dot(_slice(x, at, mine), matrix, contract).astype(y.dtype)
            rows = jnp.where(mine, rows, _slice(y, at, mine))
            return jax.lax.dynamic_update_slice_in_dim(y, rows, at, 0)

        return _blocks(len(x), first, last, block, y), None

    width = w.shape[2] if contract == NN else w.shape[1]
    y = dispatch.like((x, w, sizes), jnp.zeros((len(x), width), x.dtype))
    return jax.lax.scan(group, y, (w, *_edges(sizes)))[0]


def _of_groups(x, dy, sizes):
    """`x_g^T dy_g` of each group, [G K N] float32."""
    if dispatch.platform() == "tpu":
        return _ragged_sums(x, dy, sizes)

    def group(dw, own):
        g, first, last = own

        def block(at, mine, dw):
            # Both, as what other groups' rows hold may be infinite.
            pair = (jnp.where(mine, _slice(rows, at, mine), 0) for rows in (x, dy))
            return dw.at[g].add(_dot(*pair, TN))

        return _blocks(len(x), first, last, block, dw), None

    wide = jnp.promote_types(x.dtype, jnp.float32)
    dw = jnp.zeros((len(sizes), x.shape[1], dy.shape[1]), wide)
    dw = dispatch.like((x, dy, sizes), dw)
    return jax.lax.scan(group, dw, (jnp.arange(len(sizes)), *_edges(sizes)))[0]


def _blocks(rows: int, first, last, body: Callable, carry):
    """`carry = body(at, mine, carry)` for blocks that together hold the rows from first to last.

    A block begins at row `at`; mine [C 1] are those of its C rows that no other block has: the last
    may reach beyond the group and, where the rows end, begin before it.
    """
    if not rows:
        return carry

    def loop(C: int, count, first, carry):
        def step(i, carry):
            start = first + i * C
            at = jnp.minimum(start, rows - C)
            row = at + jnp.arange(C)
            return body(at, ((row >= start) & (row < last))[:, None], carry)

        return jax.lax.fori_loop(0, count, step, carry)

    large, small = (min(C, rows) for C in ROWS[dispatch.platform()])
    count = (last - first) // large
    carry = loop(large, count, first, carry)
    first += count * large
    return loop(small, -((first - last) // small), first, carry)


def _edges(sizes):
    """First row of each group, and the row after its last, [G] each."""
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    return ends - sizes, ends


def _slice(x, at, mine):
    return jax.lax.dynamic_slice_in_dim(x, at, len(mine), 0)


def _dot(a, b, contract):
    return jax.lax.dot_general(a, b, (contract, ((), ())), **_exactly(a.dtype))


def _ragged(x, w, sizes, contract):
    """`_by_group` as XLA's operation, which does not say what rows of no group give."""
    (lhs,), (rhs,) = contract
    dims = jax.lax.RaggedDotDimensionNumbers((((lhs,), (rhs + 1,)), ((), ())), [0], [0])
    y = jax.lax.ragged_dot_general(x, w, sizes, dims, **_exactly(x.dtype))
    return jnp.where(_of_any(x, sizes), y, 0).astype(x.dtype)


def _ragged_sums(x, dy, sizes):
    """`_of_groups` as XLA's operation, which does not say that it leaves out rows of no group."""
    dims = jax.lax.RaggedDotDimensionNumbers((TN, ((), ())), [0], [])
    pair = (jnp.where(_of_any(x, sizes), rows, 0) for rows in (x, dy))
    return jax.lax.ragged_dot_general(*pair, sizes, dims, **_exactly(x.dtype))


def _of_any(x, sizes):
    return (jnp.arange(len(x)) < jnp.sum(sizes))[:, None]


def _exactly(dtype) -> dict:
    """Sums in float32, and float32 at full accuracy."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    wide = jnp.promote_types(dtype, jnp.float32)
    return {"precision": precision, "preferred_element_type": wide}
