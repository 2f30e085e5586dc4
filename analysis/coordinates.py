"""How activations and their changes in training grow with the width of a model.

The coordinate check of "Tensor Programs V" (arXiv 2203.03466, appendix D.1): where learning rates
are to transfer over widths, what a layer gives and what training adds to it in a few steps must
depend on the width neither way. Deviation: changes are looked at beside sizes, because a layer that
learns nothing keeps its size at every width.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from analysis.markdown import table
from analysis.picture import INK, QUIET
from analysis.plotting import pyplot


@dataclasses.dataclass(frozen=True)
class Coordinate:
    """One activation of one layer: mean absolute values by width and step.

    size: `[widths, steps + 1]`.  change: from before training, `[widths, steps]`.
    """

    name: str
    size: np.ndarray
    change: np.ndarray


@dataclasses.dataclass(frozen=True)
class Slopes:
    """Of log(size) and log(change) after the last step over log(width), and what follows.

    fault: 'grows', 'dies' or None.  change is None where nothing ever changes.
    """

    name: str
    size: float
    change: float | None
    fault: str | None


# Matrices to a few start at random, and what they give falls as the width's root until training has
# aligned them. That a head learns is seen in the loss too.
ALIGNING = ("logits", "router")


def judge(found: Coordinate, widths: Sequence[int], limit: float) -> Slopes:
    """A size may fall: logits and scores start smaller in a wider model, as they should."""
    size = _slope(widths, found.size[:, -1])
    moved = found.change[:, -1]
    if not np.all(np.isfinite(found.size)):
        return Slopes(found.name, size, None, "grows")
    if not np.any(moved):
        return Slopes(found.name, size, None, "grows" if size > limit else None)
    change = _slope(widths, moved)
    aligning = found.name.partition(" ")[0] in ALIGNING
    dies = change < -limit - (0.5 if aligning else 0.0)
    # A wider model may well learn faster.
    grows = max(size, change) > limit and found.name != "loss"
    fault = "grows" if grows else "dies" if dies else None
    return Slopes(found.name, size, change, fault)


def _slope(widths, values) -> float:
    tiny = np.finfo(np.float32).tiny
    return float(np.polyfit(np.log(widths), np.log(np.maximum(values, tiny)), 1)[0])


def text(slopes: Sequence[Slopes]) -> str:
    """A row an activation; those at fault say so."""
    told = lambda x: "none" if x is None else f"{x:+.2f}"
    rows = [(s.name, told(s.size), told(s.change), s.fault or "") for s in slopes]
    return table(("activation", "slope of its size", "of its change", ""), rows)


def draw(
    found: Sequence[Coordinate],
    slopes: Sequence[Slopes],
    widths: Sequence[int],
    title: str,
    out: pathlib.Path,
) -> None:
    """A panel a kind of activation: its change after each step over the width, a line a layer.

    Raises ImportError, one sentence, where matplotlib is missing.
    """
    plt = pyplot(str(out))
    kinds: dict[str, list[int]] = {}
    for i, one in enumerate(found):
        kinds.setdefault(one.name.partition(" ")[0], []).append(i)
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    options = dict(squeeze=False, sharex=True, layout="constrained")
    size = (2.4 * columns, 0.4 + 2.0 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, dpi=150, **options)
    for axes in grid.flat[len(kinds) :]:
        axes.set_visible(False)
    for axes, (kind, own) in zip(grid.flat, kinds.items(), strict=False):
        for i in own:
            _lines(axes, found[i], slopes[i], widths)
        axes.set_title(kind, fontsize=9, color=INK)
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(widths, [str(width) for width in widths], fontsize=7)
        axes.minorticks_off()
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("mean |change| from before training", fontsize=8)
    figure.supxlabel("width of the model", fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(out, metadata={"Software": None})
    plt.close(figure)


def _lines(axes, found: Coordinate, slopes: Slopes, widths) -> None:
    colour = "#c0392b" if slopes.fault else INK
    steps = found.change.shape[1]
    if not np.any(found.change):
        axes.text(0.5, 0.5, "does not change", transform=axes.transAxes, ha="center", color=QUIET)
        return
    for step in range(steps):
        strength = 0.25 + 0.75 * (step + 1) / steps
        axes.plot(widths, found.change[:, step], color=colour, alpha=strength, lw=1.2)


def record(found: Sequence[Coordinate], slopes: Sequence[Slopes]) -> list[Mapping]:
    """What a JSON file keeps of it."""
    return [
        dataclasses.asdict(s) | {"sizes": c.size.tolist(), "changes": c.change.tolist()}
        for c, s in zip(found, slopes, strict=True)
    ]
