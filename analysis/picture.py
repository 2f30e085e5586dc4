"""The picture of a study: the metric against tokens for every arm, and its last values by seed.

Settings stand below each other, and an arm looks the same in all of them.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence

from analysis.compare import parts
from analysis.plotting import pyplot

INK, QUIET = "#222222", "#9a9a9a"
# Paul Tol's bright scheme, told apart by all common kinds of colour vision; lines differ as well.
COLOURS = ("#4477AA", "#EE6677", "#228833", "#AA3377", "#CCBB44", "#66CCEE")
LINES = ("-", (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)))


def draw(summary: Mapping, out: pathlib.Path) -> None:
    """Writes the picture of `analysis.summary.summarise`.

    Raises ImportError, one sentence, where matplotlib is missing.
    """
    plt = pyplot(str(out))

    settings = _settings(summary)
    tall = [1.6 + 0.36 * max(5, len(styles)) for styles in settings.values()]
    ratios = dict(width_ratios=(3, 2), height_ratios=tall)
    options = dict(figsize=(9.6, sum(tall)), dpi=150, layout="constrained", squeeze=False)
    figure, grid = plt.subplots(len(settings), 2, **ratios, **options)
    for row, (setting, styles) in zip(grid, settings.items(), strict=True):
        _curves(row[0], summary, styles, f"{setting}: " if setting else "")
        _values(row[1], summary, styles)
        for axes in row:
            axes.spines[["top", "right"]].set_visible(False)
    # Without the date and the version that matplotlib would write into it.
    figure.savefig(out, metadata={"Software": None})
    plt.close(figure)


def _settings(summary: Mapping) -> dict[str, dict[str, dict]]:
    """{setting: {arm in it: colour and line}}."""
    cells = {name: parts(name) for name in summary["arms"]}
    arms = list(dict.fromkeys(arm for arm, _ in cells.values()))
    styles, found = style(arms, summary["declared"]["baseline"]), {}
    for name, (arm, setting) in cells.items():
        found.setdefault(setting, {})[name] = styles[arm]
    return found


def style(arms: Sequence[str], base: str) -> dict[str, dict]:
    """{arm: colour and line}; the baseline is black."""
    found, others = {}, 0
    for arm in arms:
        if arm == base:
            found[arm] = dict(color=INK, ls="-")
        else:
            turn, colour = divmod(others, len(COLOURS))
            line = LINES[(colour + turn + 1) % len(LINES)]
            found[arm], others = dict(color=COLOURS[colour], ls=line), others + 1
    return found


def _curves(axes, summary: Mapping, styles: Mapping, name: str) -> None:
    """Mean lines, and bands from the least to the greatest seed."""
    from matplotlib.ticker import EngFormatter

    for arm, look in styles.items():
        band = summary["arms"][arm]["curve"]
        if len(band["tokens"]) > 1:  # A single score is on the right, and no curve.
            axes.fill_between(
                band["tokens"], band["low"], band["high"], color=look["color"], alpha=0.15, lw=0
            )
            axes.plot(band["tokens"], band["mean"], lw=1.8, **look)
    rows, metric = summary["scored_rows"], summary["declared"]["metric"]
    of = f", first {rows:,} held-out rows" if rows and metric.startswith("validation/") else ""
    axes.set_title(f"{name}while training{of}: mean and range", fontsize=9, loc="left", color=INK)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel(_words(metric))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _values(axes, summary: Mapping, styles: Mapping) -> None:
    """The last value of every seed, its mean and range; the names tell which line is which."""
    for place, (arm, look) in enumerate(styles.items()):
        found = summary["arms"][arm]
        values = [x for x in found["values"].values() if x is not None]
        if values:
            axes.plot([min(values), max(values)], [place, place], lw=1.8, **look)
            axes.plot(values, [place] * len(values), "o", ms=4, color=look["color"], mew=0)
            mean = found["spread"]["mean"]
            axes.plot([mean], [place], "|", ms=16, mew=2, color=look["color"])
            at = dict(textcoords="offset points", xytext=(0, 9), ha="center")
            axes.annotate(f"{mean:.3f}", (mean, place), **at, fontsize=8, color=INK)
    labels = [
        f"{parts(arm)[0]}\n{_short(summary['arms'][arm]['chosen'])}".strip() for arm in styles
    ]
    axes.set_yticks(range(len(styles)), labels, fontsize=8)
    for text, look in zip(axes.get_yticklabels(), styles.values(), strict=True):
        text.set_color(look["color"])
    axes.set_ylim(len(styles) - 0.5, -0.7)
    axes.margins(x=0.12)
    axes.grid(axis="x", color=QUIET, alpha=0.3, lw=0.6)
    of = " of all rows" if summary["scored_rows"] else ""
    axes.set_title(f"at the end{of}: seeds, range, mean", fontsize=9, loc="left", color=INK)
    axes.set_xlabel(_words(summary["declared"]["metric"]))


def _words(metric: str) -> str:
    """validation/bits_per_byte as 'bits per byte, held-out'."""
    split, _, name = metric.rpartition("/")
    return name.replace("_", " ") + (", held-out" if split == "validation" else "")


def _short(point: str | None) -> str:
    """`optim.lr=0.004` as `lr=0.004`."""
    return re.sub(r"[\w.]+\.(\w+=)", r"\1", point or "")
