"""Balance within every row by itself, with a small weight: DeepSeek-V3, arXiv 2412.19437, eq. 17.

Its f_i P_i are those of one sequence, which here is a row, whatever documents it packs; the mean is
over tokens. Deviation: f is divided by k too, as everywhere here, so that balance is 1.
"""

from training.balances import micro_batch
from training.loss import Loss


def make(loss: Loss, routed: tuple[str, ...], *, weight: float = 1e-4, z: float = 0.0) -> Loss:
    """weight: of the balance terms' sum.  z: of the logits' squared logsumexp."""
    return micro_batch.make(loss, routed, rows=1, weight=weight, z=z)
