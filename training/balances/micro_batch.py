"""Balance within every few rows by themselves, as trainers do whose devices each count their own.

The frequencies C are those of `rows` rows that follow each other (arXiv 2501.11873, eq. 3, with
`rows` a device's micro-batch). Parts are weighted by their tokens, so that the mean over tokens is
the mean over parts where all are full. A part is the same rows on any number of devices.
"""

import jax.numpy as jnp

from models.context import Context
from parallel.rules import constrain
from training.balance import add
from training.loss import Loss, at_least_some

CASES = ({"rows": 2},)


def make(
    loss: Loss, routed: tuple[str, ...], *, rows: int = 1, weight: float = 0.01, z: float = 1e-3
) -> Loss:
    """rows: that are counted together.  weight: of the terms' sum.  z: of the squared logsumexp.

    The rows of a micro-batch must divide by `rows`, which is checked when a step is traced.
    """
    if rows < 1:
        raise ValueError(f"micro_batch's rows is {rows}; it must be at least 1")
    term = lambda totals, path: totals[f"{path}/group_term"] / at_least_some(totals["tokens"])
    sums = lambda *args: with_terms(loss, routed, rows, *args)
    return add(loss, routed, term, weight=weight, z=z, sums=sums)


def with_terms(loss: Loss, routed, rows: int, params, micro, ctx: Context):
    """The loss's sums and of each layer `group_term`, the sum over parts of tokens x their term."""
    sums = loss.sums(params, micro, ctx.replace(**groups(micro, rows)))
    for path in routed:
        selected, probability = (
            sums.pop(f"{path}/group_{name}") for name in ("selected", "probability")
        )
        share = selected / at_least_some(jnp.sum(selected, -1, keepdims=True))
        E = selected.shape[-1]
        sums[f"{path}/group_term"] = E * jnp.sum(share * probability, (-2, -1))
    return sums


def groups(micro, rows: int) -> dict:
    """The fields of Context that number every `rows` rows of a micro-batch."""
    b, L = micro.inputs.shape
    if b % rows:
        raise ValueError(
            f"a balance over {rows} rows does not divide a micro-batch of {b} rows (with zero, of "
            f"one device along mesh.data); change balance.balances.*.rows, data.batch_size, "
            f"data.micro_batches or zero"
        )
    of_row = jnp.repeat(jnp.arange(b // rows, dtype=jnp.int32), rows)[:, None]
    return {
        "group": constrain(jnp.broadcast_to(of_row, (b, L)), "batch", "length"),
        "groups": b // rows,
    }
