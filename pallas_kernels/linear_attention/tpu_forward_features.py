"""Features in the forward kernel: a softmax without its maximum, and the check that it was safe.

Where no sum of exponentials is near the ends of float32's range, the shift by the maximum changes
nothing but costs as much as the exponentials. So it is left out at first; a row that then has a
sum outside of 2^-SAFE to 2^SAFE, which takes |z| above 41, has its block's features made again.
"""

import jax.numpy as jnp

from pallas_kernels.linear_attention import tpu_tiles
from pallas_kernels.linear_attention.tpu_tiles import LOG2E

SAFE = 60


def features(form: str, z, f: int, real, exact: bool = False):
    """Features as `tpu_tiles.features`, and the least and the largest sum, [1, tokens], or None."""
    if exact or form not in ("softmax", "joint"):
        return tpu_tiles.features(form, z, f, real), None
    z = z * (LOG2E if form == "softmax" else 2 * LOG2E)
    halves = [tpu_tiles.inside(jnp.exp2(x), f) for x in (z, -z)]
    sums = [jnp.sum(x, 0, keepdims=True) for x in halves]
    if form == "joint":
        sums = [sums[0] + sums[1]] * 2
    extremes = jnp.minimum(*sums), jnp.maximum(*sums)
    parts = [tpu_tiles.inverse(x) if real is None else real * tpu_tiles.inverse(x) for x in sums]
    return jnp.concatenate([x * part for x, part in zip(halves, parts, strict=True)], 0), extremes


def join(a, b):
    """The extremes of both."""
    if a is None or b is None:
        return b if a is None else a
    return jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])


def unsafe(extremes):
    """Whether some sum is outside of the range."""
    inside = (extremes[0] > 2.0**-SAFE) & (extremes[1] < 2.0**SAFE)
    return jnp.min(jnp.where(inside, 1.0, 0.0)) == 0.0
