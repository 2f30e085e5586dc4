"""The gradient of a loss over micro-batches, equal to that of the whole batch at once.

With T the totals of all sums, d loss / d params = sum over micro-batches of vjp(sums)(c), where
c = d finish / d T. c depends on what is known from the batch (`counts`) and on the totals that the
loss `needs`; those take a first pass over the micro-batches, in which everything that does not lead
to them is dead code. Of a single micro-batch they are known once its own sums are, before anything
is pulled back, so that one pass will do. Every token has the same weight whichever micro-batch
holds it.
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
    several = batch.inputs.shape[0] > 1
    # Layers that are told read the totals, so for them no pass can be saved.
    ahead = loss.needs and (loss.told or (several and not loss.running))

    def sums_of(variables, micro, totals):
        return loss.sums(fixed | bind(variables), micro, context(micro, totals))

    def needed_of(sums):
        return place.total({name: sums[name] for name in loss.needs})

    def first_pass(seen, micro):
        sums = sums_of(variables, micro, {})
        return seen, {name: sums[name] for name in loss.needs}

    def second_pass(seen, micro):
        told = seen if ahead else {}
        sums, pull = jax.vjp(lambda variables: sums_of(variables, micro, told), variables)
        seen = seen if ahead else jax.tree.map(jnp.add, seen, needed_of(sums))
        # Where finish is linear its derivative does not depend on the sum, so this part's will do.
        return seen, (sums, pull(_cotangents(loss, known, sums | seen))[0])

    seen = {}
    if ahead:
        seen = place.total(_total(first_pass, seen, batch))
    elif loss.needs:
        seen = _zeros_of(lambda micro: needed_of(sums_of(variables, micro, {})), batch)
    sums, gradient = _total(second_pass, seen, batch)
    return place.total(sums), place.close(gradient)


def _cotangents(loss, known, sums):
    return jax.grad(lambda sums: loss.finish(known | sums)[0])(sums)


def _total(fn, seen, batch):
    """The sum of what `fn(seen, micro) -> (seen, out)` gives over a batch's first dimension."""
    if batch.inputs.shape[0] == 1:
        return fn(seen, _first(batch))[1]
    zeros = _zeros_of(lambda micro: fn(seen, micro)[1], batch)

    def add(carry, micro):
        seen, out = fn(carry[0], micro)
        return (seen, jax.tree.map(jnp.add, carry[1], out)), None

    return jax.lax.scan(add, (seen, zeros), batch)[0][1]


def _first(batch):
    return jax.tree.map(lambda x: x[0], batch)


def _zeros_of(fn, batch):
    """Zeros like fn(micro)."""
    return jax.tree.map(_zeros, jax.eval_shape(fn, _first(batch)))


def _zeros(like):
    out = layout(like) if explicit_axes() else None
    return jnp.zeros(like.shape, like.dtype, out_sharding=out)
