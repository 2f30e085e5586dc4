"""Operations that carry a state along the length, where the length is divided over `context`.

Each device sums up its own piece of the row as if nothing came before it, the sums are joined into
the state that enters each piece, and the operation runs on the piece with that. What is sent is
states, which do not grow with the length as keys and values do.

With n pieces, a device receives 1 + ceil(log2(n - 1)) states one after another: each piece's goes
to the next one, and then, in rounds, what covers 1, 2, 4 .. pieces goes on as far (the scan of
Hillis and Steele, doi 10.1145/7902.7903). Steps along a ring (LASP, arXiv 2404.02882) are n - 1
rounds, and n - 1 states come to be received and kept where all are gathered (LASP-2, arXiv
2502.07563). Up to n = 4 that is as many bytes; beyond, a state of megabytes costs more than the
latency of a round. On a torus a gather uses both directions of a ring and may take half the time of
the scan, but still the memory of n states. The gradient takes the same rounds backwards.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from parallel.manual import manual
from parallel.rules import layout_of

AXIS = "context"


def prefix(op: Callable, state_of: Callable, merge: Callable) -> Callable:
    """`op` for rows whose length may be divided over `context`; `op` itself where it is not.

    rows: a tree of arrays `[B L ..]`.  weights: a tree of arrays without a length.  A state is a
    tree of arrays without a length either; None leaves and None for the state before are allowed.

    op(rows, weights, state) -> (outputs `[B L ..]`, state after the rows).
    state_of(rows, weights) -> the state after the rows where nothing is before them.
    merge(before, after) -> the state after both, associative. A state of zeros is that of nothing.

    Returns:
      call(rows, weights, state=None) -> (outputs, state after the whole row), differentiable. That
      state costs a reduction where something reads it.

    Raises ValueError as `manual` does. op and state_of run per shard of `context`, in an unchecked
    region where the other axes are Explicit still.
    """

    def call(rows, weights, state=None):
        if not divided(rows):
            return op(rows, weights, state)
        run = functools.partial(_piece, op, state_of, merge)
        specs, out = (P(None, AXIS), P(), P()), (P(None, AXIS), P())
        return manual(run, AXIS, specs, out, check=False)(rows, weights, state)

    return call


def linear(attend: Callable, state_of: Callable, merge: Callable) -> Callable:
    """`attend`, which takes and gives what `linear_attention` does, for lengths that are divided.

    state_of: its summary of keys and values.  merge: of its states. Everything else is as there; in
    pieces, the states that enter them bear the checkpoint name 'attention' as its outputs do.
    """

    @functools.wraps(attend)
    def call(
        q, k, v, *, features="identity", q_map=None, k_map=None, q_bias=None, k_bias=None,
        q_segments=None, kv_segments=None, state=None, **own,
    ):  # fmt: skip
        rows = dict(q=q, k=k, v=v, q_segments=q_segments, kv_segments=kv_segments)
        weights = dict(q_map=q_map, k_map=k_map, q_bias=q_bias, k_bias=k_bias)
        segment = None if state is None or q_segments is not None else state.segment
        if segment is not None:  # Without segments all is of one document, whatever its number.
            state = state._replace(segment=jnp.ones_like(segment))

        def op(rows, weights, state):
            kept = jax.tree.map(lambda x: checkpoint_name(x, "attention"), state)
            o, total, after = attend(**rows, **weights, features=features, state=kept, **own)
            return (o, total), after

        def summary(rows, weights):
            given = rows | weights
            names = "k", "v", "k_map", "k_bias", "kv_segments"
            return state_of(**{name: given[name] for name in names}, features=features)

        (o, total), after = prefix(op, summary, merge)(rows, weights, state)
        return o, total, after if segment is None else after._replace(segment=segment)

    return call


def divided(rows: Any) -> bool:
    """Whether a device holds a piece of the length only, by the rows' types."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(AXIS, 1) == 1:
        return False
    layouts = [layout_of(jax.typeof(x).sharding.spec, x.ndim) for x in jax.tree.leaves(rows)]
    return AXIS in mesh.manual_axes or any(AXIS in layout[1] for layout in layouts)


def _piece(op, state_of, merge, rows, weights, state):
    """What one shard does."""
    own = state_of(rows, weights)
    if state is not None:
        state = jax.tree.map(_like, state, own)
    outputs, after = op(rows, weights, _entering(own, merge, state))
    here = jax.lax.axis_index(AXIS) == jax.lax.axis_size(AXIS) - 1
    last = jax.tree.map(lambda x: jax.lax.select(here, x, jnp.zeros_like(x)), after)
    return outputs, jax.lax.psum(last, AXIS)


def _entering(own, merge, start):
    """The state before this piece, of pieces with the states `own` and `start` before them all."""
    before, reach = onward(own, 0, 1), 1  # over the last `reach` pieces, or all there are
    while reach < jax.lax.axis_size(AXIS) - 1:
        before = merge(onward(before, 1, reach), before)
        reach *= 2
    return before if start is None else merge(start, before)


def onward(tree, first: int, by: int):
    """Sent on by so many pieces from piece `first` and those after it; zeros where none comes."""
    pairs = [(i, i + by) for i in range(first, jax.lax.axis_size(AXIS) - by)]
    return jax.lax.ppermute(tree, AXIS, pairs)


def _like(x, to):
    """x in the dtype and layout of `to`."""
    x, explicit = x.astype(to.dtype), jax.sharding.get_abstract_mesh().explicit_axes
    return jax.reshard(x, jax.typeof(to).sharding.spec) if explicit else x
