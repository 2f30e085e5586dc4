"""What a run has left in its folder: `metrics.jsonl` and `final.json`."""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# What a training step must leave finite; the loop stops at the first row where one is not.
WATCHED = ("loss", "gradient_norm", "parameter_norm")


@dataclasses.dataclass(frozen=True)
class Record:
    """headers: of the start and of every resume.  attempts: the rows that each of them logged.

    score: what final.json holds; {} before the run has ended.
    """

    headers: list[dict]
    attempts: list[list[dict]]
    score: dict

    @functools.cached_property
    def rows(self) -> list[dict]:
        return [row for attempt in self.attempts for row in attempt]

    @property
    def config(self) -> dict:
        return self.headers[0]["config"]

    @property
    def last(self) -> dict:
        """Everything logged at the last step of a run that has ended."""
        rows = [row for row in self.rows if row["step"] == self.config["steps"]]
        return {name: value for row in rows for name, value in row.items()}

    @property
    def ended(self) -> bool:
        """Whether it has taken all its steps and has its score."""
        return self.score.get("step") == self.config["steps"] and bool(self.last)

    @property
    def diverged(self) -> int | None:
        """The step whose loss or norms were not finite, which ended the run."""
        last = self.rows[-1] if self.rows else {}
        broken = any(not math.isfinite(last.get(name, 0.0)) for name in WATCHED)
        return last["step"] if broken else None

    @property
    def seconds(self) -> float:
        """In the loop, over all attempts, from before the first compilation to the last row."""
        taken = ((rows[-1], rows[0]) for rows in self.attempts if rows)
        return math.fsum(
            end["time"] - start["time"] + start.get("seconds_to_first_step", 0.0)
            for end, start in taken
        )


def read(folder: pathlib.Path) -> Record | None:
    """The record of a run; None where it has logged nothing yet.

    Raises ValueError, one sentence: a file is damaged. A torn last line is left out.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return None
    headers, attempts = [], []
    for line in _lines(path):
        if "header" in line:
            headers.append(line["header"])
            attempts.append([])
        elif not headers:
            raise ValueError(f"{path} does not start with a header; delete it to run anew")
        else:
            attempts[-1].append(line)
    return Record(headers, attempts, _score(folder / "final.json")) if headers else None


def _lines(path: pathlib.Path) -> Iterator[dict]:
    # The last piece is empty if the last line was finished, and torn otherwise.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"{path} line {number} is not JSON; delete it to run anew") from None
        if "header" in row:
            yield row
        else:
            yield {k: NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()}


def _score(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise ValueError(f"{path} is not JSON; delete it and run again") from None


def leaves(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of a nested configuration, in its order."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
