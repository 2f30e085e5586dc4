"""Imitation of softmax attention's weights, by mixers that can be taught.

Hedgehog (arXiv 2402.04347, section 4.2, eq. 5): with the teacher's causal weights t and the
student's a, the loss is `-sum_j t_ij log a_ij`, a mean over queries, heads and layers. Each layer
sees what the teacher's layers before it give, so that layers learn apart; only their maps are
meant to be trained (`trainable`). The least it can be is the teacher's entropy, which is logged.
"""

import jax
import jax.numpy as jnp

from training.loss import Loss, at_least_some, by_domain, log_likelihood, take_domains

TAP = "attention_transfer"


def make(apply) -> Loss:
    """apply(params, inputs, ctx) -> (logits, the layers' sums)."""
    return imitation(apply, TAP, 1.0)


def imitation(apply, tap: str, scale: float) -> Loss:
    """The mean of what the layers report under the name `tap`, times `scale`.

    `nll` is the teacher's. Raises ValueError where no layer reports it.
    """

    def sums(params, micro, ctx):
        logits, layers = apply(params, micro.inputs, ctx)
        if not any(name.endswith(f"/{tap}") for name in layers):
            raise ValueError(
                f"no layer of this model can be taught by {tap}: put a mixer that can, such as "
                f"hedgehog, into model.pattern"
            )
        log_p, _ = log_likelihood(logits, micro.targets)
        domains = by_domain(micro, ctx, jax.lax.stop_gradient(log_p))
        nll = -jnp.sum(micro.weights * jax.lax.stop_gradient(log_p))
        return {"nll": nll, **domains, **layers}

    def finish(totals):
        totals = dict(totals)
        weight, tokens = at_least_some(totals.pop("weight")), at_least_some(totals.pop("tokens"))
        nll, domains = totals.pop("nll") / weight, take_domains(totals)
        layers = jax.tree.map(lambda total: total / tokens, totals)
        taught = [jnp.atleast_1d(x) for n, x in layers.items() if n.endswith(f"/{tap}")]
        loss = jnp.mean(jnp.concatenate(taught))
        return scale * loss, {"nll": nll, tap: loss, **domains, **layers}

    return Loss(sums, finish, taps=(tap,))
