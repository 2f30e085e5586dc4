"""The report on attention's weights of several models: text and picture of analysis/weights.py."""

import pathlib
import statistics
from collections.abc import Mapping

import numpy as np

from analysis.markdown import listed, table
from analysis.picture import INK, QUIET
from analysis.plotting import pyplot
from analysis.weights import EDGES, FIGURES

ABOUT = """\
Weights of linear attention against those of softmax attention for the same queries and keys, on
{rows} held-out rows of {tokens} tokens: means over queries, heads and layers, then mean and
standard deviation over seeds. Rank correlation is Spearman's, over the keys of each query."""
PICTURE = """\
Above, a point is a head of a layer: its mean entropy against that of softmax. Below, the weight of
a key as a share of the query's largest, median and quartiles, by how far its score is below the
query's best; the dashed line is softmax."""


def markdown(held: Mapping) -> str:
    """held: `facts`, and `arms` {name: {seed: what analysis.weights.measured gives}}."""
    facts = held["facts"]
    rows = [
        (arm, *(_spread(by_seed, name) for name in FIGURES))
        for arm, by_seed in held["arms"].items()
    ]
    blocks = [
        "# weights",
        ABOUT.format(rows=facts["rows"], tokens=facts["tokens"]),
        table(("arm", *FIGURES.values()), rows),
        *_unseeing(held),
        "![entropy and monotonicity of every arm](weights.png)",
        PICTURE,
        "## What ran",
        table(("", ""), [(name, _told(value)) for name, value in facts.items()]),
    ]
    return "\n\n".join(blocks) + "\n"


def _unseeing(held: Mapping) -> list[str]:
    shares = {arm: next(iter(x.values()))["means"]["unseeing"] for arm, x in held["arms"].items()}
    told = [f"{arm} {share:.1%}" for arm, share in shares.items() if share]
    return [f"Queries that weigh nothing are left out: {listed(told)}."] if told else []


def _told(value: object) -> str:
    if isinstance(value, Mapping):
        return listed(f"{name} {x}" for name, x in value.items())
    return listed(value) if isinstance(value, (list, tuple)) else str(value)


def _spread(by_seed: Mapping, name: str) -> str:
    values = [found["means"][name] for found in by_seed.values()]
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ({statistics.stdev(values):.3f})" if len(values) > 1 else mean


def draw(held: Mapping, out: pathlib.Path) -> None:
    """Raises ImportError, one sentence, where matplotlib is missing."""
    plt = pyplot(str(out))

    arms = held["arms"]
    options = dict(squeeze=False, sharex="row", sharey="row", layout="constrained")
    size = (1.2 + 2.1 * len(arms), 5.2)
    figure, grid = plt.subplots(2, len(arms), figsize=size, dpi=150, **options)
    heads = {arm: [x for found in arms[arm].values() for x in found["heads"]] for arm in arms}
    every, axis = [x for own in heads.values() for x in own], ("teacher_entropy", "entropy")
    most = max(1.0, *(x[name] for x in every for name in axis))
    layers = sorted({x["layer"] for x in every})
    for (arm, by_seed), above, below in zip(arms.items(), *grid, strict=True):
        at = [[x[name] for x in heads[arm]] for name in axis]
        above.plot([0, most], [0, most], ls="--", lw=0.8, color=QUIET)
        of = dict(c=[x["layer"] for x in heads[arm]], cmap="viridis", vmin=0, vmax=max(1, *layers))
        points = above.scatter(*at, s=10, lw=0, **of)
        above.set_title(arm, fontsize=9, color=INK)
        above.set_xlabel("softmax's entropy", fontsize=8)
        _response(below, np.array([found["response"] for found in by_seed.values()], float))
    grid[0, 0].set_ylabel("entropy, nats")
    grid[1, 0].set_ylabel("share of the largest weight")
    figure.colorbar(points, ax=grid[0, -1], label="layer", ticks=layers)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    figure.savefig(out, metadata={"Software": None})
    plt.close(figure)


def _response(axes, by_seed: np.ndarray) -> None:
    """by_seed `[seeds bins 3]`, whose means over seeds are drawn."""
    low, middle, high = np.nanmean(by_seed, 0).T
    centres = (EDGES[1:] + EDGES[:-1]) / 2
    axes.plot(centres, np.exp(centres), ls="--", lw=0.8, color=QUIET)
    axes.fill_between(centres, low, high, color=INK, alpha=0.15, lw=0)
    axes.plot(centres, middle, lw=1.5, color=INK)
    axes.set_xlabel("score below the best, nats", fontsize=8)
