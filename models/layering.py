"""Which layers of a model a parameter belongs to, by its path."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Layering:
    """How many layers are in prefix, one period and suffix, and how many periods there are.

    A path `prefix/i/NAME` or `suffix/i/NAME` is of one layer, and `blocks/j/NAME` of the j-th of
    every period, stacked along its first dimension.
    """

    prefix: int
    period: int
    periods: int
    suffix: int

    @classmethod
    def of(cls, model: Mapping) -> "Layering":
        """Of a config's `model`, one that LM takes."""
        prefix, period, suffix = (len(model[key]) for key in ("prefix", "pattern", "suffix"))
        return cls(prefix, period, (model["layers"] - prefix - suffix) // period, suffix)

    def split(self, path: str) -> tuple[tuple[int | None, ...], str]:
        """Numbers of the layers that a parameter is of, in its order, and its name inside a layer.

        What belongs to no layer is of (None,), under its whole path.
        """
        part, _, rest = path.partition("/")
        if part not in ("prefix", "blocks", "suffix"):
            return (None,), path
        place, _, name = rest.partition("/")
        first = int(place) + (0 if part == "prefix" else self.prefix)
        if part == "blocks":
            return tuple(first + self.period * i for i in range(self.periods)), name
        return (first + (self.period * self.periods if part == "suffix" else 0),), name

    @staticmethod
    def stacks(path: str) -> bool:
        """Whether the parameter's first dimension is one of layers."""
        return path.startswith("blocks/")
