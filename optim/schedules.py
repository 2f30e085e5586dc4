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

from optim import phases


def constant(n, *, total, peak, warmup, batch):
    """Linear warm-up to the peak, then the peak."""
    xp = phases.namespace(n)
    total, warmup = phases.checked(total, warmup)
    return peak * phases.ramp(xp, n, warmup)


def cosine(n, *, total, peak, warmup, batch, final_ratio: float = 0.1):
    """Half a cosine from the peak at Nw to final_ratio * peak at N (arXiv 1608.03983)."""
    xp = phases.namespace(n)
    total, warmup = phases.checked(total, warmup)
    # (1 + cos(pi t)) / 2 = sin^2(pi (1 - t) / 2), which is exactly zero at the end.
    shape = xp.sin(0.5 * math.pi * phases.left(xp, n, total, total - warmup)) ** 2
    return peak * phases.ramp(xp, n, warmup) * phases.above(final_ratio, shape)


def linear(n, *, total, peak, warmup, batch, final_ratio: float = 0.0):
    """A straight line from the peak at Nw to final_ratio * peak at N."""
    xp = phases.namespace(n)
    total, warmup = phases.checked(total, warmup)
    shape = phases.left(xp, n, total, total - warmup)
    return peak * phases.ramp(xp, n, warmup) * phases.above(final_ratio, shape)


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
    xp = phases.namespace(n)
    total, warmup = phases.checked(total, warmup, decay_fraction)
    left = phases.left(xp, n, total, decay_fraction * total)
    return peak * phases.ramp(xp, n, warmup) * phases.decayed(xp, left, shape, final_ratio)


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
    xp = phases.namespace(n, batch)
    total, warmup = phases.checked(total, warmup, decay_fraction)
    if rate <= 0:
        raise ValueError(f"optim.schedules.power.rate is {rate}; the decay needs a rate above 0.")
    tail = decay_fraction * total
    # The clip holds g at its value at Nw in the warm-up and at N - Nd in the tail, and keeps n = 0,
    # whose power is infinite, out of every branch.
    held = xp.clip(n, max(warmup, 1.0), max(total - tail, 1.0))
    law = xp.minimum(peak, batch / 4096 * a * held**b)
    fall = xp.expm1(rate * phases.left(xp, n, total, tail)) / math.expm1(rate)
    return law * phases.ramp(xp, n, warmup) * fall


def infinite(
    n,
    *,
    total,
    peak,
    warmup,
    batch,
    cooldown: str = "cosine",
    cooldown_tokens: int | None = None,  # length of the cooldown; none takes the fraction
    cooldown_fraction: float = 0.6,
    constant_ratio: float = 0.55,
    timescale: float = 10.0,
    decay_fraction: float = 0.1,
    final_ratio: float = 0.1,
):
    """Warm-up, cooldown to a constant, constant, anneal (arXiv 2403.08763, infinite schedules).

    With x from 0 to 1 in the cooldown, the factor on the peak falls from 1 to c = constant_ratio as
    'cosine':       c + (1 - c) (1 + cos(pi x)) / 2;
    'inverse-sqrt': 1 + (c - 1) h(x) / h(1), h(x) = 1 / sqrt(1 + timescale x) - 1.
    With t from 0 to 1 in the last Nd = decay_fraction * N tokens it is c (final_ratio / c)^t; with
    decay_fraction 0 it stays c, for a run to be branched from or lengthened later. A longer N moves
    a cooldown_fraction but not cooldown_tokens. A run that goes on from the constant phase of
    another has neither warm-up nor cooldown.

    Choices: without a cooldown the warm-up leads to c, and not to the peak and a jump from there as
    in the authors' code (EleutherAI/gpt-neox, pull request 1194); timescale 10, where theirs is 1.
    """
    xp = phases.namespace(n)
    if cooldown_tokens is None:
        cooldown_tokens = phases.share("infinite.cooldown_fraction", cooldown_fraction) * total
    cooling = float(cooldown_tokens)
    total, warmup = phases.checked(total, warmup, decay_fraction, cooling)
    phases.share("infinite.constant_ratio", constant_ratio)
    if not 0 < final_ratio <= constant_ratio:
        raise ValueError(
            f"optim.schedules.infinite.final_ratio is {final_ratio}; "
            f"it must be above 0 and at most constant_ratio, {constant_ratio}."
        )
    left = phases.left(xp, n, warmup + cooling, cooling) if cooling else 0.0
    level = phases.above(constant_ratio, phases.cooled(xp, left, cooldown, timescale))
    left = phases.left(xp, n, total, decay_fraction * total)
    level *= phases.falling(xp, left, final_ratio / constant_ratio)
    return peak * phases.ramp(xp, n, warmup) * level


def rewarm(
    n,
    *,
    total,
    peak,
    warmup,
    batch,
    start_ratio: float = 0.1,
    final_ratio: float = 0.1,
    cycles: int = 1,
):
    """Continual pre-training from a decayed checkpoint: warm up once more, then a cosine.

    From start_ratio * peak, the rate that the checkpoint ended with, in a line to the peak at Nw,
    then half a cosine to final_ratio * peak at N (arXiv 2308.04014, 2403.08763, which find that a
    warm-up of 0 to 2% of N does equally well). n counts the tokens of this run alone. With `cycles`
    the run is that many such curves of N / cycles tokens with a warm-up of Nw each, all but the
    first from final_ratio * peak.

    Choice: start_ratio; the authors' code (as for `infinite`) warms up from 0.
    """
    xp = phases.namespace(n)
    if cycles < 1:
        raise ValueError(f"optim.schedules.rewarm.cycles is {cycles}; it must be at least 1.")
    phases.share("rewarm.start_ratio", start_ratio)
    phases.share("rewarm.final_ratio", final_ratio)
    if warmup * cycles >= total:
        raise ValueError(
            f"A warm-up of {warmup:g} tokens does not fit into each of {cycles} cycles of a run of "
            f"{total:g}; take fewer cycles, or shorten optim.warmup_tokens or warmup_fraction."
        )
    length, warmup = phases.checked(total / cycles, warmup)
    cycle = xp.clip(xp.floor(n / length), 0, cycles - 1)
    # At a joint, rounding may put n into the cycle before or after; both have final_ratio there.
    since = xp.maximum(n - cycle * length, 0.0)
    start = xp.where(cycle > 0, final_ratio, start_ratio)
    rise = phases.above(start, phases.ramp(xp, since, warmup))
    moved = n + (cycles - 1 - cycle) * length  # into the last cycle, which ends exactly at N
    shape = xp.sin(0.5 * math.pi * phases.left(xp, moved, float(total), length - warmup)) ** 2
    return peak * xp.where(since < warmup, rise, phases.above(final_ratio, shape))
