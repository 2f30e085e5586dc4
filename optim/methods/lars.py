"""LARS: "Large Batch Training of Convolutional Networks", You, Gitman and Ginsburg, 1708.03888.

For every layer's weight W with gradient g, one ratio a true matrix (`entry.norm_axes`):

    l = eta ||W|| / (||g|| + weight_decay ||W||)               (1 where ||W|| or the sum is 0)
    m <- momentum m + l (g + weight_decay W)        direction = m,   or l (...) + momentum m

Vectors, gains of norms, biases and weights that start at zero have l = 1: SGD, with the decay in
its momentum.

| here                                    | elsewhere                                              |
|-----------------------------------------|--------------------------------------------------------|
| eta 1: a step is lr of the weight's own | 0.001 in the paper. Only lr eta matters where there is |
| norm, and of the gradient without ratio | a ratio, but weights without one step by a bare lr     |
| the learning rate is outside of m, as   | inside, in the paper and optax: a gradient goes on at  |
| everywhere here and in PyTorch          | the rate of its own step. Equal while the rate is      |
| sum of norms, as the paper              | optax: ||g + weight_decay W||, `norm_of_sum`           |

As the rate falls, ours is the smaller step: the last steps forget what earlier ones gathered at a
larger rate; in a warm-up it is the larger one.

Under muP the decay is divided by SGD's multiplier of the learning rate, so that each element of
weight_decay W stays beside g what it is at the base width. In the ratio a decay weighs more as the
width grows, because ||W|| does and ||g|| does not: with one, rates carry over only so far.
"""

import jax.numpy as jnp
import optax

from optim import widths
from optim.build import lookup
from optim.trust import has_ratio, norm
from parallel.weight import Entry, Table


def make(
    table: Table,
    *,
    weight_decay,
    momentum: float = 0.9,
    nesterov: bool = False,
    eta: float = 1.0,
    norm_of_sum: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The direction, without learning rate and sign.

    eta: the trust coefficient.  norm_of_sum: the ratio's denominator is ||g + weight_decay W||.
    State: one momentum a weight, none with momentum 0. Reports `PATH/trust_ratio`.
    """

    def scaled(path, g, w, report):
        entry = lookup(table, path)
        rate = weight_decay / widths.proportional(entry) if entry.weight.decay else 0.0
        u = g + rate * w if rate else g
        if not has_ratio(entry):
            return u
        g_norm, w_norm, u_norm = (norm(entry, x) for x in (g, w, u))
        ratio = _divide(eta * w_norm, u_norm if norm_of_sum else g_norm + rate * w_norm)
        if report is not None:
            report[f"{path}/trust_ratio"] = jnp.squeeze(ratio, entry.norm_axes)
        return ratio * u

    def update(grads, state, params, *, report: dict | None = None, **_):
        return {path: scaled(path, g, params[path], report) for path, g in grads.items()}, state

    lars = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    trace = optax.trace(momentum, nesterov=nesterov, accumulator_dtype=jnp.float32)
    return optax.chain(lars, trace if momentum else optax.identity())


def width(entry: Entry) -> float:
    """The learning rate's multiplier under muP."""
    return (widths.relative if has_ratio(entry) else widths.proportional)(entry)


def _divide(above, below):
    defined = (above > 0) & (below > 0)
    return jnp.where(defined, above / jnp.where(defined, below, 1.0), 1.0)
