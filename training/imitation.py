"""Losses of students whose layers say themselves how far they are from what they imitate."""

import jax
import jax.numpy as jnp

from training.loss import Loss, at_least_some, by_domain, log_likelihood, take_domains


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
