"""The training state, and counters that outlive 32 bits.

Position (rows consumed) and tokens are pairs of uint32: an int32 counter wraps at two billion
tokens, float32 loses single counts above 2^24, and 64-bit types are off in JAX by default.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Pair = jax.Array | np.ndarray


class TrainState(NamedTuple):
    """Everything a run needs to continue. Plain pytrees only.

    step: int32 scalar, optimizer steps taken. position: uint32[2], rows of the data consumed.
    tokens: uint32[2], tokens seen; both pairs as (high, low). params: {path: float32 array}.
    opt: the optimizer's state. aux: EMA, frozen trees, state without gradients.
    """

    step: Any
    position: Any
    tokens: Any
    params: dict[str, Any]
    opt: Any
    aux: dict[str, Any]


def pair(n: int) -> np.ndarray:
    """`n` as uint32[2] (high, low). Raises ValueError outside 0 .. 2^64 - 1."""
    if not 0 <= n < 1 << 64:
        raise ValueError(f"a counter holds 0 to 2^64 - 1, not {n}")
    return np.array([n >> 32, n & 0xFFFFFFFF], np.uint32)


def add(counter: Pair, n: int | np.integer | Pair) -> jax.Array:
    """`counter` + `n` with the carry, uint32[2]; wraps at 2^64. Traces.

    n: a Python integer, or a non-negative integer scalar array (a negative one is not noticed).
    Raises TypeError if n is an array of floats, which would have lost counts already.
    """
    if isinstance(n, int):
        high, low = (jnp.uint32(half) for half in pair(n))
    elif jnp.issubdtype(n.dtype, jnp.integer):
        high, low = jnp.uint32(0), jnp.asarray(n).astype(jnp.uint32)
    else:
        raise TypeError(f"a counter grows by integers, not by {n.dtype}")
    counter = jnp.asarray(counter)
    total = counter[1] + low
    carry = (total < low).astype(jnp.uint32)
    return jnp.stack([counter[0] + high + carry, total])


def to_int(counter: Pair) -> int:
    """A pair as an exact Python integer. Host only: waits for the device."""
    high, low = np.asarray(counter).tolist()
    return (high << 32) | low


def to_float(counter: Pair) -> jax.Array:
    """A pair as a float32 scalar, for schedules: relative error at most 2^-23. Traces."""
    high, low = jnp.asarray(counter).astype(jnp.float32)
    return high * 2.0**32 + low
