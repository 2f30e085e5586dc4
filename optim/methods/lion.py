"""Lion: "Symbolic Discovery of Optimization Algorithms", Chen et al., arXiv 2302.06675.

    direction = sign(b1 m + (1 - b1) g) + weight_decay W        m <- b2 m + (1 - b2) g

Every element moves by the learning rate, so that it wants a 3 to 10 times smaller one than AdamW
does, and a weight decay as many times larger. Momentum float32.
"""

import jax.numpy as jnp
import optax

from optim.build import decay
from optim.widths import elementwise as width
from parallel.weight import Table


def make(
    table: Table, *, weight_decay, b1: float = 0.9, b2: float = 0.99
) -> optax.GradientTransformation:
    """The direction, without learning rate and sign. State: step count, one momentum a weight."""
    lion = optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=jnp.float32)
    return optax.chain(lion, decay(table, weight_decay, width))
