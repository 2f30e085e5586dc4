"""Imitation of softmax attention's outputs, by mixers that can be taught.

LoLCATs (arXiv 2410.10254, section 3.2, eq. 7): the mean square of the difference between the
heads' outputs of teacher and student, before the output projection, a mean over tokens, heads and
layers, times 1000 (its released configurations). Each layer sees what the teacher's layers before
it give. Deviation: layers are averaged, where the released code adds them.
"""

from training.imitation import imitation
from training.loss import Loss

TAP = "output_transfer"
CASES = ({"scale": 1.0},)


def make(apply, *, scale: float = 1000.0) -> Loss:
    """apply(params, inputs, ctx) -> (logits, the layers' sums). scale: factor of the loss."""
    return imitation(apply, TAP, scale)
