"""Timing ways to do the same work in turns, so that a busy machine does not decide which wins."""

import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from launch import provenance

PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax")
Samples = dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Row:
    """Meshwork's samples beside a peer's, of one quantity; sample i of both were taken together.

    peer: empty where there is nothing to compare with.  least, most: the ratio wanted, None for no
    wish.
    """

    what: str
    unit: str
    ours: Sequence[float]
    peer: Sequence[float] = ()
    least: float | None = None
    most: float | None = None

    @property
    def ratios(self) -> list[float]:
        """Ours over the peer's, a repetition."""
        return [a / b for a, b in zip(self.ours, self.peer, strict=True)] if self.peer else []

    def record(self) -> dict:
        """Everything, as JSON holds it."""
        found = dataclasses.asdict(self) | {"ratios": self.ratios}
        return found | {"ratio": spread(self.ratios)} if self.peer else found


@dataclasses.dataclass(frozen=True)
class Report:
    """title: what was measured on what.  notes: what was left out, and why.  config: that ran."""

    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    config: Mapping = dataclasses.field(default_factory=dict)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least, greatest, and quartiles where there are enough values for them."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    if len(values) >= 4:
        found["lower"], _, found["upper"] = statistics.quantiles(values, n=4, method="inclusive")
    return found


def interleaved(
    ways: Mapping[str, Callable[[], float]],
    repetitions: int,
    progress: Callable[[str], None] = lambda text: None,
    *,
    warm_up: int = 1,
) -> Samples:
    """Samples of each way, taken in turns and every other time in the opposite order.

    A way does its work once and returns what it measured. The first `warm_up` turns are not kept:
    they compile and fill caches.
    """
    samples: Samples = {name: [] for name in ways}
    for turn in range(-warm_up, repetitions):
        for name in ways if turn % 2 == 0 else reversed(ways):
            progress(f"{name}, {'warm-up' if turn < 0 else f'{turn + 1} of {repetitions}'}")
            value = ways[name]()
            if turn >= 0:
                samples[name].append(value)
    return samples


def seconds(work: Callable[[], object]) -> float:
    """Seconds until what `work` returns is ready on its device."""
    import jax  # Not above: its platforms are chosen when a benchmark begins.

    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def until_return(work: Callable[[], object]) -> float:
    """Seconds until `work` returns, its device idle before; then waits for the device."""
    import jax

    start = time.perf_counter()
    result = work()
    spent = time.perf_counter() - start
    jax.block_until_ready(result)
    return spent


def count_for(duration: float, once: float) -> int:
    """How many times work that takes `once` seconds fills `duration` seconds; at least 1."""
    return max(1, math.ceil(duration / max(once, 1e-9)))


class Progress:
    """One line on stderr that is written over; in a log file, a line every 15 seconds."""

    def __init__(self, name: str):
        self._name, self._next, self._tty = name, 0.0, sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if self._tty:
            print(f"\r\x1b[K{self._name}: {text}", end="", file=sys.stderr, flush=True)
        elif now >= self._next:
            print(f"{self._name}: {text}", file=sys.stderr, flush=True)
            self._next = now + 15

    def within(self, stage: str) -> Callable[[str], None]:
        return lambda text: self(f"{stage}: {text}")

    def close(self) -> None:
        if self._tty:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def table(report: Report) -> str:
    """The report as text: medians, and the ratio with its range."""
    head = ("", "meshwork", "peer", "ratio", "middle half", "range", "n", "")
    lines = [head, *map(_cells, report.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([report.title, "", *text, *map("note: {}".format, report.notes)])


def _cells(row: Row) -> tuple[str, ...]:
    name, ours, n = f"{row.what}, {row.unit}", _number(row.ours), str(len(row.ours))
    if not row.peer:
        return name, ours, "", "", "", "", n, ""
    of = spread(row.ratios)
    half = f"{of['lower']:.3f} .. {of['upper']:.3f}" if "lower" in of else ""
    wanted = ""
    if row.least is not None:
        word = "as wanted" if of["median"] >= row.least else "BELOW what is wanted"
        wanted = f"{word}, {row.least:g}"
    if row.most is not None:
        word = "as wanted" if of["median"] <= row.most else "ABOVE what is wanted"
        wanted = f"{word}, {row.most:g}"
    around = f"{of['min']:.3f} .. {of['max']:.3f}"
    return name, ours, _number(row.peer), f"{of['median']:.3f}", half, around, n, wanted


def _number(values: Sequence[float]) -> str:
    value = statistics.median(values)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def record(report: Report, name: str, command: str, load: Sequence[float]) -> dict:
    """The report with all that one needs to judge it. load: of the machine before it began."""
    return {
        "benchmark": name,
        "command": command,
        "commit": provenance.commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device(),
        "load_before": list(load),
        "versions": provenance.versions(PACKAGES),
        "title": report.title,
        "notes": list(report.notes),
        "rows": [row.record() for row in report.rows],
        "config": dict(report.config),
    }


def device() -> dict:
    """What the default device is, and the processor of the host."""
    import jax

    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "processor": provenance.processor()["kind"],
        "cores": os.cpu_count(),
    }
