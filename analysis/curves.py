"""Every learning rate schedule in one picture.

A schedule is a public function of a module, called as optim/schedules.py says, with its default
arguments; one whose rate depends on the batch is drawn for two.
"""

import inspect
import math
import pathlib
import textwrap
from collections.abc import Callable, Mapping
from types import ModuleType

import numpy as np

from analysis.picture import COLOURS, INK, LINES, QUIET
from analysis.plotting import pyplot

TOTAL, WARMUP, PEAK = 100e9, 5e9, 0.02  # tokens, tokens, learning rate
BATCHES = (1024 * 4096, 256 * 4096)  # tokens; the first where the batch does not matter
POINTS = 2001
ACROSS = 4  # panels
PHASES = {"warm-up": COLOURS[4], "cooldown": COLOURS[5], "decay": COLOURS[1]}


def schedules(module: ModuleType) -> dict[str, Callable]:
    """{name: schedule}, in the order in which the module defines them."""
    found = inspect.getmembers(module, inspect.isfunction)
    own = [(n, f) for n, f in found if n[0] != "_" and f.__module__ == module.__name__]
    return dict(sorted(own, key=lambda pair: pair[1].__code__.co_firstlineno))


def rates(schedule: Callable) -> dict[int, np.ndarray]:
    """{tokens a batch: learning rate at POINTS counts from 0 to TOTAL}, one where all are equal."""
    n, run = np.linspace(0.0, TOTAL, POINTS), dict(total=TOTAL, peak=PEAK, warmup=WARMUP)
    found = {batch: schedule(n, batch=batch, **run) for batch in BATCHES}
    first, *others = found.values()
    return found if any(np.any(first != other) for other in others) else {BATCHES[0]: first}


def phases(own: Mapping) -> dict[str, tuple[float, float]]:
    """{phase: tokens at which it begins and ends} of a schedule with these own arguments."""
    cooldown, decay = (own.get(f"{phase}_fraction", 0.0) * TOTAL for phase in ("cooldown", "decay"))
    found = {
        "warm-up": (0.0, WARMUP),
        "cooldown": (WARMUP, WARMUP + cooldown),
        "decay": (TOTAL - decay, TOTAL),
    }
    return {phase: (begin, end) for phase, (begin, end) in found.items() if begin < end}


def draw(curves: Mapping[str, Callable], out: pathlib.Path) -> None:
    """Writes the picture of {name: schedule}, a panel each.

    Raises ImportError, one sentence, where matplotlib is missing.
    """
    plt = pyplot(str(out))
    down = math.ceil(len(curves) / ACROSS)
    options = dict(sharey=True, squeeze=False, layout="constrained", dpi=150)
    figure, grid = plt.subplots(down, ACROSS, figsize=(11.4, 0.5 + 2.6 * down), **options)
    for axes, (name, schedule) in zip(grid.flat, curves.items(), strict=False):
        _panel(axes, name, schedule)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("learning rate", fontsize=9)
    _legend(figure)
    # Without the version that matplotlib would write into it.
    figure.savefig(out, metadata={"Software": None})
    plt.close(figure)


def _panel(axes, name: str, schedule: Callable) -> None:
    arguments = inspect.signature(schedule).parameters.values()
    own = {a.name: a.default for a in arguments if a.default is not a.empty}
    for phase, (begin, end) in phases(own).items():
        axes.axvspan(begin, end, color=PHASES[phase], alpha=0.22, lw=0)
    for (_, rate), look in zip(rates(schedule).items(), _looks(), strict=False):
        axes.plot(np.linspace(0.0, TOTAL, POINTS), rate, **look)
    axes.axhline(PEAK, color=QUIET, lw=0.8, ls=LINES[1], zorder=0)
    _words(axes, name, own)
    axes.set_xlim(-0.02 * TOTAL, 1.02 * TOTAL)
    axes.set_ylim(0, 1.08 * PEAK)
    axes.set_xticks(np.linspace(0, TOTAL, 5))
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e9:g}B")
    axes.set_xlabel("tokens seen", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _words(axes, name: str, own: Mapping) -> None:
    """The schedule's name, and between it and the panel its own arguments."""
    words = (f"{key}={value}" for key, value in own.items() if value is not None)
    lines = textwrap.wrap(", ".join(words), 48)
    at = dict(xycoords="axes fraction", xytext=(0, 4), textcoords="offset points")
    axes.annotate("\n".join(lines), (0, 1), **at, fontsize=7, color=INK)
    axes.set_title(name, fontsize=10, loc="left", color=INK, pad=6 + 8.5 * len(lines))


def _looks() -> list[dict]:
    """Of the lines, one for each of BATCHES."""
    return [dict(color=c, ls=s, lw=1.8) for c, s in zip((INK, COLOURS[0]), LINES, strict=False)]


def _legend(figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = [
        Line2D([], [], label=f"batches of {batch / 4096:,.0f} x 4,096 tokens", **look)
        for batch, look in zip(BATCHES, _looks(), strict=True)
    ]
    peak = Line2D([], [], color=QUIET, lw=0.6, ls=LINES[1], label="peak, optim.lr")
    bands = [Patch(color=c, alpha=0.22, lw=0, label=phase) for phase, c in PHASES.items()]
    handles = [*bands, peak, *lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
