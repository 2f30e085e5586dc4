"""Balance over the micro-batches so far: arXiv 2501.11873, algorithm 1, an approximation.

As `global_batch`, but the gradient of a micro-batch takes the frequencies of those of the step up
to and with it, of all devices: one pass, and the first micro-batches are balanced over few tokens.
Equal to `global_batch` where there is one micro-batch. The term that is logged is the exact one.
"""

import dataclasses

from training.balances import global_batch
from training.loss import Loss


def make(loss: Loss, routed: tuple[str, ...], *, weight: float = 0.01, z: float = 1e-3) -> Loss:
    """weight: of the balance terms' sum.  z: of the logits' squared logsumexp (ST-MoE)."""
    if loss.needs:
        raise ValueError(
            f"the loss needs the totals of {loss.needs[0]}, which a buffer would make approximate "
            f"too; take balance.name=global_batch"
        )
    exact = global_batch.make(loss, routed, weight=weight, z=z)
    return dataclasses.replace(exact, running=True)
