"""Heat maps of one kind of number, a map a layer, all on one scale."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np

from analysis.plotting import pyplot

CELL, LEAST, MOST = 0.1, 2.0, 3.6  # inches of a cell, and of a side of a map
LINE = 0.17  # inches that the name of a row needs
GAP = 0.45  # inches between maps, for titles and numbers
SHORTEST = 2.6  # inches of a figure, beside which the colours' name has room
NOTHING = "0.8"  # the grey of what is not a number


def picture(
    layers: Mapping[str, np.ndarray],
    title: str,
    *,
    rows: str,
    columns: str,
    value: str,
    names: Sequence[str] = (),
) -> bytes:
    """A PNG with a map for each entry; what is not a number is grey.

    Small values are made visible by a scale of square roots.
    layers: {title of the map: values `[R C]`, 0 or more}.  rows, columns, value: what they are.
    names: of the rows, which are numbered without. Raises ImportError, one sentence, where
    matplotlib is missing.
    """
    plt = pyplot("a heat map")
    figure, grid = _maps(plt, len(layers), *_size(layers, names), max(map(len, names), default=0))
    for axes, (name, values) in zip(grid.flat, layers.items(), strict=False):
        image = axes.imshow(values, aspect="auto", **_look(plt, layers))
        axes.set_title(name, fontsize=9)
        _ticks(axes, *values.shape, names)
    for axes in grid[:, 1:].flat:
        axes.tick_params(labelleft=False)
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=grid, aspect=30).set_label(value, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel(columns, fontsize=9)
    figure.supylabel(rows, fontsize=9)
    written = io.BytesIO()
    # Without the version that matplotlib would write into it.
    figure.savefig(written, format="png", metadata={"Software": None})
    plt.close(figure)
    return written.getvalue()


def _size(layers: Mapping, names: Sequence[str]) -> tuple[float, float]:
    """Inches of one map, wide and high."""
    R, C = next(iter(layers.values())).shape
    side = lambda cells: min(MOST, max(LEAST, CELL * cells))
    return side(C), max(0.6, LINE * R) if names else side(R)


def _maps(plt, count: int, wide: float, high: float, letters: int):
    """A figure about as wide as high, and its places, of which the last may stay empty."""
    beside = min(count, math.ceil(math.sqrt(count * (high + GAP) / (wide + GAP))))
    below = math.ceil(count / beside)
    words = 1.6 + 0.07 * letters  # at the sides: names, what they are, and the colours
    size = words + beside * (wide + GAP / 2), max(SHORTEST, 0.8 + below * (high + GAP))
    options = dict(figsize=size, dpi=100, squeeze=False, layout="constrained")
    return plt.subplots(below, beside, **options)


def _look(plt, layers: Mapping) -> dict:
    from matplotlib.colors import PowerNorm

    top = max(np.max(x, initial=0.0, where=~np.isnan(x)) for x in layers.values())
    cmap = plt.get_cmap("viridis").with_extremes(bad=NOTHING)
    return dict(norm=PowerNorm(0.5, 0, top or 1.0), cmap=cmap)


def _ticks(axes, R: int, C: int, names: Sequence[str]) -> None:
    axes.set_xticks(_numbered(C))
    axes.set_yticks(range(R) if names else _numbered(R), names or None)
    axes.tick_params(labelsize=7, length=2)


def _numbered(size: int) -> range:
    """At most eight numbers, a power of two apart."""
    return range(0, size, 2 ** max(0, math.ceil(math.log2(size / 8))))
