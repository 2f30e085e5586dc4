"""Heat maps of those metrics of a step that are pictures, as training.health gives them."""

import functools
import sys
from collections.abc import Callable

import numpy as np

from analysis import heat
from launch.setup import Setup
from models.layering import Layering
from training.metrics import PICTURE

# What rows, columns and values are, by the last part of a metric's name.
SHOWN = {
    "co_activation": ("expert", "expert also chosen", "share of the expert's tokens"),
    "experts_by_domain": ("domain", "expert", "share of the domain's choices"),
}
OTHER = ("row", "column", "value")


def drawer(setup: Setup) -> Callable[[str, np.ndarray], bytes | None]:
    """(name of a metric, its values `[N rows columns]` or `[rows columns]`) -> a PNG.

    A row of zeros, of an expert or domain without a token, is grey, and so is an expert with
    itself.  None where matplotlib is missing, which a sentence on stderr says once.
    """
    layering, domains = Layering.of(setup.config["model"]), tuple(setup.data.domains)
    tell = functools.cache(lambda why: print(f"note: {why}", file=sys.stderr))

    def draw(name: str, values: np.ndarray) -> bytes | None:
        path = name.removeprefix(PICTURE)
        kind = path.rpartition("/")[2]
        rows, columns, value = SHOWN.get(kind, OTHER)
        values = np.where(np.any(values, -1, keepdims=True), values, np.nan)
        if kind == "co_activation":
            values = np.where(np.eye(values.shape[-1], dtype=bool), np.nan, values)
        what = dict(rows=rows, columns=columns, value=value)
        try:
            own = domains if rows == "domain" else ()
            return heat.picture(_by_layer(layering, path, values), path, **what, names=own)
        except ImportError as error:
            tell(str(error))
            return None

    return draw


def _by_layer(layering: Layering, path: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """{layer and its number in the model: what is of it}."""
    maps = values if values.ndim == 3 else values[None]
    numbers, _ = layering.split(path)
    titles = ["" if number is None else f"layer {number}" for number in numbers]
    return dict(zip(titles, maps, strict=True))
