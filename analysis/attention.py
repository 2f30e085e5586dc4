"""A picture of attention's weights: who attends to whom, head by head."""

import io
from collections.abc import Mapping, Sequence

import numpy as np

from analysis.plotting import pyplot


def picture(columns: Mapping[str, np.ndarray], title: str, heads: Sequence[int]) -> bytes:
    """A PNG with a column for each entry and a row for each head.

    columns: {what they are: weights `[H L L]`, a query's in a row}; small ones are made visible by
    a scale of square roots.  heads: their numbers. Raises ImportError, one sentence, where
    matplotlib is missing.
    """
    plt = pyplot("attention")
    from matplotlib.colors import PowerNorm

    H = len(next(iter(columns.values())))
    size = dict(figsize=(1.2 + 2.2 * len(columns), 0.6 + 2.2 * H), dpi=100)
    figure, grid = plt.subplots(H, len(columns), squeeze=False, layout="constrained", **size)
    look = dict(norm=PowerNorm(0.5, 0, 1), cmap="magma", interpolation="none")
    for row, (head, places) in enumerate(zip(heads, grid, strict=True)):
        for axes, (name, weights) in zip(places, columns.items(), strict=True):
            image = axes.imshow(weights[row], **look)
            axes.set(xticks=[], yticks=[], title=name if row == 0 else "")
        places[0].set_ylabel(f"head {head}: queries", fontsize=8)
    grid[-1, 0].set_xlabel("keys", fontsize=8)
    figure.colorbar(image, ax=grid, label="weight", shrink=min(1.0, 2 / H))
    figure.suptitle(title)
    written = io.BytesIO()
    # Without the version that matplotlib would write into it.
    figure.savefig(written, format="png", metadata={"Software": None})
    plt.close(figure)
    return written.getvalue()
