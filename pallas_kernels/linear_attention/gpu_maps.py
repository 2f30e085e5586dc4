"""Feature maps in a warpgroup's registers, and what they need of shared memory.

A map's width f is padded to whole tiles of 64 columns; what is behind the width gives features 0.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention import gpu_tiles
from pallas_kernels.flash_attention.gpu_tiles import LOG2E
from pallas_kernels.linear_attention.features import BOUND

HALVES = {"exp": 2, "softmax": 2, "joint": 2}  # arrays of f features that a form gives
TOGETHER = ("softmax", "joint")  # forms whose features depend on all of z
PIECE = 128  # columns of z that registers hold beside a state
MIDDLE = 0x7EF311C3  # twice the bits of 1.0, less what the line is off in the middle
HALF = 64.0  # exp2 of twice it is finite in float32, and so is its inverse


def of(form: str, z, width: int, later: Callable = lambda: 0):
    """The features of z [64 n] float32, half by half: pairs of an array like z and of what its rows
    are to be multiplied with, [64] or None. Features from width on are 0.

    As `features.of`; a form of TOGETHER gets all of z. exp(-z) is 1 / exp(z), which takes its
    registers: there are none for both beside a state. So that it is not worked out before the first
    half is used, it waits for `later`, int32 zeros [64] for which a compiler must wait.
    """
    seen = None if width >= z.shape[1] else gpu_tiles.iota(z.shape, 1) < width
    keep = lambda x: x if seen is None else jnp.where(seen, x, 0.0)
    match form:
        case "identity":
            yield z, None  # which is 0 where it was padded
        case "relu":
            yield jnp.maximum(z, 0.0), None
        case "elu":
            yield keep(jnp.where(z > 0, 1 + z, jnp.exp2(LOG2E * jnp.minimum(z, 0.0)))), None
        case "exp":
            e = jnp.exp2(LOG2E * jnp.clip(z, -BOUND, BOUND))
            yield keep(e), None
            yield keep(inverse(e, later())), None
        case "softmax":
            e, *_ = _powers(LOG2E, z, seen)
            e = keep(e)
            yield e, 1 / jnp.sum(e, axis=1)
            e = keep(inverse(e, later()))
            yield e, 1 / jnp.sum(e, axis=1)
        case "joint":
            e, high, low = _powers(2 * LOG2E, z, seen)
            sums = [jnp.sum(keep(x), axis=1) for x in (e, inverse(e))]
            # Each half has its own maximum; they are to share one.
            shares = [jnp.exp2(x - jnp.maximum(high, low)) for x in (high, low)]
            whole = 1 / (shares[0] * sums[0] + shares[1] * sums[1])
            yield keep(e), shares[0] * whole
            yield keep(inverse(e, later())), shares[1] * whole


def _powers(factor: float, z, seen):
    """e, which with its inverse is the softmax of z and -z before they are normalised.

    With u = z - max z, which is 0 to -r, in powers of two: the one needs exp2(u), the other
    exp2(-u - r). Both come of w = u + r / 2 up to a factor of the row, as exp2(w) and its inverse,
    which float32 holds for r up to 2 HALF. From there on a gap in the middle is left out, whose
    elements are next to nothing in both.

    Returns:
      e, and the largest of z and of -z in every row, in powers of two.
    """
    most = lambda x: x if seen is None else jnp.where(seen, x, -jnp.inf)
    high, low = (factor * jnp.max(most(x), axis=1) for x in (z, -z))
    half = jnp.minimum(0.5 * (high + low), HALF)
    above, below = (wide(x, z) for x in (half - high, low - half))
    z = z * factor
    return jnp.exp2(jnp.maximum(z + above, jnp.minimum(z + below, 0.0))), high, low


def inverse(x, zeros=0):
    """1 / x to 1e-5 for x from 2^-HALF to 2^HALF, without the units that exponentials wait for.

    Newton's method, from a line through the bits: they are a number's logarithm, nearly.
    """
    middle = MIDDLE + zeros
    middle = middle if isinstance(middle, int) else wide(middle, x)
    bits = middle - lax.bitcast_convert_type(x, jnp.int32)
    y = lax.bitcast_convert_type(bits, jnp.float32)
    for _ in range(2):
        y = y * (2 - x * y)
    return y


def after(x, zeros):
    """x float32, not before these zeros are known."""
    bits = lax.bitcast_convert_type(x, jnp.int32) + zeros
    return lax.bitcast_convert_type(bits, jnp.float32)


def wide(rows, x):
    """A value for each row [64], along the rows of x [64 n]."""
    return lax.broadcast_in_dim(rows, x.shape, [0])
