"""Learning rates as pure functions of the tokens seen; `optim.schedule` names one of them.

`name(n, *, total, peak, warmup, batch, <own>)` is the learning rate at n tokens. `build` supplies
total = N, the tokens of the run; peak = optim.lr; warmup = Nw, in tokens; batch = tokens of the
present step. The arguments with defaults are the keys `optim.schedules.<name>.*`. n and batch may
be traced, scalars or arrays; total, peak, warmup and own arguments are plain numbers.

Nothing is remembered between calls, so a resumed run has the learning rates of an uninterrupted
one, and neither a new batch size nor a new length moves the clock.

Precision: numpy input is computed in float64, JAX input in its own dtype. A float32 count is right
to one part in 2^24 (at 1e13 tokens: 5e5 tokens, a fraction of a batch there), so progress through a
tail of fraction d is right to 1.2e-7 / d. Tails count back from the end, which is therefore exact.

Errors: ValueError for phases that do not fit into the run, and for values outside their range.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def constant(n, *, total, peak, warmup, batch):
    """Linear warm-up to the peak, then the peak."""
    xp = _namespace(n)
    total, warmup = _phases(total, warmup)
    return peak * _ramp(xp, n, warmup)


def cosine(n, *, total, peak, warmup, batch, final_ratio: float = 0.1):
    """Half a cosine from the peak at Nw to final_ratio * peak at N (arXiv 1608.03983)."""
    xp = _namespace(n)
    total, warmup = _phases(total, warmup)
    # (1 + cos(pi t)) / 2 = sin^2(pi (1 - t) / 2), which is exactly zero at the end.
    shape = xp.sin(0.5 * math.pi * _left(xp, n, total, total - warmup)) ** 2
    return peak * _ramp(xp, n, warmup) * _above(final_ratio, shape)


def linear(n, *, total, peak, warmup, batch, final_ratio: float = 0.0):
    """A straight line from the peak at Nw to final_ratio * peak at N."""
    xp = _namespace(n)
    total, warmup = _phases(total, warmup)
    shape = _left(xp, n, total, total - warmup)
    return peak * _ramp(xp, n, warmup) * _above(final_ratio, shape)


def wsd(
    n,
    *,
    total,
    peak,
    warmup,
    batch,
    decay_fraction: float = 0.1,
    shape: str = "1-sqrt",
    final_ratio: float = 0.0,
):
    """Warm-up, stable, decay over the last Nd = decay_fraction * N tokens to final_ratio * peak.

    With t from 0 to 1 in the decay and r = final_ratio, the factor on the peak is
    'exponential': r^t, MiniCPM (arXiv 2404.06395: 0.5^((n - (N - Nd)) / T)); needs r > 0;
    'linear':      r + (1 - r) (1 - t);
    '1-sqrt':      r + (1 - r) (1 - sqrt(t)), Haegele et al. (arXiv 2405.18392).
    decay_fraction 0 never decays, for a run to be branched from later.
    """
    xp = _namespace(n)
    total, warmup = _phases(total, warmup, decay_fraction)
    left = _left(xp, n, total, decay_fraction * total)
    return peak * _ramp(xp, n, warmup) * _decayed(xp, left, shape, final_ratio)


def power(
    n,
    *,
    total,
    peak,
    warmup,
    batch,
    a: float = 4.0,
    b: float = -0.51,
    decay_fraction: float = 0.1,
    rate: float = 1.0,
):
    """Power scheduler (arXiv 2408.13359, eqs 7 and 8): one setting for any batch size and length.

    g(n) = min(peak, beta * a * n^b), beta = batch / 4096. The warm-up is (n / Nw) g(Nw), then g(n),
    and over the last Nd = decay_fraction * N tokens f g(N - Nd). n always counts from the first
    token of the run: restarted after the warm-up it is 16% too high at four times the warm-up.

    Choices: f, left open by the paper, is the exponential normalised to end at zero,
    (e^(-rate t) - e^-rate) / (1 - e^-rate); rate 1 is the authors' code. beta is the present
    batch's in all phases: a new batch size scales the curve wherever the cap does not bind.
    """
    xp = _namespace(n, batch)
    total, warmup = _phases(total, warmup, decay_fraction)
    if rate <= 0:
        raise ValueError(f"optim.schedules.power.rate is {rate}; the decay needs a rate above 0.")
    tail = decay_fraction * total
    # The clip holds g at its value at Nw in the warm-up and at N - Nd in the tail, and keeps n = 0,
    # whose power is infinite, out of every branch.
    held = xp.clip(n, max(warmup, 1.0), max(total - tail, 1.0))
    law = xp.minimum(peak, batch / 4096 * a * held**b)
    fall = xp.expm1(rate * _left(xp, n, total, tail)) / math.expm1(rate)
    return law * _ramp(xp, n, warmup) * fall


def _namespace(*values):
    """jnp if one of the values is a JAX array or tracer; numpy, hence float64, otherwise."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def _ramp(xp, n, warmup):
    """n / Nw up to 1; 1 everywhere without a warm-up."""
    return xp.where(n < warmup, n / (warmup or 1.0), 1.0)


def _left(xp, n, total, tail):
    """What is left of the last `tail` tokens: 1 before they begin, falling linearly to 0 at N."""
    if tail == 0:
        return xp.ones_like(n, dtype=float)
    return xp.clip((total - n) / tail, 0.0, 1.0)


def _above(floor, shape):
    """The shape, which falls from 1 to 0, raised so that it ends at the floor."""
    return floor + (1.0 - floor) * shape


def _decayed(xp, left, shape, final_ratio):
    """The decay of `wsd`: 1 where left is 1, final_ratio where left is 0."""
    if shape == "linear":
        return _above(final_ratio, left)
    if shape == "1-sqrt":
        done = 1.0 - left
        # The slope of a square root at 0 is infinite and would turn a gradient into NaN.
        root = xp.where(done > 0, xp.sqrt(xp.where(done > 0, done, 1.0)), 0.0)
        return _above(final_ratio, 1.0 - root)
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
    return xp.exp(math.log(final_ratio) * (1.0 - left))


def _phases(total, warmup, decay_fraction=0.0):
    """Both as floats, as JAX would take a large Python integer for an int32; or ValueError."""
    if not 0 <= decay_fraction <= 1:
        raise ValueError(f"decay_fraction is {decay_fraction}; it must lie between 0 and 1.")
    # A part in 1e9 is let pass: fractions such as 0.9 + 0.1 are not exact.
    if warmup < 0 or warmup >= total or warmup + decay_fraction * total > total * (1 + 1e-9):
        raise ValueError(
            f"A warm-up of {warmup:g} tokens and a decay of {decay_fraction * total:g} do not fit "
            f"into a run of {total:g} tokens; shorten them or train for longer."
        )
    return float(total), float(warmup)
