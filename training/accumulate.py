"""The gradient of a loss over micro-batches, equal to that of the whole batch at once.

With T the totals of all sums, d loss / d params = sum over micro-batches of vjp(sums)(c), where
c = d finish / d T. c depends on what is known from the batch (`counts`) and on the totals that the
loss `needs`; those take a first pass over the micro-batches, in which everything that does not lead
to them is dead code. Every token has the same weight whichever micro-batch holds it.
"""

import jax
import jax.numpy as jnp

from parallel.rules import explicit_axes, layout
from training.loss import Loss, counts


def value_and_grad(loss: Loss, params: dict, batch, context):
    """(scalar, metrics, totals, gradient) of a Batch `[A b L]`.

    context(micro, totals) -> Context.
    """
    known = counts(batch)
    if batch.inputs.shape[0] == 1:
        sums, gradient = _at_once(loss, params, known, jax.tree.map(lambda x: x[0], batch), context)
    else:
        sums, gradient = _in_parts(loss, params, known, batch, context)
    totals = known | sums
    return *loss.finish(totals), totals, gradient


def _at_once(loss, params, known, batch, context):
    given = {}
    if loss.needs:
        given = {name: loss.sums(params, batch, context(batch, {}))[name] for name in loss.needs}
    sums, pull = jax.vjp(lambda params: loss.sums(params, batch, context(batch, given)), params)
    return sums, pull(_cotangents(loss, known, sums))[0]


def _in_parts(loss, params, known, batch, context):
    needed = {}
    if loss.needs:

        def first_pass(micro):
            sums = loss.sums(params, micro, context(micro, {}))
            return {name: sums[name] for name in loss.needs}

        needed = _total(first_pass, batch)

    def second_pass(micro):
        sums, pull = jax.vjp(
            lambda params: loss.sums(params, micro, context(micro, needed)), params
        )
        # Where finish is linear its derivative does not depend on the sum, so this part's will do.
        return sums, pull(_cotangents(loss, known, sums | needed))[0]

    return _total(second_pass, batch)


def _cotangents(loss, known, sums):
    return jax.grad(lambda sums: loss.finish(known | sums)[0])(sums)


def _total(fn, batch):
    """The sum of fn(micro) over the leading dimension of a batch."""
    micro = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(_zeros, jax.eval_shape(fn, micro))
    add = lambda total, micro: (jax.tree.map(jnp.add, total, fn(micro)), None)
    return jax.lax.scan(add, zeros, batch)[0]


def _zeros(like):
    out = layout(like) if explicit_axes() else None
    return jnp.zeros(like.shape, like.dtype, out_sharding=out)
