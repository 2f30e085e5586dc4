"""Imitation of softmax attention's weights, by mixers that can be taught.

Hedgehog (arXiv 2402.04347, section 4.2, eq. 5): with the teacher's causal weights t and the
student's a, the loss is `-sum_j t_ij log a_ij`, a mean over queries, heads and layers. Each layer
sees what the teacher's layers before it give, so that layers learn apart; only their maps are
meant to be trained (`trainable`). The least it can be is the teacher's entropy, which is logged.
"""

from training.imitation import imitation
from training.loss import Loss

TAP = "attention_transfer"


def make(apply) -> Loss:
    """apply(params, inputs, ctx) -> (logits, the layers' sums)."""
    return imitation(apply, TAP, 1.0)
