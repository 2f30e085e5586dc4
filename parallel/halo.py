"""Operations that look back a few tokens, where the length is divided over `context`.

Each device gets the tokens just before its own piece of the row from the pieces before it. What is
sent is `width` tokens, however long the row is. The gradient goes back the same way.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from parallel.manual import manual
from parallel.prefix import AXIS, divided, onward


def halo(op: Callable, width: int) -> Callable:
    """`op` for rows whose length may be divided over `context`.

    op(own, extended) -> outputs `[B L ..]`. own, shared: trees of arrays `[B L ..]`; extended: the
    latter as `[B width + L ..]`, with the tokens before them, zeros where the row begins.

    Returns:
      call(own, shared) -> outputs, differentiable.

    Raises ValueError as `manual` does. op runs per shard of `context`, in an unchecked region where
    the other axes are Explicit still.
    """

    def call(own, shared):
        if not divided((own, shared)):
            return op(own, jax.tree.map(lambda x: _filled(x, width), shared))
        run = lambda own, shared: op(own, jax.tree.map(functools.partial(_extended, width), shared))
        return manual(run, AXIS, P(None, AXIS), P(None, AXIS), check=False)(own, shared)

    return call


def _extended(width: int, x):
    """A piece with `width` tokens before it, from as many pieces as have them."""
    parts, L, by = [x], x.shape[1], 1
    while width > 0 and by < jax.lax.axis_size(AXIS):
        parts.append(onward(x[:, max(0, L - width) :], 0, by))
        width, by = width - L, by + 1
    # What not even the first piece has is filled up.
    return _filled(jnp.concatenate(parts[::-1], 1), max(0, width))


def _filled(x, width: int):
    return jnp.pad(x, [(0, 0), (width, 0)] + [(0, 0)] * (x.ndim - 2))
