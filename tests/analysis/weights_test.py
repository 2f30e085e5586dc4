"""Entropy, divergence, ranks and responses of weights, by loops over queries."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from analysis import weights, weights_report

B, H, L = 2, 3, 12
RNG = np.random.default_rng(0)


def softmax(s, seen):
    e = np.where(seen, np.exp(s - np.where(seen, s, -np.inf).max(-1, keepdims=True)), 0.0)
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def pair():
    """t and a, causal; a has zeros and equal weights among them."""
    seen = np.broadcast_to(np.tril(np.ones((L, L), bool)), (B, H, L, L))
    s = 2 * RNG.standard_normal((B, H, L, L))
    a = np.maximum(np.round(s + RNG.standard_normal(s.shape)), 0) * seen + 0.5 * np.eye(L)
    return softmax(s, seen), a / a.sum(-1, keepdims=True)


def test_figures_are_those_of_each_query(pair):
    t, a = pair
    found = weights.entropy(a), weights.divergence(t, a), weights.monotonicity(t, a)
    for b, h, i in np.ndindex(B, H, L):
        p, q = t[b, h, i, : i + 1], a[b, h, i, : i + 1]
        positive = q[q > 0]
        assert found[0][b, h, i] == pytest.approx(-np.sum(positive * np.log(positive)))
        log = np.log(np.maximum(q, weights.SMALLEST))
        assert found[1][b, h, i] == pytest.approx(np.sum(p * (np.log(p) - log)))
        if i + 1 < weights.LEAST:
            assert np.isnan(found[2][b, h, i])
        else:
            exact = spearmanr(p, q).statistic if np.ptp(q) else 0.0
            assert found[2][b, h, i] == pytest.approx(exact, abs=1e-12)


def test_softmax_itself_is_sharp_monotone_and_on_the_curve(pair):
    t, _ = pair
    found = weights.measured({0: (t, t)})
    assert found["means"]["divergence"] == pytest.approx(0, abs=1e-12)
    assert found["means"]["monotonicity"] == pytest.approx(1)
    assert found["means"]["entropy"] == found["means"]["teacher_entropy"]
    middle = np.array(found["response"])[:, 1]
    assert np.all((middle <= np.exp(weights.EDGES[1:]))[np.isfinite(middle)])
    assert np.all((middle >= np.exp(weights.EDGES[:-1]))[np.isfinite(middle)])


def test_padding_counts_for_nothing(pair):
    t, a = pair
    whole = weights.measured({1: (t[:1], a[:1])})
    t, a = t.copy(), a.copy()
    t[1], a[1] = 0, 0
    np.testing.assert_equal(weights.measured({1: (t, a)}), whole)
    assert [(x["layer"], x["head"]) for x in whole["heads"]] == [(1, h) for h in range(H)]


def test_queries_that_weigh_nothing_are_left_out_and_counted(pair):
    """As where a hybrid's window is switched off."""
    t, a = pair
    cut = a.copy()
    cut[:, :, :3] = 0
    found = weights.measured({0: (t, cut)})
    assert found["means"]["unseeing"] == pytest.approx(3 / L)
    rows = weights.entropy(a)[:, :, 3:]
    assert found["means"]["entropy"] == pytest.approx(rows.mean())
    assert found["means"]["divergence"] < 20


def test_equal_weights_follow_no_score(pair):
    t, _ = pair
    flat = np.tril(np.ones((L, L))) / np.arange(1, L + 1)[:, None]
    found = weights.measured({0: (t, np.broadcast_to(flat, t.shape))})
    assert found["means"]["monotonicity"] == 0
    assert found["means"]["entropy"] == pytest.approx(np.mean(np.log(np.arange(1, L + 1))))


def test_the_report_names_arms_and_spreads(pair, tmp_path):
    t, a = pair
    arms = {"exact": {"0": weights.measured({0: (t, t)}), "1": weights.measured({0: (t, t)})}}
    arms["rough"] = {"0": weights.measured({0: (t, a), 1: (t, a)})}
    facts = {"rows": 2, "tokens": 12, "versions": {"jax": "0"}, "seeds": [0, 1]}
    held = {"facts": facts, "arms": arms}
    text = weights_report.markdown(held)
    assert "| 1.000 (0.000) |" in text
    assert "| versions | jax 0 |" in text
    assert "2 held-out rows of 12 tokens" in text
    weights_report.draw(held, tmp_path / "weights.png")
    assert (tmp_path / "weights.png").stat().st_size > 10_000
