"""SGD with momentum: Polyak 1964; Nesterov's form as in Sutskever et al., ICML 2013.

    m <- momentum m + g        direction = m + weight_decay W,   or g + momentum m + weight_decay W

Deviation from most libraries: weight decay is decoupled, it does not enter the momentum. Momentum
float32; momentum 0 keeps no state.
"""

import jax.numpy as jnp
import optax

from optim.build import decay
from optim.widths import proportional as width
from parallel.weight import Table


def make(
    table: Table, *, weight_decay, momentum: float = 0.9, nesterov: bool = False
) -> optax.GradientTransformation:
    """The direction, without learning rate and sign. State: one momentum a weight."""
    trace = optax.trace(momentum, nesterov=nesterov, accumulator_dtype=jnp.float32)
    return optax.chain(trace if momentum else optax.identity(), decay(table, weight_decay, width))
