"""What the routers of a mixture of experts did in one optimizer step, layer by layer.

With C_e the tokens that chose expert e of E (before any are dropped), over the whole step:

    load_e = E C_e / sum_f C_f             1 is perfect balance
    gini   = sum_ef |C_e - C_f| / (2 E sum_f C_f)
                                           0 where all are equal, 1 - 1/E where one has everything

and with P(k, e) the share of all choices that tokens of domain k made of expert e:

    specialisation = sum_ke P(k, e) log(P(k, e) / (P(k) P(e)))

the mutual information of domain and expert in nats: 0 where domains are routed alike, and at most
log min(K, E).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from training.loss import Sums, at_least_some
from training.metrics import PICTURE

SUMS = ("selected", "probability", "z", "entropy", "dropped", "together", "domains")


def take(totals: Sums) -> dict:
    """Takes the sums of every router out of `totals`, and returns the metrics that they give.

    A path is a router's if it has `<path>/selected`, `[E]` of one layer or `[N E]` of N stacked
    ones; `z`, `entropy` and `dropped` have no E.  `tokens`, which stays, is what they are sums
    over.  Each metric is a number of one layer and `[N]` of stacked ones, float32, 0 in a step
    without a token; no gradient passes:

        <path>/load_max, load_min  of load_e          <path>/drop_rate       dropped / sum_e C_e
        <path>/gini                of C_e             <path>/router_entropy  entropy / tokens, nats
        <path>/dead                experts without    <path>/router_z        z / tokens
                                   a token

    Where `together` `[.. E E]` and `domains` `[.. K E]` were asked for there are also
    `<path>/specialisation` and two pictures: `picture/<path>/co_activation` `[.. E E]`, the share
    of e's tokens (a row) that chose f too, and `picture/<path>/experts_by_domain` `[.. K E]`, the
    share of a domain's choices (a row) that fell on e.
    """
    metrics, tokens = {}, at_least_some(jax.lax.stop_gradient(totals["tokens"]))
    for path in [name.removesuffix("/selected") for name in totals if name.endswith("/selected")]:
        sums = {name: totals.pop(f"{path}/{name}") for name in SUMS if f"{path}/{name}" in totals}
        of_layer = _of_layer
        for _ in range(sums["selected"].ndim - 1):
            of_layer = jax.vmap(of_layer, in_axes=(0, None))
        values, pictures = of_layer(jax.lax.stop_gradient(sums), tokens)
        metrics |= {f"{path}/{name}": value for name, value in values.items()}
        metrics |= {f"{PICTURE}{path}/{name}": value for name, value in pictures.items()}
    return metrics


def _of_layer(sums: Sums, tokens: Float[Array, ""]) -> tuple[dict, dict]:
    """Metrics and pictures of one layer."""
    counts = sums["selected"]
    chosen, load = jnp.sum(counts), counts.size * _share(counts)
    dead = jnp.where(chosen > 0, jnp.sum((counts == 0).astype(jnp.float32)), 0.0)
    values = {"load_max": jnp.max(load), "load_min": jnp.min(load), "gini": _gini(counts)}
    values |= {"dead": dead, "drop_rate": sums["dropped"] / at_least_some(chosen)}
    values |= {"router_entropy": sums["entropy"] / tokens, "router_z": sums["z"] / tokens}
    pictures = {}
    if "domains" in sums:
        values["specialisation"] = _mutual_information(_share(sums["domains"]))
        pictures["experts_by_domain"] = jax.vmap(_share)(sums["domains"])
    if "together" in sums:
        pictures["co_activation"] = sums["together"] / at_least_some(counts)[:, None]
    return values, pictures


def _share(counts: Float[Array, "*K"]) -> Float[Array, "*K"]:
    return counts / at_least_some(jnp.sum(counts))


def _gini(counts: Float[Array, "E"]) -> Float[Array, ""]:
    """By ranks: in ascending order, sum_i (2 i - E - 1) C_i is half of the sum over pairs."""
    (E,) = counts.shape
    rank = jnp.arange(1, E + 1, dtype=jnp.float32)
    return jnp.sum((2 * rank - E - 1) * jnp.sort(_share(counts))) / E


def _mutual_information(joint: Float[Array, "K E"]) -> Float[Array, ""]:
    apart = jnp.sum(joint, 1, keepdims=True) * jnp.sum(joint, 0, keepdims=True)
    ratio = jnp.where(joint > 0, joint / at_least_some(apart), 1.0)
    # Rounding alone could make it negative.
    return jnp.maximum(jnp.sum(joint * jnp.log(ratio)), 0.0)
