"""What linear attention remembers of the keys so far, and how two such memories join."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class State(NamedTuple):
    """Sums over the keys of one document of a row.

    values: sum_j phi(k_j) v_j^T.  keys: sum_j phi(k_j).  segment: the document, 0 for none yet.
    """

    values: Float[Array, "B G F V"]
    keys: Float[Array, "B G F"]
    segment: Int[Array, "B"]


def merge(before: State, after: State) -> State:
    """The state after `after`'s tokens, which came in a row after `before`'s. Associative.

    What came before counts where its document goes on, or where nothing came after.
    """
    nothing = after.segment == 0
    goes_on = nothing | (before.segment == after.segment)
    add = lambda a, b: b + jnp.where(goes_on.reshape(-1, *(1,) * (a.ndim - 1)), a, 0)
    segment = jnp.where(nothing, before.segment, after.segment)
    return State(add(before.values, after.values), add(before.keys, after.keys), segment)


def held(kv_segments: Int[Array, "B L"], before: Int[Array, "B"], C: int) -> Int[Array, "B M"]:
    """The document that the state holds on entering each chunk of C keys, and after the last one.

    It is that of the last key so far that is not padding. M = L / C + 1; C divides L.
    """
    L = kv_segments.shape[1]
    # A later key outranks an earlier one, and padding outranks none.
    rank = jnp.where(kv_segments != 0, jnp.arange(1, L + 1)[None], 0)
    # With a first entry of none: a slice of one element would lose the row's layout.
    last = jax.lax.cummax(jnp.pad(rank, ((0, 0), (1, 0))), axis=1)[:, ::C]
    at = jnp.take_along_axis(kv_segments, jnp.maximum(last - 1, 0), 1)
    return jnp.where(last > 0, at, before[:, None])
