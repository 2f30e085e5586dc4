"""Tokens to the shards that hold their experts, and what the experts make of them back.

A shard sorts its assignments of tokens to experts, sends each shard those for its experts, and gets
results back by the same way. Rows are moved by gathers only: a gradient is read through the inverse
permutation, in the order of what it is for, where XLA's own would add rows in one by one (scatter).

S shards, E experts of which shard s holds E/S from s E/S on, T tokens of a shard with k choices
each, P rows of room for what a shard sends to a shard (itself included).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

RAGGED = "tpu", "gpu"  # platforms whose XLA has a ragged all-to-all


def exchange(
    op: Callable,
    x: jax.Array,
    chosen: jax.Array,
    experts: int,
    *,
    axis: str | None = "expert",
    room: int | None = None,
    method: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`op` of the experts that tokens chose; per shard, where mesh axis `axis` is manual.

    Args:
      op: (rows `[Q D]`, sizes `[E/S]`) -> `[Q D]`, for the shard's own experts: the first sizes[0]
        rows are for its first expert, and so on. Those beyond sum(sizes) are zeros; what op makes
        of them goes nowhere, nor does the gradient that it gives them.
      x: `[T D]`, this shard's tokens.
      chosen: Int `[T k]`, numbers of experts, a token's all different; E for none.
      experts: E, of all shards.
      axis: None for one shard without a mesh axis.
      room: P; None for the worst case, T min(k, E/S), which loses nothing. Rows beyond are lost: of
        a shard's assignments to a shard, in order of expert and then token, the last.
      method: 'padded', an all-to-all of equal parts; 'ragged', of the rows there are (TPU and GPU);
        None: ragged on a TPU, padded elsewhere. On GPUs ragged ones are asked for by name, because
        schedules with overlap have been seen to corrupt them (marin#8081).

    Returns:
      y `[T k D]`: for each choice, in op's dtype; 0 without a gradient where it is none or lost.
      lost: Bool `[T k]`.

    op sees Q = S P rows, of which sum(sizes) are somebody's; without `room` that is every token of
    all shards min(k, E/S) times. Besides what op holds: padded sends S P rows each way, and holds
    them twice at a time; ragged sends what is used, and holds T k rows as they are sent, S P as
    they come and, on a TPU, the S P zeros that they are written over: more than padded does. The
    gradient needs as much again; what is kept for it is numbers of rows.

    Raises ValueError for shapes, a `room` below 1, experts that the shards do not divide or an
    unknown method, NotImplementedError for 'ragged' where XLA has it not.
    """
    S = 1 if axis is None else jax.lax.axis_size(axis)
    _check(x, chosen, experts, S, room)
    ragged = _ragged(method, S)
    x, chosen = _vary(x, chosen, *([] if S == 1 else [jax.lax.axis_index(axis)]))[:2]
    T, k = chosen.shape
    P = T * min(k, experts // S)
    P = P if room is None else min(room, P)
    chosen = chosen.reshape(-1)
    send = _sending(chosen, experts, S, P)
    # Slices lie without gaps; of what is not in one, zeros come back.
    source, slot = (send.order, send.place) if ragged else send.parts(P)
    rows = _rows(x, source // k, slot.reshape(T, k))
    run = functools.partial(_same_shape, op)
    if ragged:
        out = _by_slices(run, rows, send, P, axis)
    elif S > 1:
        out = _by_parts(run, rows, send, P, axis)
    else:
        out = run(rows, send.kept[0])
    y, lost = _rows(out, slot, source[:, None]), (chosen < experts) & ~send.sent
    return y.reshape(T, k, -1), lost.reshape(T, k)


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': of the devices the program is traced for, which may not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


class _Sending(NamedTuple):
    """A shard's assignments in order of expert, those to none last; each has a place there.

    order `[T k]`: the assignment at each place.  place `[T k]`: of each assignment.
    starts `[S E/S]`: the places where experts' assignments begin.
    kept `[S E/S]`: how many of them are sent.  sent Bool `[T k]`: whether an assignment is.
    slot `[T k]`: its place where each shard's assignments are spread to parts of P places.
    """

    order: jax.Array
    place: jax.Array
    starts: jax.Array
    kept: jax.Array
    sent: jax.Array
    slot: jax.Array

    def parts(self, P):
        """(the assignment in each slot, T k for none; each assignment's slot, S P for none)."""
        S, N, at = len(self.kept), len(self.order), jnp.arange(P)[None]
        used = at < jnp.sum(self.kept, 1, keepdims=True)
        source = self.order.at[self.starts[:, :1] + at].get(mode="fill", fill_value=N)
        return jnp.where(used, source, N).reshape(-1), jnp.where(self.sent, self.slot, S * P)


def _sending(chosen, E, S, P):
    """chosen: `[T k]` in one dimension."""
    order = jnp.argsort(chosen)
    place = jnp.argsort(order)
    sizes = jnp.sum(chosen[:, None] == jnp.arange(E)[None], 0, dtype=jnp.int32)
    starts = (jnp.cumsum(sizes) - sizes).reshape(S, E // S)
    first = starts[:, 0]
    kept = jnp.clip(P - (starts - first[:, None]), 0, sizes.reshape(starts.shape))
    slot = _moved(place, first, P * jnp.arange(S) - first)
    sent = (chosen < E) & (slot < (chosen // (E // S) + 1) * P)
    return _Sending(order, place, starts, kept, sent, slot)


def _by_parts(op, rows, send, P, axis):
    """op on rows `[S P D]` that are sent in equal parts; its results in their places."""
    swap = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0)
    arrived = swap(send.kept, tiled=True)
    there, back = _by_expert(arrived, P)
    rows = _rows(swap(rows, tiled=True), there, back[:, None])
    out = op(rows, jnp.sum(arrived, 0))
    return swap(_rows(out, back, there[:, None]), tiled=True)


def _by_expert(arrived, P):
    """Between rows that arrived in parts of P from each shard and their order of expert.

    arrived `[S E/S]`: how many from each shard for each expert.

    Returns (the slot of each row in order, the row of each slot), S P for none.
    """
    S, at = len(arrived), jnp.arange(len(arrived) * P)
    slots = P * jnp.arange(S)[:, None] + jnp.cumsum(arrived, 1) - arrived
    landed = _landed(arrived)
    there = _moved(at, landed.T.reshape(-1), (slots - landed).T.reshape(-1))
    back = _moved(at, slots.reshape(-1), (landed - slots).reshape(-1))
    used = jnp.arange(P)[None] < jnp.sum(arrived, 1, keepdims=True)
    there = jnp.where(at < jnp.sum(arrived), there, S * P)
    return there, jnp.where(used.reshape(-1), back, S * P)


def _landed(arrived):
    """Where rows for each expert from each shard begin, `[S E/S]`, when put in order of expert."""
    sizes = arrived.T.reshape(-1)
    return (jnp.cumsum(sizes) - sizes).reshape(arrived.T.shape).T


def _moved(at, starts, shifts):
    """Places `at`, each moved as the run that it is in. starts, shifts: of the runs, in order.

    Compares each place with each start instead of looking shifts up: XLA reduces as it compares.
    """
    steps = jnp.diff(shifts, prepend=0)
    return at + jnp.sum(jnp.where(at[:, None] >= starts[None], steps[None], 0), 1)


class _Slices(NamedTuple):
    """A ragged all-to-all: a slice for each expert goes from here, and one comes from each shard
    for each expert here, all int32 `[E]`.

    at: where own slices begin.  sizes: of them.  landing: where they begin at their receivers.
    origin, arrived, landed: at, sizes and landing of what comes, as its senders have them.
    """

    at: jax.Array
    sizes: jax.Array
    landing: jax.Array
    origin: jax.Array
    arrived: jax.Array
    landed: jax.Array

    def back(self):
        return _Slices(self.landed, self.arrived, self.origin, self.landing, self.sizes, self.at)


def _by_slices(op, rows, send, P, axis):
    """op on rows `[T k D]` of which every expert's go right to their place in order of expert."""
    swap = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0)
    told = swap(jnp.stack([send.kept, send.starts], 1), tiled=True)
    arrived, origin = told[:, 0], told[:, 1]
    # Offsets of a ragged all-to-all are those at the receiver, who alone knows what others send.
    landed = _landed(arrived)
    landing = swap(landed, tiled=True)
    slices = (send.starts, send.kept, landing, origin, arrived, landed)
    there = _Slices(*(s.reshape(-1) for s in slices))
    out = op(_sent(rows, there, len(arrived) * P, axis), jnp.sum(arrived, 0))
    return _sent(out, there.back(), len(rows), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sent(x, slices, count, axis):
    """`count` rows: those of x that arrive, and zeros."""
    zeros = _vary(jnp.zeros((count, x.shape[1]), x.dtype), x)[0]
    return jax.lax.ragged_all_to_all(
        x, zeros, slices.at, slices.sizes, slices.landing, slices.arrived, axis_name=axis
    )


_sent.defvjp(
    lambda x, slices, count, axis: (_sent(x, slices, count, axis), (slices, len(x))),
    lambda count, axis, saved, dy: (_sent(dy, saved[0].back(), saved[1], axis), None),
)


@jax.custom_vjp
def _rows(x, there, back):
    """Rows of x `[N D]` at `there` `[M]`, and zeros where that is N: `[M D]`.

    back `[N n]`: where in the result each row of x is, once for each of n; M for nowhere.
    """
    return x.at[there].get(mode="fill", fill_value=0)


def _rows_gradient(back, dy):
    parts = dy.at[back].get(mode="fill", fill_value=0)
    return jnp.sum(parts, 1), None, None  # bfloat16 too is added up in float32 by jnp.sum


_rows.defvjp(lambda x, there, back: (_rows(x, there, back), back), _rows_gradient)


def _vary(*args):
    """Marks what differs over manual axes in one argument as differing in all."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in args))
    missing = lambda x: tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
    return [jax.lax.pcast(x, missing(x), to="varying") if missing(x) else x for x in args]


def _same_shape(op, rows, sizes):
    out = op(rows, sizes)
    if out.shape != rows.shape:
        raise ValueError(f"op gives {out.shape} for rows of {rows.shape}; it must keep the shape.")
    return out


def _ragged(method, S):
    """Whether rows are sent by a ragged all-to-all; one shard sends none."""
    if method not in (None, "padded", "ragged"):
        raise ValueError(f"No method is called {method!r}; there are: padded, ragged.")
    where = platform()
    if method == "ragged" and S > 1 and where not in RAGGED:
        raise NotImplementedError(
            f"XLA has no ragged all-to-all on a {where}: use method='padded', or None."
        )
    return S > 1 and (method == "ragged" or (method is None and where == "tpu"))


def _check(x, chosen, experts, S, room):
    if x.ndim != 2 or chosen.ndim != 2 or len(x) != len(chosen):
        raise ValueError(f"x {x.shape} must be [T D], and chosen {chosen.shape} [T k] beside it.")
    if not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise ValueError(f"chosen must hold numbers of experts, not {chosen.dtype}.")
    if experts < 1 or experts % S:
        raise ValueError(f"{experts} experts do not divide over {S} shards.")
    if room is not None and room < 1:
        raise ValueError(f"room is {room}; it must be 1 row or more, or None for the worst case.")
