"""AdamW: "Decoupled Weight Decay Regularization", Loshchilov and Hutter, arXiv 1711.05101.

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    direction = m^ / (sqrt(v^) + eps) + weight_decay W,     m^ = m / (1 - b1^t), v^ = v / (1 - b2^t)

Deviations: the decay is multiplied by the learning rate like the rest (the PyTorch and optax
convention; in the paper only by the schedule's factor). b2 0.95 is the language-model habit, the
paper has 0.999. Moments float32.
"""

import jax.numpy as jnp
import optax

from optim.build import decay
from optim.widths import elementwise as width
from parallel.weight import Table


def make(
    table: Table, *, weight_decay, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8
) -> optax.GradientTransformation:
    """The direction, without learning rate and sign. State: step count and two moments a weight."""
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=jnp.float32)
    return optax.chain(adam, decay(table, weight_decay, width))
