"""What methods that keep experts equally busy share; each is a file of training/balances.

A layer that routes reports `selected` and `probability`, sums over tokens (models/ffns/moe.py).
With C_e the tokens that chose expert e, P_e its summed probability and T the tokens, the term is

    E sum_e (C_e / sum C) (P_e / T),

1 where all are equal and at most E, for each layer by itself; layers are added up. C has no
gradient. Which tokens C is counted over is what the methods differ in. A method is
`make(loss, routed, **own) -> Loss`, around any loss; routed: paths of the layers that route.
"""

import importlib
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from parallel.weight import Table
from training import health
from training.loss import Loss, Sums, at_least_some

ROUTING = "routing"  # the tap by which layers report what health wants


def routed(weights: Table) -> tuple[str, ...]:
    """Paths of a model's layers that route, 'blocks/0/ffn'."""
    paths = (path for path, entry in weights.items() if entry.weight.group == "router")
    return tuple(path.rpartition("/")[0] for path in paths)


def around(loss: Loss, weights: Table, config: Mapping) -> Loss:
    """The loss with the balance method of a config's `balance`; itself where nothing routes."""
    paths = routed(weights)
    if not paths:
        return loss
    name = config["name"]
    module = importlib.import_module(f"training.balances.{name}")
    return module.make(loss, paths, **config["balances"].get(name, {}))


def term(
    selected: Float[Array, "*N E"], probability: Float[Array, "*N E"], tokens: Float[Array, "*#N"]
) -> Float[Array, "*N"]:
    """The balance term, 0 without tokens."""
    E = selected.shape[-1]
    share = selected / at_least_some(jnp.sum(selected, -1, keepdims=True))
    return E * jnp.sum(share * probability, -1) / at_least_some(tokens)


def add(
    loss: Loss,
    paths: tuple[str, ...],
    terms: Callable[[Sums, str], Float[Array, "*N"]],
    *,
    weight: float,
    z: float,
    sums: Callable | None = None,
    needs: tuple[str, ...] = (),
    **changes,
) -> Loss:
    """`loss` plus weight x the layers' terms plus z x the mean squares of their logsumexp.

    terms(totals, path): of a layer or a stack of layers.  sums: instead of the loss's own, with
    what terms read besides.  needs: names within a layer.  changes: further fields of Loss.
    Logs `balance` (the terms' mean over layers), each layer's, and the health of its routing.
    """
    _check(weight, z)

    def finish(totals):
        totals = dict(totals)
        of = {path: terms(totals, path) for path in paths}
        tokens = at_least_some(totals["tokens"])
        squares = [jnp.sum(totals[f"{path}/z"]) / tokens for path in paths]
        own = {f"{path}/balance": value for path, value in of.items()}
        own |= health.take(totals)
        for name in [n for n in totals if n.startswith(tuple(f"{p}/group" for p in paths))]:
            del totals[name]
        scalar, metrics = loss.finish(totals)
        every = jnp.concatenate([jnp.atleast_1d(value) for value in of.values()])
        return (
            scalar + weight * jnp.sum(every) + z * sum(squares),
            metrics | {"balance": jnp.mean(every)} | own,
        )

    needed = tuple(f"{path}/{name}" for path in paths for name in needs)
    return Loss(
        sums or loss.sums,
        finish,
        needs=(*loss.needs, *needed),
        told=loss.told,
        taps=(*loss.taps, ROUTING),
        after=changes.pop("after", loss.after),
        **changes,
    )


def _check(weight, z):
    for name, value in (("weight", weight), ("z", z)):
        if value < 0:
            raise ValueError(f"the balance's {name} is {value}; it must be 0 or more")
