"""Spreads, intervals and verdicts against scipy's t-tests and the rule spelt out again."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.compare import KINDS, VERDICTS, Rule, interval, spread

RULE = Rule("old", "validation/loss", 0.01, {"new": "better"})
numbers = st.floats(-1, 1).map(lambda x: round(x, 6))
samples = st.lists(numbers, min_size=2, max_size=6)


@given(samples)
@settings(max_examples=50)
def test_spread(values):
    found = spread(values)
    assert found["n"] == len(values)
    assert (found["min"], found["max"]) == (min(values), max(values))
    # Sums of a few numbers below 1, in another order.
    assert found["mean"] == pytest.approx(np.mean(values), abs=1e-12)
    assert found["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)


def test_one_value_has_no_spread_and_no_interval():
    assert spread([2.0]) == {"n": 1, "mean": 2.0, "sd": None, "min": 2.0, "max": 2.0}
    with pytest.raises(ValueError, match="at least two values, got 1"):
        interval([2.0])


@pytest.mark.parametrize("n", [2, 3, 5])
def test_interval_is_that_of_the_paired_t_test(n):
    rng = np.random.default_rng(n)
    base, arm = rng.normal(size=(2, n))
    expected = stats.ttest_rel(arm, base).confidence_interval(0.95)
    # The quantile comes from two routines of scipy, which agree to about ten digits.
    np.testing.assert_allclose(interval(list(arm - base)), expected, rtol=1e-8)


def test_interval_of_three_by_the_printed_table():
    """t(0.975; 2) is 4.303 in every textbook; 1, 2, 3 have mean 2 and standard deviation 1."""
    low, high = interval([1.0, 2.0, 3.0])
    assert (high - low) / 2 * 3**0.5 == pytest.approx(4.303, abs=5e-4)
    assert (low + high) / 2 == pytest.approx(2.0)


def test_intervals_hold_the_truth_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(0.3, 2.0, size=(4000, 3))
    held = [low <= 0.3 <= high for low, high in map(interval, draws.tolist())]
    assert abs(np.mean(held) - 0.95) < 4 * (0.95 * 0.05 / 4000) ** 0.5  # four standard errors


@pytest.mark.parametrize(
    ("kind", "differences", "verdict"),
    [
        ("better", [-0.030, -0.031, -0.032], "confirmed"),
        ("better", [-0.009, -0.0091, -0.0092], "refuted"),  # certain, and smaller than counts
        ("better", [0.030, 0.031, 0.032], "refuted"),
        ("better", [-0.06, -0.03, 0.02], "undecided"),
        ("better", [-0.05, 0.03, 0.05], "undecided"),
        ("better", [-0.05], "undecided"),
        ("no worse", [-0.03, -0.031, -0.032], "confirmed"),
        ("no worse", [0.001, 0.002, 0.003], "confirmed"),
        ("no worse", [0.030, 0.031, 0.032], "refuted"),
        ("no worse", [0.0088, 0.009, 0.0092], "confirmed"),
        ("no worse", [-0.05, 0.03, 0.05], "undecided"),
        ("no worse", [], "undecided"),
    ],
)
def test_verdict(kind, differences, verdict):
    assert RULE.judge(kind, differences) == verdict
    upside_down = dataclasses.replace(RULE, higher=True)
    assert upside_down.judge(kind, [-d for d in differences]) == verdict


@given(samples, st.sampled_from(KINDS), st.sampled_from([0.0, 0.01, 0.3]))
@settings(max_examples=150)
def test_verdict_is_what_the_sentence_says(differences, kind, margin):
    rule = dataclasses.replace(RULE, margin=margin)
    mean, sd, n = np.mean(differences), np.std(differences, ddof=1), len(differences)
    half = stats.t.ppf(0.975, n - 1) * sd / n**0.5
    low, high = mean - half, mean + half
    said = {
        "better": {"confirmed": high < 0 and mean <= -margin, "refuted": low > -margin},
        "no worse": {"confirmed": high < margin, "refuted": low > 0 and mean >= margin},
    }[kind]
    edges = [low, high, low + margin, high - margin, mean - margin, mean + margin]
    if min(map(abs, edges)) > 1e-9:  # two roundings may differ on the edge itself
        assert rule.judge(kind, differences) == next((v for v in said if said[v]), "undecided")
    assert rule.judge(kind, differences) in VERDICTS


def test_the_sentence_says_everything_that_is_declared():
    changes = dict(
        baseline="x", metric="loss", margin=0.02, claims={"new": "no worse"}, higher=True
    )
    told = {str(dataclasses.replace(RULE, **{name: x})) for name, x in changes.items()}
    assert len(told | {str(RULE)}) == len(changes) + 1
    both = dataclasses.replace(RULE, claims={"a": "better", "b": "better", "c": "no worse"})
    assert "Claimed: a and b are better than old; c is no worse than old." in str(both)
    assert "'Better' is" in str(both)
    assert "'No worse' is" in str(both)


def test_best():
    assert RULE.best({"a": 2.0, "b": 1.0, "c": 1.0}) == "b"
    assert dataclasses.replace(RULE, higher=True).best({"a": 2.0, "b": 1.0}) == "a"
    assert RULE.best({}) is None
