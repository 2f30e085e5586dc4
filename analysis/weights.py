"""How sharp the weights of linear attention are, and whether they follow the scores.

Hedgehog (arXiv 2402.04347, section 3) names two things that fixed feature maps lack and softmax
has: weights of low entropy, and weights that grow with the score q.k. Here both are measured
against softmax attention's weights t for the very same queries and keys, of which log t is the
score up to a constant of the query.
"""

from collections.abc import Mapping

import numpy as np

LEAST = 8  # keys that a query needs for its ranks to say something
EDGES = np.linspace(-8.0, 0.0, 17)  # of the score's distance to the query's best, in nats
SMALLEST = 1e-12  # of weights whose logarithm is taken


def entropy(a: np.ndarray) -> np.ndarray:
    """Nats of each query's weights a `[... L L]`, which sum to one: `[... L]`."""
    return -np.sum(a * np.log(np.maximum(a, SMALLEST)), -1)


def divergence(t: np.ndarray, a: np.ndarray) -> np.ndarray:
    """KL(t || a) in nats of each query: `[... L]`."""
    log = lambda x: np.log(np.maximum(x, SMALLEST))
    return np.sum(t * (log(t) - log(a)), -1)


def monotonicity(t: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of a with t over each query's keys, equal ones sharing a rank.

    NaN for queries of fewer than LEAST keys; 0 where all weights are equal.
    """
    from scipy.stats import rankdata

    seen = t > 0
    counts = seen.sum(-1)
    ranks = [np.where(seen, rankdata(np.where(seen, x, np.inf), axis=-1), 0.0) for x in (t, a)]
    few = np.maximum(counts, 1)[..., None]
    centred = [np.where(seen, x - x.sum(-1, keepdims=True) / few, 0.0) for x in ranks]
    both, *own = (np.sum(x * y, -1) for x, y in ((*centred,), centred[:1] * 2, centred[1:] * 2))
    size = np.sqrt(own[0] * own[1])
    return np.where(counts < LEAST, np.nan, both / np.where(size > 0, size, 1.0))


def response(t: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Quartiles of a, as a share of the query's largest, by how far the score is below its best.

    `[bins 3]` for the bins of EDGES; NaN where no key lies.
    """
    seen = t > 0
    below = np.log(np.where(seen, t, 1.0) / t.max(-1, keepdims=True, initial=SMALLEST))[seen]
    share = (a / np.maximum(a.max(-1, keepdims=True), SMALLEST))[seen]
    bins = np.minimum(np.digitize(below, EDGES) - 1, len(EDGES) - 2)  # the best itself in the last
    parts = [share[bins == k] for k in range(len(EDGES) - 1)]
    return np.array([np.quantile(x, (0.25, 0.5, 0.75)) if x.size else [np.nan] * 3 for x in parts])


def measured(layers: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> dict:
    """What there is to say of one model, in types of JSON.

    layers: {number: weights t and a `[B H L L]` of softmax and of the model}. Queries of padding
    are left out, and those that weigh nothing, whose share is `unseeing`.
    """
    heads, pooled, counted, given = [], ([], []), 0, 0
    for layer, (t, a) in layers.items():
        tokens = t.sum(-1) > 0.5
        valid = tokens & (a.sum(-1) > 0.5)
        counted, given = counted + valid.sum(), given + tokens.sum()
        for head in range(t.shape[1]):
            own, of = (x[:, head][valid[:, head]] for x in (t, a))
            heads.append({"layer": layer, "head": head} | _figures(own, of))
            pooled[0].append(own)
            pooled[1].append(of)
    means = {name: float(np.nanmean([x[name] for x in heads])) for name in FIGURES}
    quartiles = response(*(np.concatenate(x) for x in pooled))
    shares = {"unseeing": 1.0 - float(counted / given)}
    return {"means": means | shares, "heads": heads, "response": quartiles.tolist()}


FIGURES = {
    "teacher_entropy": "entropy of softmax, nats",
    "entropy": "entropy, nats",
    "divergence": "KL(softmax, weights), nats",
    "monotonicity": "rank correlation with the score",
}


def _figures(t: np.ndarray, a: np.ndarray) -> dict[str, float]:
    ranks = monotonicity(t, a)
    return {
        "teacher_entropy": float(entropy(t).mean()),
        "entropy": float(entropy(a).mean()),
        "divergence": float(divergence(t, a).mean()),
        "monotonicity": float(np.nanmean(ranks)) if np.isfinite(ranks).any() else float("nan"),
    }
