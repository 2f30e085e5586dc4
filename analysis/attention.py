"""A picture of attention's weights: who attends to whom, head by head."""

import io
from collections.abc import Mapping

import numpy as np


def picture(columns: Mapping[str, np.ndarray], title: str) -> bytes:
    """A PNG with a column for each entry and a row for each head.

    columns: {what they are: weights `[H L L]`, a query's in a row}; small ones are made visible by
    a square root. Raises ImportError, one sentence, where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "matplotlib is not installed, so attention was not drawn; run `uv sync` for the "
            "packages of development and the same command again"
        ) from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    H = len(next(iter(columns.values())))
    size = dict(figsize=(0.4 + 2.2 * len(columns), 0.6 + 2.2 * H), dpi=100)
    figure, grid = plt.subplots(H, len(columns), squeeze=False, layout="constrained", **size)
    for row, heads in enumerate(grid):
        for axes, (name, weights) in zip(heads, columns.items(), strict=True):
            axes.imshow(np.sqrt(weights[row]), vmin=0, vmax=1, cmap="magma", interpolation="none")
            axes.set(xticks=[], yticks=[], title=name if row == 0 else "")
    figure.suptitle(title)
    written = io.BytesIO()
    # Without the version that matplotlib would write into it.
    figure.savefig(written, format="png", metadata={"Software": None})
    plt.close(figure)
    return written.getvalue()
