"""What the curves of optim/schedules.py are made of: where a run is, and shapes from 1 to 0.

n is the tokens seen; xp the namespace that computes on it. Joints are exact in float32, because
`left` counts back from the end of a phase.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def namespace(*values):
    """jnp if one of the values is a JAX array or tracer; numpy, hence float64, otherwise."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def ramp(xp, n, warmup):
    """n / Nw up to 1; 1 everywhere without a warm-up."""
    return xp.where(n < warmup, n / (warmup or 1.0), 1.0)


def left(xp, n, total, tail):
    """What is left of the last `tail` tokens: 1 before they begin, falling linearly to 0 at N."""
    if tail == 0:
        return xp.ones_like(n, dtype=float)
    return xp.clip((total - n) / tail, 0.0, 1.0)


def above(floor, shape):
    """The shape, which falls from 1 to 0, raised so that it ends at the floor."""
    return floor + (1.0 - floor) * shape


def decayed(xp, left, shape, final_ratio):
    """The decay of `wsd`: 1 where left is 1, final_ratio where left is 0."""
    if shape == "linear":
        return above(final_ratio, left)
    if shape == "1-sqrt":
        done = 1.0 - left
        # The slope of a square root at 0 is infinite and would turn a gradient into NaN.
        root = xp.where(done > 0, xp.sqrt(xp.where(done > 0, done, 1.0)), 0.0)
        return above(final_ratio, 1.0 - root)
    if shape != "exponential":
        raise ValueError(
            f"optim.schedules.wsd.shape is {shape!r}; "
            "it must be 'exponential', 'linear' or '1-sqrt'."
        )
    if final_ratio <= 0:
        raise ValueError(
            f"optim.schedules.wsd.final_ratio is {final_ratio}, which an exponential decay never "
            "reaches; set it above 0, for example 0.1, or choose shape 'linear' or '1-sqrt'."
        )
    return falling(xp, left, final_ratio)


def falling(xp, left, ratio):
    """An exponential: 1 where left is 1, the ratio where left is 0."""
    return xp.exp(math.log(ratio) * (1.0 - left))


def cooled(xp, left, cooldown, timescale):
    """The cooldown of `infinite`: 1 where left is 1, 0 where left is 0."""
    if cooldown == "cosine":
        return xp.sin(0.5 * math.pi * left) ** 2
    if cooldown != "inverse-sqrt":
        raise ValueError(
            f"optim.schedules.infinite.cooldown is {cooldown!r}; "
            "it must be 'cosine' or 'inverse-sqrt'."
        )
    if timescale <= 0:
        raise ValueError(f"optim.schedules.infinite.timescale is {timescale}; it must be above 0.")
    # expm1 and log1p: 1 / sqrt(1 + timescale x) - 1 would cancel where timescale x is small.
    fallen = xp.expm1(-0.5 * xp.log1p(timescale * (1.0 - left)))
    return 1.0 - fallen / math.expm1(-0.5 * math.log1p(timescale))


def checked(total, warmup, decay_fraction=0.0, cooldown=0.0):
    """Run and warm-up as floats, as JAX would take a large Python integer for an int32.

    Raises ValueError where they, the cooldown's tokens and the decay do not fit together.
    """
    if not 0 <= decay_fraction <= 1:
        raise ValueError(f"decay_fraction is {decay_fraction}; it must lie between 0 and 1.")
    end = warmup + cooldown + decay_fraction * total
    # A part in 1e9 is let pass: fractions such as 0.9 + 0.1 are not exact.
    if min(warmup, cooldown) < 0 or warmup >= total or end > total * (1 + 1e-9):
        between = f", a cooldown of {cooldown:g}" if cooldown else ""
        raise ValueError(
            f"A warm-up of {warmup:g} tokens{between} and a decay of {decay_fraction * total:g} do "
            f"not fit into a run of {total:g} tokens; shorten them or train for longer."
        )
    return float(total), float(warmup)


def share(key, value):
    """The value, which must lie between 0 and 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"optim.schedules.{key} is {value}; it must lie between 0 and 1.")
    return value
