"""A matrix product inside a TPU's kernel, as all of them take it."""

import jax
import jax.numpy as jnp

NN, NT = (1, 0), (1, 1)  # dimensions that a product sums over: of its left factor, of its right


def dot(a, b, contract: tuple[int, int]):
    """A product with float32 sums; of float32 at full accuracy."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = ((contract[:1], contract[1:]), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
