"""The gradient of a loss over micro-batches, equal to that of the whole batch at once.

With T the totals of all sums, d loss / d params = sum over micro-batches of vjp(sums)(c), where
c = d finish / d T. c depends on what is known from the batch (`counts`) and on the totals that the
loss `needs`; those take a first pass over the micro-batches, in which everything that does not lead
to them is dead code. Every token has the same weight whichever micro-batch holds it.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from parallel.rules import explicit_axes, layout
from parallel.zero import REPLICATED, Replicated
from training.loss import Loss, counts


def value_and_grad(
    loss: Loss,
    params: dict,
    batch,
    context,
    *,
    fixed: Mapping = {},
    place: Replicated = REPLICATED,
):
    """(scalar, metrics, totals, gradient) of a Batch `[A b L]`.

    context(micro, totals) -> Context. fixed: parameters without a gradient. place: what of the
    gradient each device holds, and so how it is reduced.
    """
    known = counts(batch)
    run = place.enter(functools.partial(_sums_and_grad, loss, context, place))
    sums, gradient = run(params, fixed, known, batch)
    totals = known | sums
    return *loss.finish(totals), totals, gradient


def _sums_and_grad(loss, context, place, params, fixed, known, batch):
    variables, bind = place.open(params)

    def sums_of(variables, micro, totals):
        return loss.sums(fixed | bind(variables), micro, context(micro, totals))

    def first_pass(micro):
        sums = sums_of(variables, micro, {})
        return {name: sums[name] for name in loss.needs}

    def second_pass(micro):
        sums, pull = jax.vjp(lambda variables: sums_of(variables, micro, needed), variables)
        # Where finish is linear its derivative does not depend on the sum, so this part's will do.
        return sums, pull(_cotangents(loss, known, sums | needed))[0]

    needed = place.total(_total(first_pass, batch)) if loss.needs else {}
    sums, gradient = _total(second_pass, batch)
    return place.total(sums), place.close(gradient)


def _cotangents(loss, known, sums):
    return jax.grad(lambda sums: loss.finish(known | sums)[0])(sums)


def _total(fn, batch):
    """The sum of fn(micro) over the leading dimension of a batch."""
    micro = jax.tree.map(lambda x: x[0], batch)
    if batch.inputs.shape[0] == 1:
        return fn(micro)
    zeros = jax.tree.map(_zeros, jax.eval_shape(fn, micro))
    add = lambda total, micro: (jax.tree.map(jnp.add, total, fn(micro)), None)
    return jax.lax.scan(add, zeros, batch)[0]


def _zeros(like):
    out = layout(like) if explicit_axes() else None
    return jnp.zeros(like.shape, like.dtype, out_sharding=out)
