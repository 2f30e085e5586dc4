"""The form of a loss: sums over tokens, then one scalar of their totals.

A loss written so can be split over devices and micro-batches in any way without changing its value
or its gradient, because only sums cross the split and `finish` sees their global totals.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from data.batch import Batch
from models.context import Context
from parallel.vocab import numbers

Sums = dict[str, Array]


def counts(batch: Batch) -> Sums:
    """Sums known from the batch alone: `weight` of targets, `tokens` that are not padding."""
    return {
        "weight": jnp.sum(batch.weights),
        "tokens": jnp.sum((batch.segment_ids > 0).astype(jnp.float32)),
    }


def at_least_some(count: Float[Array, "*K"]) -> Float[Array, "*K"]:
    """A denominator: the count, or 1 where nothing was counted."""
    return jnp.where(count > 0, count, 1.0)


def by_domain(batch: Batch, ctx: Context, log_p: Float[Array, "b L"]) -> Sums:
    """`domain_nll` and `domain_weight` `[K]`: sums over the targets in each domain's rows.

    log_p: of the targets.  Nothing where there is one domain only. No gradient passes.
    """
    if ctx.domains == 1:
        return {}
    # Compares with a range instead of scattering, so rows are summed where they lie.
    here = batch.domain[:, None] == jnp.arange(ctx.domains)[None]
    total = lambda x: jnp.sum(jnp.where(here, jnp.sum(x, 1)[:, None], 0.0), 0)
    weighted = batch.weights * jax.lax.stop_gradient(log_p)
    return {"domain_nll": -total(weighted), "domain_weight": total(batch.weights)}


def take_domains(totals: Sums) -> dict:
    """Takes the totals of `by_domain` out of `totals`, and returns the metrics that they give.

    `domain_loss` `[K]`, 0 where nothing was seen, and `domain_share` `[K]` of the weight.
    """
    if "domain_nll" not in totals:
        return {}
    nll, weight = totals.pop("domain_nll"), totals.pop("domain_weight")
    share = weight / at_least_some(jnp.sum(weight))
    return {"domain_loss": nll / at_least_some(weight), "domain_share": share}


@dataclasses.dataclass(frozen=True)
class Loss:
    """sums(params, micro, ctx): float32 sums, additive over tokens, of one micro-batch `[b L]`.

    finish(totals): the scalar loss and what to log, from the totals of all sums and of `counts`.
    It must be linear in every sum that `needs` does not name (a contract test says so), and log
    `domain_loss` and `domain_share` where there are several domains: mixtures read them.
    needs: sums whose totals enter finish's derivative.  told: layers read those totals, which are
    then known in `ctx.totals` when the gradient is taken.
    running: the derivative takes for them what has been summed up to and with the micro-batch at
    hand, which saves a pass and is exact for one micro-batch only.
    after(aux, totals): the state without gradients after the step.
    taps: what layers are asked to report in training, beside `model.taps`; evaluation asks nothing.
    """

    sums: Callable[[dict, Batch, Context], Sums]
    finish: Callable[[Sums], tuple[Float[Array, ""], dict]]
    needs: tuple[str, ...] = ()
    told: bool = False
    running: bool = False
    after: Callable[[dict, Sums], dict] | None = None
    taps: tuple[str, ...] = ()


def log_likelihood(
    logits: Float[Array, "B L W"], targets: Int[Array, "B L"]
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Log-probability of each target and the log of the softmax's denominator, float32.

    Compares with a range instead of gathering, and the range is divided like the vocabulary: only
    the maximum, the sum of exponentials and the target's logit, `[B L]`, cross devices.
    """
    log_z = jax.nn.logsumexp(logits, -1)
    here = numbers(logits) == targets[:, :, None]
    return jnp.sum(jnp.where(here, logits, 0.0), -1) - log_z, log_z


def right(logits: Float[Array, "B L W"], targets: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """1 where no logit is larger than the target's, else 0."""
    here = numbers(logits) == targets[:, :, None]
    chosen = jnp.sum(jnp.where(here, logits, 0.0), -1)
    return (chosen >= jnp.max(logits, -1)).astype(jnp.float32)
