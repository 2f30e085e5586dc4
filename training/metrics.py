"""What a run leaves behind: `metrics.jsonl` and TensorBoard, and how fast it goes.

`metrics.jsonl`: a line {"header": ...}, then a line a step {"step", "tokens", "time" (Unix
seconds), **values}; a resume adds {"resumed": step, "header": ...}. JSON has no NaN or infinity:
they are written as the strings "NaN", "Infinity" and "-Infinity", and `read` turns them back.
"""

import contextlib
import json
import math
import os
import pathlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

OWN = ("step", "tokens", "time")
PICTURE = "picture/"  # what the names of metrics begin with that are drawn, and are no numbers
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsError(ValueError):
    """A metrics file that cannot be read, or a row that cannot be written; one sentence."""


class Log:
    """The log of one run, in `<workdir>/metrics.jsonl` and `<workdir>/tb`.

    restored_step: on resume, everything after it is cut away; None starts over and replaces what
    an earlier run without a checkpoint has left. scored_again: nothing is left but to score that
    step, so that a score of it that is there already is cut away too. enabled: False does nothing
    (hosts but one).
    Every line and event reaches the operating system before the call returns.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        header: dict[str, Any],
        restored_step: int | None = None,
        *,
        scored_again: bool = False,
        enabled: bool = True,
    ):
        self._file = self._events = None
        if not enabled:
            return
        # tensorboardX takes a quarter of a second to import, which readers need not wait for.
        from training import events

        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        last = -1 if restored_step is None else restored_step
        path, folder = workdir / "metrics.jsonl", workdir / "tb"
        _cut(path, last, header, scored_again)
        events.cut(folder, last)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._events = events.EventFile(folder, last + 1)
        self._last = last

    def write(self, step: int, tokens: int, values: dict[str, Any]) -> None:
        """One row in both places; values are anything float() takes.

        Raises MetricsError if a metric has the name of one of the row's own keys.
        """
        taken = [name for name in OWN if name in values]
        if taken:
            raise MetricsError(f"a metric cannot be called {taken[0]}: the row has that already")
        if self._file is None:
            return
        values = {name: float(value) for name, value in values.items()}
        row = {"step": int(step), "tokens": int(tokens), "time": round(time.time(), 3), **values}
        self._file.write(_line(row))
        self._file.flush()
        self._last = max(self._last, row["step"])
        self.scalars(step, {"tokens": tokens, **values})

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Values for TensorBoard only."""
        if self._events is not None:
            self._events.scalars(int(step), {name: float(v) for name, v in values.items()})

    def text(self, step: int, tag: str, text: str) -> None:
        """A text for TensorBoard, Markdown."""
        if self._events is not None:
            self._events.text(int(step), tag, text)

    def image(self, step: int, tag: str, png: bytes) -> None:
        """A picture for TensorBoard, a whole PNG file."""
        if self._events is not None:
            self._events.image(int(step), tag, png)

    def hparams(self, config: dict[str, Any], metrics: dict[str, Any]) -> None:
        """The configuration (nested or flat) beside the final metrics, at the last step."""
        if self._events is not None:
            final = {name: float(value) for name, value in metrics.items()}
            self._events.hparams(max(self._last, 0), _flat(config), final)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._events.close()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def read(path: str | pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first header and the rows of a metrics file; a torn last line is left out.

    Raises MetricsError if there is no such file, no header, or a damaged line.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise MetricsError(f"no metrics file {path}")
    first, *rows = _lines(path) or [{}]
    if "header" not in first:
        raise MetricsError(f"{path} does not start with a header")
    return first["header"], [row for row in rows if "header" not in row]


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    found = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    # The last piece is empty if the last line was finished, and torn otherwise.
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise MetricsError(
                f"{path} line {number} is not JSON of a row, but {line[:40]!r}; remove that line"
            )
        if "header" not in row:
            row = {k: NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()}
        found.append(row)
    return found


def _cut(path: pathlib.Path, last: int, header: dict[str, Any], scored_again: bool) -> None:
    """Rewrites the file, atomically, without the steps after `last`, and perhaps its score."""
    kept = _lines(path) if last >= 0 and path.is_file() else []
    kept = [row for row in kept if row.get("step", row.get("resumed", -1)) <= last]
    if scored_again:
        kept = [row for row in kept if row.get("step") != last or "loss" in row]
    added = {"resumed": last, "header": header} if kept else {"header": header}
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(map(_line, [*kept, added])), encoding="utf-8")
    os.replace(temporary, path)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return "NaN" if math.isnan(tree) else "Infinity" if tree > 0 else "-Infinity"
    return tree


def dotted(config: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every key of a nested configuration, in its order."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _flat(config: Mapping) -> dict[str, Any]:
    """Dotted names; what is not a plain scalar becomes text."""
    plain = lambda value: value is None or isinstance(value, (bool, int, float, str))
    return {name: value if plain(value) else str(value) for name, value in dotted(config)}


class Clock:
    """Tokens a second over the last `window` steps, and the time left.

    The first step is not counted (it compiles), nor is what runs under `paused`. The time left
    does expect those pauses to go on at their present share.
    """

    def __init__(self, window: int = 50, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._steps = deque(maxlen=window + 1)  # (seconds without pauses, tokens so far)
        self._paused_seconds, self._is_paused = 0.0, False
        self._first = None  # (seconds, seconds without pauses) at the end of the first step

    def tick(self, tokens: int) -> None:
        """A step of that many tokens has just ended."""
        seconds = self._now()
        active = seconds - self._paused_seconds
        self._first = self._first or (seconds, active)
        before = self._steps[-1][1] if self._steps else 0
        self._steps.append((active, before + tokens))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (evaluation, saving) is not the steps'. May be nested."""
        if self._is_paused:
            yield
            return
        start, self._is_paused = self._now(), True
        try:
            yield
        finally:
            self._paused_seconds += self._now() - start
            self._is_paused = False

    def tokens_per_second(self) -> float | None:
        """None until two steps have ended."""
        seconds, tokens, _ = self._window()
        return tokens / seconds if seconds > 0 else None

    def seconds_per_step(self) -> float | None:
        """None until two steps have ended."""
        seconds, _, steps = self._window()
        return seconds / steps if seconds > 0 else None

    def seconds_left(self, tokens: int) -> float | None:
        """For that many tokens more; None until two steps have ended."""
        rate = self.tokens_per_second()
        if rate is None:
            return None
        seconds, active = (b - a for a, b in zip(self._first, self._seen(), strict=True))
        return tokens / rate * (seconds / active)

    def _seen(self) -> tuple[float, float]:
        active = self._steps[-1][0]
        return active + self._paused_seconds, active

    def _window(self) -> tuple[float, int, int]:
        if len(self._steps) < 2:
            return 0.0, 0, 0
        (start, before), (end, after) = self._steps[0], self._steps[-1]
        return end - start, after - before, len(self._steps) - 1
