"""Schedules against closed forms written out here in float64.

They are pure functions of the token count, so a resumed run equals an uninterrupted one by
construction; there is no state to test.
"""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optim import schedules

TOTAL, PEAK, WARMUP, BATCH = 1e9, 0.02, 1e7, 16 * 4096
RUN = {"total": TOTAL, "peak": PEAK, "warmup": WARMUP, "batch": BATCH}
SHAPES = [
    ("constant", {}),
    ("cosine", {}),
    ("cosine", {"final_ratio": 0.0}),
    ("linear", {}),
    ("linear", {"final_ratio": 0.2}),
    ("wsd", {}),
    ("wsd", {"shape": "linear", "final_ratio": 0.05}),
    ("wsd", {"shape": "exponential", "final_ratio": 0.1, "decay_fraction": 0.2}),
    ("wsd", {"decay_fraction": 0.0}),
    ("power", {}),
    ("power", {"rate": 4.0, "decay_fraction": 0.25}),
    ("power", {"decay_fraction": 0.0}),
    ("infinite", {}),
    ("infinite", {"cooldown": "inverse-sqrt", "cooldown_fraction": 0.3}),
    ("infinite", {"cooldown_tokens": 200_000_000, "decay_fraction": 0.0}),
    ("infinite", {"cooldown_fraction": 0.0, "timescale": 1e-9}),
    ("rewarm", {}),
    ("rewarm", {"start_ratio": 0.0, "final_ratio": 0.2, "cycles": 4}),
]
NAMES = [n for n, _ in inspect.getmembers(schedules, inspect.isfunction) if not n.startswith("_")]
G = lambda n: min(1.0, 16 * 4.0 * n**-0.51 / PEAK)  # beta = 16
CROSSING = (16 * 4.0 / PEAK) ** (1 / 0.51)  # 7.5e6 tokens, inside the warm-up of RUN
MIDDLE = (TOTAL + WARMUP) / 2
HALF_COSINE = lambda t: (1 + math.cos(math.pi * t)) / 2
COSINE, QUARTER = HALF_COSINE(2.9e8 / 9.9e8), HALF_COSINE(0.25)


def value(name, n, **own):
    return getattr(schedules, name)(n, **(RUN | own))


def close(got, want):
    # float64 on both sides: a few roundings, relative to the peak where the value is zero.
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * PEAK)


E1 = math.exp(-1)
POINTS = [
    ("constant", {}, {0.0: 0.0, 2.5e6: 0.25, WARMUP: 1.0, 5e8: 1.0, TOTAL: 1.0}),
    ("cosine", {}, {0.0: 0.0, WARMUP: 1.0, MIDDLE: 0.55, 3e8: 0.1 + 0.9 * COSINE, TOTAL: 0.1}),
    ("linear", {}, {0.0: 0.0, WARMUP: 1.0, 3e8: 7e8 / 9.9e8, TOTAL: 0.0}),
    ("wsd", {}, {0.0: 0.0, WARMUP: 1.0, 9e8: 1.0, 9.25e8: 0.5, TOTAL: 0.0}),
    ("wsd", {"shape": "exponential", "final_ratio": 0.25},
     {0.0: 0.0, WARMUP: 1.0, 9e8: 1.0, 9.5e8: 0.5, TOTAL: 0.25}),
    ("wsd", {"shape": "linear", "decay_fraction": 0.2, "final_ratio": 0.1},
     {0.0: 0.0, 8e8: 1.0, 9e8: 0.55, TOTAL: 0.1}),
    ("power", {},
     {0.0: 0.0, WARMUP / 2: G(WARMUP) / 2, WARMUP: G(WARMUP), 1e8: G(1e8), 9e8: G(9e8),
      9.5e8: G(9e8) * (math.exp(-0.5) - E1) / (1 - E1), TOTAL: 0.0}),
    ("power", {"warmup": 1e6},
     {1e6: 1.0, CROSSING / 2: 1.0, CROSSING: 1.0, CROSSING * 2: 2**-0.51}),
    ("power", {"warmup": 0}, {0.0: 1.0, 1.0: 1.0, CROSSING: 1.0, 4e8: G(4e8), TOTAL: 0.0}),
    ("infinite", {},
     {0.0: 0.0, 2.5e6: 0.25, WARMUP: 1.0, 1.6e8: 0.55 + 0.45 * QUARTER, 3.1e8: 0.775, 6.1e8: 0.55,
      9e8: 0.55, 9.25e8: 0.55**0.75 * 0.1**0.25, 9.5e8: math.sqrt(0.055), TOTAL: 0.1}),
    # h(5 / 12) = 1 / 1.5 - 1 is two thirds of h(1) = 1 / 2 - 1.
    ("infinite", {"cooldown": "inverse-sqrt", "timescale": 3.0, "cooldown_tokens": 120_000_000,
                  "constant_ratio": 0.4, "decay_fraction": 0.25, "final_ratio": 0.01},
     {0.0: 0.0, WARMUP: 1.0, 6e7: 0.6, 1.3e8: 0.4, 7.5e8: 0.4, 8.75e8: math.sqrt(0.004),
      TOTAL: 0.01}),
    ("infinite", {"warmup": 0, "cooldown_fraction": 0.0, "decay_fraction": 0.0},
     {0.0: 0.55, 5e8: 0.55, TOTAL: 0.55}),
    ("infinite", {"cooldown_fraction": 0.0}, {0.0: 0.0, 5e6: 0.275, WARMUP: 0.55, 9e8: 0.55}),
    ("rewarm", {"start_ratio": 0.2},
     {0.0: 0.2, 5e6: 0.6, WARMUP: 1.0, 3e8: 0.1 + 0.9 * COSINE, MIDDLE: 0.55, TOTAL: 0.1}),
    ("rewarm", {"start_ratio": 0.5, "final_ratio": 0.3, "cycles": 2, "warmup": 1e8},
     {0.0: 0.5, 5e7: 0.75, 1e8: 1.0, 3e8: 0.65, 5e8: 0.3, 5.5e8: 0.65, 6e8: 1.0,
      7e8: 0.3 + 0.7 * QUARTER, TOTAL: 0.3}),
    ("rewarm", {"warmup": 0, "cycles": 2}, {0.0: 1.0, 2.5e8: 0.55, 5e8: 1.0, TOTAL: 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "own", "points"), POINTS)
def test_closed_form(name, own, points):
    n, want = np.array(list(points)), PEAK * np.array(list(points.values()))
    got = value(name, n, **own)
    assert got.dtype == np.float64
    close(got, want)
    close([value(name, float(m), **own) for m in n], want)


def joints(args):
    """Where a curve with these arguments, or their usual defaults, may bend."""
    total, warmup, cycles = args["total"], args["warmup"], args.get("cycles", 1)
    cooldown = args.get("cooldown_tokens") or args.get("cooldown_fraction", 0.6) * total
    starts = [k * total / cycles for k in range(cycles)]
    tail = total * (1 - args.get("decay_fraction", 0.1))
    found = [*starts, *(start + warmup for start in starts), warmup + cooldown, tail]
    return [joint for joint in found if 1 <= joint <= total]


@pytest.mark.parametrize(("name", "own"), SHAPES)
def test_continuous_at_the_joints(name, own):
    for joint in [*joints(own | RUN), CROSSING]:
        # One token to either side: the curve moves by one token's worth, and by the square root of
        # a token's share of the tail where the tail starts as a square root.
        below, at, above = value(name, np.array([joint - 1, joint, min(joint + 1, TOTAL)]), **own)
        assert abs(at - below) < 1e-6 * PEAK
        assert abs(above - at) < 2e-4 * PEAK


@pytest.mark.parametrize(("name", "own"), SHAPES)
def test_traced_float32(name, own):
    n = np.array([0.0, 1.0, 5e6, WARMUP, CROSSING, 3e8, 8.99e8, 9.5e8, 9.99e8, TOTAL])

    @jax.jit
    def f(n, batch):
        of = lambda n, batch: value(name, n, **own, batch=batch)
        return of(n, batch), jax.vmap(jax.grad(of, (0, 1)), (0, None))(n, batch)

    got, slopes = f(np.float32(n), np.float32(BATCH))
    assert got.dtype == jnp.float32
    # Tail progress is right to 1.2e-7 / decay_fraction, the square root at its start to the root.
    np.testing.assert_allclose(got, value(name, n, **own), rtol=2e-5, atol=2e-6 * PEAK)
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize(("name", "own"), SHAPES)
def test_the_end_is_exact_in_float32(name, own):
    total = 1e13 + 12345.0
    args = RUN | own | {"total": total, "warmup": 1e9}
    f = getattr(schedules, name)
    n = jnp.float32(total)
    want = np.float32(f(total, **args))
    # Power's law and final_ratio carry float32 rounding; progress itself must have none.
    np.testing.assert_allclose(f(n, **args), want, rtol=1e-5)
    assert np.isfinite(f(jnp.float32(1e10), **args))


def test_power_keeps_its_clock_through_the_warmup():
    """B 512, S 4096, 2000 warm-up steps, a 4.6: with a clock restarted there, 0.01664."""
    batch = 512 * 4096
    args = {"total": 1e13, "peak": 0.02, "warmup": 2000 * batch, "batch": batch, "a": 4.6}
    assert round(float(schedules.power(8000.0 * batch, **args)), 5) == 0.01437
    assert round(float(schedules.power(jnp.float32(8000.0 * batch), **args)), 5) == 0.01437


def test_power_follows_the_present_batch():
    n = np.array([1e8, 5e8])  # beyond the cap's crossing for both batches
    close(value("power", n, batch=2 * BATCH), 2 * value("power", n))
    batches = np.array([BATCH, 2 * BATCH])
    close(value("power", n, batch=batches), value("power", n) * [1, 2])


def test_a_longer_run_leaves_a_cooldown_in_tokens_where_it_was():
    n, own = np.array([1e8, 3e8, 7e8]), {"cooldown_tokens": 600_000_000, "decay_fraction": 0.0}
    close(value("infinite", n, **own, total=2 * TOTAL), value("infinite", n, **own))
    assert value("infinite", 7e8, total=2 * TOTAL) > value("infinite", 7e8)


@pytest.mark.parametrize(
    ("name", "own"), [("infinite", {"cooldown_tokens": 5 * 10**12}), ("rewarm", {"cycles": 3})]
)
def test_tokens_beyond_int32_are_plain_numbers_to_jax(name, own):
    own |= {"total": 10**13, "warmup": 10**10}
    # A count to 6e-8 of the run, whose curve falls by less than 2 pi peaks a run.
    near = dict(rtol=0, atol=4e-7 * PEAK)
    np.testing.assert_allclose(
        value(name, jnp.float32(2.5e12), **own), value(name, 2.5e12, **own), **near
    )


def test_rounding_at_a_joint_gives_no_negative_rate():
    joints = np.float32(np.arange(1, 7) * 1e13 / 7)
    n = jnp.concatenate([joints, np.nextafter(joints, np.float32(0))])
    assert value("rewarm", n, total=1e13, final_ratio=0.0, cycles=7).min() >= 0


OWN = {
    "final_ratio": st.floats(0.001, 1),
    "start_ratio": st.floats(0, 1),
    "constant_ratio": st.floats(0.001, 1),
    "decay_fraction": st.just(0.0) | st.floats(0.01, 0.4),
    "cooldown_fraction": st.just(0.0) | st.floats(0.01, 0.4),
    "cooldown_tokens": st.none(),
    "shape": st.sampled_from(["exponential", "linear", "1-sqrt"]),
    "cooldown": st.sampled_from(["cosine", "inverse-sqrt"]),
    "timescale": st.floats(1e-3, 1e3),
    "cycles": st.integers(1, 4),
    "a": st.floats(0.1, 10),
    "b": st.floats(-1, -0.1),
    "rate": st.floats(0.1, 10),
}


@st.composite
def runs(draw, name):
    """Arguments of a schedule that fit together, and counts in its run, its joints among them."""
    own = inspect.signature(getattr(schedules, name)).parameters.values()
    args = {p.name: draw(OWN[p.name]) for p in own if p.default is not p.empty}
    if "constant_ratio" in args:
        args["final_ratio"] *= args["constant_ratio"]
    args["total"] = draw(st.floats(1e4, 1e13))
    args["warmup"] = args["total"] * draw(st.just(0.0) | st.floats(1e-3, 0.19))
    args |= {"peak": draw(st.floats(1e-5, 10)), "batch": draw(st.floats(1, 1e8))}
    anywhere = draw(st.lists(st.floats(0, 1), min_size=4, max_size=4))
    n = [0.0, args["total"], *(share * args["total"] for share in anywhere), *joints(args)]
    # As many for every run, so that JAX compiles each operation once.
    return args, np.resize(np.float32(n), 16).clip(0, np.float32(args["total"]))


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_run(name, data):
    args, n = data.draw(runs(name))
    f = functools.partial(getattr(schedules, name), **args)
    exact, got = f(np.float64(n)), f(jnp.asarray(n))
    slopes = jax.vmap(jax.grad(f))(jnp.asarray(n))
    assert exact.dtype == np.float64
    assert got.dtype == slopes.dtype == jnp.float32
    assert np.isfinite(exact).all()
    assert np.isfinite(got).all()
    assert np.isfinite(slopes).all()
    assert exact.min() >= 0 <= got.min()
    # A factor of 1 may come out as 1 plus a few roundings.
    assert exact.max() <= args["peak"] * (1 + 1e-12)
    assert got.max() <= args["peak"] * (1 + 1e-6)
    # float32 places a count to within 2^-22 of the run (n, N and their difference round to 2^-24
    # each), between whose ends and joints the curve is monotone; its own functions and a power of
    # up to 1e13 tokens, whose exponent's rounding counts 30-fold, leave some 30 roundings.
    moves = args["total"] * 2.0**-22
    near = [n - moves, n, n + moves] + [np.clip(j, n - moves, n + moves) for j in joints(args)]
    values = f(np.clip(near, 0, args["total"]))
    slack = 30 * 2.0**-23 * args["peak"]
    assert (got >= values.min(0) - slack).all()
    assert (got <= values.max(0) + slack).all()


def test_every_schedule_has_the_supplied_arguments_and_literal_own_ones():
    assert {name for name, _ in SHAPES} == set(NAMES)
    for name in NAMES:
        first, *others = inspect.signature(getattr(schedules, name)).parameters.values()
        assert first.name == "n"
        assert all(p.kind == p.KEYWORD_ONLY for p in others)
        supplied = [p.name for p in others if p.default is p.empty]
        assert supplied == ["total", "peak", "warmup", "batch"]
        own = [p for p in others if p.default is not p.empty]
        assert all(isinstance(p.default, p.annotation) for p in own)


@pytest.mark.parametrize(
    ("name", "own", "sentence"),
    [
        ("wsd", {"shape": "cosine"}, "shape is 'cosine'; it must be 'exponential', 'linear' or"),
        ("wsd", {"shape": "exponential"}, "an exponential decay never reaches"),
        ("wsd", {"decay_fraction": 1.5}, "decay_fraction is 1.5; it must lie between 0 and 1"),
        ("wsd", {"decay_fraction": 0.995}, "do not fit into a run of 1e.09 tokens"),
        ("cosine", {"warmup": TOTAL}, "A warm-up of 1e.09 tokens"),
        ("power", {"rate": 0.0}, "needs a rate above 0"),
        ("infinite", {"cooldown": "linear"}, "cooldown is 'linear'; it must be 'cosine' or 'inv"),
        ("infinite", {"cooldown_fraction": 0.95}, "a cooldown of 9.5e.08 and a decay of 1e.08 do"),
        (
            "infinite",
            {"cooldown_fraction": -0.1},
            "infinite.cooldown_fraction is -0.1; it must lie",
        ),
        ("infinite", {"cooldown_tokens": -5}, "a cooldown of -5 and a decay of 1e.08 do not fit"),
        ("infinite", {"constant_ratio": 1.5}, "constant_ratio is 1.5; it must lie between 0 and 1"),
        ("infinite", {"final_ratio": 0.6}, "final_ratio is 0.6; it must be above 0 and at most"),
        ("infinite", {"final_ratio": 0.0}, "final_ratio is 0.0; it must be above 0 and at most"),
        (
            "infinite",
            {"cooldown": "inverse-sqrt", "timescale": 0.0},
            "timescale is 0.0; it must be",
        ),
        ("rewarm", {"start_ratio": 1.5}, "rewarm.start_ratio is 1.5; it must lie between 0 and 1"),
        ("rewarm", {"final_ratio": -1.0}, "rewarm.final_ratio is -1.0; it must lie between 0 and"),
        ("rewarm", {"cycles": 0}, "cycles is 0; it must be at least 1"),
        (
            "rewarm",
            {"cycles": 100},
            "1e.07 tokens does not fit into each of 100 cycles",
        ),
    ],
)
def test_errors_are_sentences(name, own, sentence):
    with pytest.raises(ValueError, match=sentence):
        value(name, 0.0, **own)
