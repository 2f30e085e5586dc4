"""Balance over parts of the global batch that tokens are dealt to at random.

The control of arXiv 2501.11873, section 4.3: a part has as few tokens as one micro-batch, and the
mixture of all of them, which tells whether `micro_batch` suffers from few tokens or from tokens of
few documents. A token's part follows from its row's number, its place and the step's batch alone.
"""

import jax
import jax.numpy as jnp

from models.context import Context
from training.balance import add, term
from training.loss import Loss, at_least_some

CASES = ({"parts": 3},)


def make(
    loss: Loss, routed: tuple[str, ...], *, parts: int = 8, weight: float = 0.01, z: float = 1e-3
) -> Loss:
    """parts: how many the tokens are dealt to.  weight: of the terms' sum.  z: as elsewhere."""
    if parts < 1:
        raise ValueError(f"shuffled's parts is {parts}; it must be at least 1")

    def sums(params, micro, ctx):
        return loss.sums(params, micro, ctx.replace(group=_dealt(ctx, parts), groups=parts))

    own = dict(weight=weight, z=z, sums=sums, needs=("group_selected",))
    return add(loss, routed, _mean, **own)


def _mean(totals, path):
    """The parts' terms, weighted by their tokens."""
    selected, probability = (totals[f"{path}/group_{n}"] for n in ("selected", "probability"))
    whole = term(selected, probability, jnp.ones(selected.shape[:-1]))
    return jnp.sum(whole, -1) / at_least_some(totals["tokens"])


def _dealt(ctx: Context, parts: int):
    """The part of each token, [b L]."""
    key = jax.random.key(0)
    places = jnp.arange(ctx.segment_ids.shape[1], dtype=jnp.uint32)

    def of_row(row):
        own = jax.random.fold_in(jax.random.fold_in(key, row[0]), row[1])
        return jax.random.randint(own, places.shape, 0, parts)

    return jax.vmap(of_row)(ctx.sample)
