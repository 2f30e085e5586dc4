"""Schedules against closed forms written out here in float64.

They are pure functions of the token count, so a resumed run equals an uninterrupted one by
construction; there is no state to test.
"""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
]
G = lambda n: min(PEAK, 16 * 4.0 * n**-0.51)  # beta = 16
CROSSING = (16 * 4.0 / PEAK) ** (1 / 0.51)  # 7.5e6 tokens, inside the warm-up of RUN


def value(name, n, **own):
    return getattr(schedules, name)(n, **(RUN | own))


def close(got, want):
    # float64 on both sides: a few roundings, relative to the peak where the value is zero.
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * PEAK)


@pytest.mark.parametrize(
    ("name", "own", "points"),
    [
        ("constant", {}, {0.0: 0.0, 2.5e6: PEAK / 4, WARMUP: PEAK, 5e8: PEAK, TOTAL: PEAK}),
        (
            "cosine",
            {},
            {
                0.0: 0.0,
                WARMUP: PEAK,
                (TOTAL + WARMUP) / 2: PEAK * 0.55,
                3e8: PEAK * (0.1 + 0.45 * (1 + math.cos(math.pi * 2.9e8 / 9.9e8))),
                TOTAL: 0.1 * PEAK,
            },
        ),
        ("linear", {}, {0.0: 0.0, WARMUP: PEAK, 3e8: PEAK * 7e8 / 9.9e8, TOTAL: 0.0}),
        (
            "wsd",
            {},
            {0.0: 0.0, WARMUP: PEAK, 9e8: PEAK, 9.25e8: PEAK / 2, TOTAL: 0.0},
        ),
        (
            "wsd",
            {"shape": "exponential", "final_ratio": 0.25},
            {0.0: 0.0, WARMUP: PEAK, 9e8: PEAK, 9.5e8: PEAK / 2, TOTAL: PEAK / 4},
        ),
        (
            "wsd",
            {"shape": "linear", "decay_fraction": 0.2, "final_ratio": 0.1},
            {0.0: 0.0, 8e8: PEAK, 9e8: PEAK * 0.55, TOTAL: PEAK * 0.1},
        ),
        (
            "power",
            {},
            {
                0.0: 0.0,
                WARMUP / 2: G(WARMUP) / 2,
                WARMUP: G(WARMUP),
                1e8: 64 * 1e8**-0.51,
                9e8: 64 * 9e8**-0.51,
                9.5e8: 64 * 9e8**-0.51 * (math.exp(-0.5) - math.exp(-1)) / (1 - math.exp(-1)),
                TOTAL: 0.0,
            },
        ),
        (
            "power",
            {"warmup": 1e6},
            {1e6: PEAK, CROSSING / 2: PEAK, CROSSING: PEAK, CROSSING * 2: PEAK * 2**-0.51},
        ),
        ("power", {"warmup": 0}, {0.0: PEAK, 1.0: PEAK, CROSSING: PEAK, 4e8: G(4e8), TOTAL: 0.0}),
    ],
)
def test_closed_form(name, own, points):
    n = np.array(list(points))
    got = value(name, n, **own)
    assert got.dtype == np.float64
    close(got, list(points.values()))
    close([value(name, float(m), **own) for m in n], list(points.values()))


@pytest.mark.parametrize(("name", "own"), SHAPES)
def test_continuous_at_the_joints(name, own):
    joints = [WARMUP, CROSSING, TOTAL * (1 - own.get("decay_fraction", 0.1))]
    for joint in joints:
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


def test_every_schedule_has_the_supplied_arguments_and_literal_own_ones():
    for name, f in inspect.getmembers(schedules, inspect.isfunction):
        if name.startswith("_"):
            continue
        first, *others = inspect.signature(f).parameters.values()
        assert first.name == "n"
        assert all(p.kind == p.KEYWORD_ONLY for p in others)
        supplied = [p.name for p in others if p.default is p.empty]
        assert supplied == ["total", "peak", "warmup", "batch"]
        own = [p for p in others if p.default is not p.empty]
        assert all(type(p.default) is p.annotation for p in own)
        assert {name for name, _ in SHAPES} >= {name}


@pytest.mark.parametrize(
    ("name", "own", "sentence"),
    [
        ("wsd", {"shape": "cosine"}, "shape is 'cosine'; it must be 'exponential', 'linear' or"),
        ("wsd", {"shape": "exponential"}, "an exponential decay never reaches"),
        ("wsd", {"decay_fraction": 1.5}, "decay_fraction is 1.5; it must lie between 0 and 1"),
        ("wsd", {"decay_fraction": 0.995}, "do not fit into a run of 1e.09 tokens"),
        ("cosine", {"warmup": TOTAL}, "A warm-up of 1e.09 tokens"),
        ("power", {"rate": 0.0}, "needs a rate above 0"),
    ],
)
def test_errors_are_sentences(name, own, sentence):
    with pytest.raises(ValueError, match=sentence):
        value(name, 0.0, **own)
