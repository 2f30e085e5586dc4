"""The forward kernel's own program: what one step of the grid does.

Tokens are lanes: features are [F, C], weights a^T are [keys, queries] and o^T is [V, queries]. What
belongs to a token is then one row, and a chunk's queries are what the matrix units hold while its
keys' features, the state and the normaliser's sum stream past them.

Matrix units work in the order of the program. So a step takes the sums of one block of tokens and
the features of the next one: no product waits for what came just before it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention import tpu_forward_features, tpu_tiles
from pallas_kernels.linear_attention.reference import EPS
from pallas_kernels.linear_attention.tpu_tiles import LANES, ROWS, turned, whole
from pallas_kernels.products import NN, NT, dot

# The normaliser's sum fills the state's last tile: its rows from here on take the rounding error.
REST = ROWS // 2


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a step: T tokens in chunks of C, `heads` key heads, R query heads of each.

    f: width of z.  V: of values.  steps: blocks of T tokens in a row.
    masked, mapped, biased, state: whether there are rows of `tpu_tiles.tokens`, maps, biases and a
    state before the first token.
    """

    form: str
    T: int
    C: int
    heads: int
    R: int
    f: int
    V: int
    steps: int
    masked: bool
    mapped: bool
    biased: bool
    state: bool

    @property
    def F(self) -> int:
        return tpu_tiles.width(self.form, self.f)

    @property
    def values(self) -> int:
        """Rows of the state that are values; the ROWS after them are the normaliser's sum each."""
        return whole(self.V, ROWS)

    @property
    def items(self) -> int:
        """Chunks of a head in a step."""
        return self.T // self.C * self.heads


def names(shape: Shape) -> list[str]:
    """The operands, in their order; `tokens_before` are the rows of the block before."""
    rows = ["tokens", "tokens_before"] * shape.masked
    maps = ["q_map", "k_map"] * shape.mapped + ["q_bias", "k_bias"] * shape.biased
    return rows + ["q", "k", "v"] + maps + ["before"] * shape.state


def kernel(*refs, shape: Shape):
    """Outputs o, total and state are of the block before, which scratch has the features of."""
    own = names(shape)
    given, rest = dict(zip(own, refs, strict=False)), refs[len(own) :]
    (o, total, state), kept = rest[:3], rest[3:]
    pending, extremes = None, None
    for i in range(shape.items + 1):
        new = _products(shape, given, state, kept, i) if i < shape.items else None
        if pending is not None:
            _finish(shape, o, total, kept, i - 1, pending)
            each = _features(shape, given, kept, i - 1, pending.z)
            extremes = tpu_forward_features.join(extremes, each)
        pending = new
    if extremes is not None:
        again = lambda i: _features(shape, given, kept, i, _project(shape, given, i), exact=True)
        unsafe = tpu_forward_features.unsafe(extremes)
        pl.when(unsafe)(lambda: pl.loop(0, shape.items)(lambda i: again(i) and None))


@dataclasses.dataclass(frozen=True)
class Pending:
    """What the products of a chunk of a head gave.

    weights: a^T [keys, queries] of each query head, rounded, and its sum.  read: what the state
    gives, [values + ROWS, queries].  z: of the next block's queries and keys.
    """

    weights: list
    read: list
    z: tuple


def _products(shape: Shape, given, state, kept, i: int) -> Pending:
    (queries, keys, values), (c, h) = kept, divmod(i, shape.heads)
    rows = _rows(shape, given, "tokens_before", c)
    weights = [_weights(shape, keys[i], queries[i, r], rows) for r in range(shape.R)]
    z = _project(shape, given, i)
    old = state[h]
    if c == 0:
        # Step m has the block of tokens m - 1.
        first = jax.lax.rem(pl.program_id(1) - 1, shape.steps) == 0
        old = jnp.where(first, given["before"][h] if shape.state else 0.0, old)
    readable = _readable(shape, old, keys.dtype)
    read = [_read(readable, queries[i, r], rows) for r in range(shape.R)]
    state[h] = _after(shape, old, keys[i], values[i], rows)
    return Pending(weights, read, z)


def _rows(shape: Shape, given, name: str, c):
    """Rows [1, C] of `tpu_tiles.tokens`, or None."""
    if not shape.masked:
        return None
    at = pl.ds(pl.multiple_of(c * shape.C, LANES), shape.C)
    return [given[name][pl.ds(n, 1), at] for n in range(tpu_tiles.KEEPS + 1)]


def _project(shape: Shape, given, i):
    """z [f, C] of a chunk's queries, for each query head, and of its keys."""
    c, h = i // shape.heads, i % shape.heads
    at = pl.ds(pl.multiple_of(c * shape.C, LANES), shape.C)

    def z(name: str, h):
        x = given[name][h, at]
        if not shape.mapped:
            return turned(x)[: whole(shape.f, ROWS)].astype(jnp.float32)
        z = dot(given[f"{name}_map"][h], x, NT)
        if shape.biased:
            z = z + jnp.tile(given[f"{name}_bias"][h], (1, shape.C // LANES))
        return z

    return [z("q", h * shape.R + r) for r in range(shape.R)], z("k", h)


def _features(shape: Shape, given, kept, i, z, exact: bool = False):
    """Puts a chunk's features and values into scratch; see `tpu_forward_features.features`."""
    (queries, keys, values), c, h = kept, i // shape.heads, i % shape.heads
    at = pl.ds(pl.multiple_of(c * shape.C, LANES), shape.C)
    rows = _rows(shape, given, "tokens", c)
    real = None if rows is None else rows[tpu_tiles.REAL].astype(jnp.float32)
    extremes = None
    for r, one in enumerate(z[0]):
        phi, each = tpu_forward_features.features(shape.form, one, shape.f, None, exact)
        queries[i, r] = phi.astype(queries.dtype)
        extremes = tpu_forward_features.join(extremes, each)
    phi, each = tpu_forward_features.features(shape.form, z[1], shape.f, real, exact)
    keys[i] = turned(phi)[: shape.C, : shape.F].astype(keys.dtype)
    values[i] = turned(given["v"][h, at])[: shape.values]
    return tpu_forward_features.join(extremes, each)


def _weights(shape: Shape, keys, phi, rows):
    """a^T [keys, queries] as the products take it, and its sum over the keys."""
    ends = (None, None) if rows is None else rows[: tpu_tiles.LAST + 1]
    a = jnp.where(tpu_tiles.seen(*ends, shape.C), dot(keys, phi, NN), 0.0)
    return a.astype(phi.dtype), jnp.sum(a, 0, keepdims=True)


def _readable(shape: Shape, state, dtype):
    """The state as the products take it; the normaliser's sum loses nothing by rounding."""
    total = state[shape.values :]
    row = jax.lax.broadcasted_iota(jnp.int32, total.shape, 0)
    high = total.astype(dtype).astype(jnp.float32)
    split = jnp.where(row < REST, high, total - high)
    return jnp.concatenate([state[: shape.values], split], 0).astype(dtype)


def _read(state, phi, rows):
    read = dot(state, phi, NN)
    return read if rows is None else read * rows[tpu_tiles.USES].astype(jnp.float32)


def _after(shape: Shape, state, keys, values, rows):
    """The state after a chunk: its values' rows and its normaliser's."""
    more = jnp.concatenate([values, jnp.ones((ROWS, shape.C), values.dtype)], 0)
    if rows is not None:
        more = (more.astype(jnp.float32) * rows[tpu_tiles.ADDS].astype(jnp.float32)).astype(
            values.dtype
        )
        state = state * rows[tpu_tiles.KEEPS][:, :1].astype(jnp.float32)
    return state + dot(more, keys, NN)


def _finish(shape: Shape, o, total, kept, i: int, pending: Pending):
    """Writes o and total of the queries of a chunk."""
    c, h = divmod(i, shape.heads)
    at, n = pl.ds(c * shape.C, shape.C), shape.values
    for r, (a, sums) in enumerate(pending.weights):
        read = pending.read[r]
        num = dot(kept[2][i], a, NN) + read[:n]
        sums = sums + read[n : n + 1] + read[n + REST : n + REST + 1] + EPS
        result = turned(num * tpu_tiles.inverse(sums))
        o[h * shape.R + r, at] = result[: shape.C, : shape.V].astype(o.dtype)
        total[h * shape.R + r, :, at] = sums
