"""Balance over the whole global batch: "Demons in the Detail", arXiv 2501.11873, eqs. 4 to 6.

The frequencies C are those of all tokens of the optimizer step, on every device and in every
micro-batch, padding excluded, so that experts may specialise in what a single sequence is about.

Deviation: exact over accumulation too, where the paper takes a running buffer (`buffer`). Several
micro-batches therefore cost a second forward pass, up to the last router.
"""

from training.balance import add, term
from training.loss import Loss

CASES = ({"weight": 0.1, "z": 0.0},)


def make(loss: Loss, routed: tuple[str, ...], *, weight: float = 0.01, z: float = 1e-3) -> Loss:
    """weight: of the balance terms' sum.  z: of the logits' squared logsumexp (ST-MoE)."""
    needs = ("selected",) if weight else ()
    return add(loss, routed, of_all, weight=weight, z=z, needs=needs)


def of_all(totals, path):
    """The term of all tokens at once."""
    sums = (totals[f"{path}/{name}"] for name in ("selected", "probability"))
    return term(*sums, totals["tokens"])
