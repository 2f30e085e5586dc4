"""Which experts a token goes to, how much each counts, and what is known of it afterwards."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.context import Context, over_tokens
from parallel.named import named
from parallel.rules import constrain, spec

ROUTERS = ("softmax", "topk_softmax", "sigmoid")
EPS = 1e-20


class Route(NamedTuple):
    """chosen: experts of each token, E where there is none (padding, or no room).

    gates: what each expert's output counts, float32, 0 where there is none.
    """

    chosen: Int[Array, "B L k"]
    gates: Float[Array, "B L k"]


def route(
    logits: Float[Array, "B L E"],
    bias: Float[Array, "E"],
    ctx: Context,
    *,
    router: str,
    top_k: int,
    scale: float,
    capacity: int | None,
) -> tuple[Route, dict]:
    """The route of every token and, float32, the sums over valid tokens that models.ffns.moe names.

    bias is added to the scores for the choice alone, and has no gradient.
    """
    scores, probability = _scores(logits, router)
    chosen = _choose(jax.lax.stop_gradient(scores) + bias[None, None], top_k)
    chosen = named(chosen, "routes", "batch", "length", None)
    gates = scale * _gates(jnp.take_along_axis(scores, chosen, -1), router)
    here = ctx.valid[:, :, None]
    picked = jnp.where(here, _one_hot(chosen, logits.shape[-1]), 0.0)
    kept = here
    if capacity is not None:
        kept = here & (jnp.take_along_axis(_place(picked, ctx), chosen, -1) < capacity)
    aux = _sums(picked, jnp.where(here, probability, 0.0), logits, ctx)
    lost = jnp.sum((here & ~kept).astype(jnp.float32))
    none = logits.shape[-1]
    return Route(jnp.where(kept, chosen, none), jnp.where(kept, gates, 0.0)), aux | {
        "dropped": lost
    }


def _scores(logits, router):
    """What experts are chosen by, and each token's distribution over them, for balance."""
    if router == "sigmoid":
        scores = jax.nn.sigmoid(logits)
        return scores, scores / (jnp.sum(scores, -1, keepdims=True) + EPS)
    probability = jax.nn.softmax(logits, -1)
    return probability, probability


def _choose(scores, top_k):
    return jax.lax.top_k(scores, top_k)[1]


def _gates(scores, router):
    """The probability of each chosen expert, or its share among the chosen.

    A softmax over the logits of the chosen is what their probabilities are when normalised.
    """
    if router == "softmax" or scores.shape[-1] == 1:
        return scores
    return scores / (jnp.sum(scores, -1, keepdims=True) + EPS)


def _one_hot(chosen, experts):
    """1.0 at each token's experts, [B L E]; a token chooses no expert twice."""
    return jnp.sum(jax.nn.one_hot(chosen, experts), 2)


def _place(picked, ctx: Context):
    """How many tokens before this one in its row chose each expert, [B L E]."""
    # Each row is counted whole: where it is split, a number an expert and token crosses devices.
    whole = constrain(picked, "batch", None, None)
    split = None if ctx.decoding else "length"
    return constrain(jnp.cumsum(whole, 1) - whole, "batch", split, None)


def _sums(picked, probability, logits, ctx: Context) -> dict:
    total = lambda x: jnp.sum(x, (0, 1))
    log_z = jax.nn.logsumexp(logits, -1)
    entropy = -jnp.sum(probability * jnp.log(jnp.maximum(probability, EPS)), -1)
    aux = {
        "selected": total(picked),
        "probability": total(probability),
        "z": over_tokens(jnp.square(log_z), ctx),
        "entropy": over_tokens(jax.lax.stop_gradient(entropy), ctx),
    }
    if ctx.group is not None:
        by_group = lambda x: _summed("blg,ble->ge", jax.nn.one_hot(ctx.group, ctx.groups), x)
        aux |= {"group_selected": by_group(picked), "group_probability": by_group(probability)}
    if "routing" in ctx.taps:
        aux["together"] = _summed("ble,blf->ef", picked, picked)
        if ctx.domain is not None:
            domain = jax.nn.one_hot(ctx.domain, ctx.domains)
            aux["domains"] = _summed("bk,ble->ke", domain, picked)
    return aux


def _summed(equation, a, b):
    """A product summed over all tokens, whichever devices they are on."""
    return jnp.einsum(equation, a, b, precision="highest", out_sharding=spec(None, None))
