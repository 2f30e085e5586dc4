"""What methods with a trust ratio share: which weights have one, and norms of true matrices."""

import jax.numpy as jnp

from parallel.weight import Entry


def has_ratio(entry: Entry) -> bool:
    """Whether a weight's step goes by its own norm; vectors and what starts at zero have none.

    A norm's gain or a bias may have two dimensions (heads, head) without being a matrix. A weight
    that starts at zero could only grow in proportion to its own tiny norm.
    """
    vector = not entry.is_matrix or entry.weight.group in ("norm", "bias")
    return not vector and entry.weight.init[0] != "zeros"


def norm(entry: Entry, x):
    """Of each of the matrices that stand side by side in the leaf, its other axes 1."""
    return jnp.sqrt(jnp.sum(x * x, entry.norm_axes, keepdims=True))
