"""A run's loss curve: `uv run python -m analysis.curve runs/quickstart -o curve.png`."""

import argparse
import json
import math
import pathlib

from analysis.ngrams import ORDERS

INK, ACCENT, QUIET = "#222222", "#0b6e99", "#9a9a9a"


def rows(path: pathlib.Path) -> list[dict]:
    """The rows of a metrics.jsonl, headers left out."""
    found = map(json.loads, path.read_text().splitlines())
    return [row for row in found if "header" not in row]


def draw(run: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the picture of <run>/metrics.jsonl: bits a token against tokens seen.

    Where <run>/ngrams.json is there, its n-gram scores are drawn as levels to compare with.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    logged = rows(run / "metrics.jsonl")
    train = [(r["tokens"], r["nll"] / math.log(2)) for r in logged if "nll" in r]
    held_out = [
        (r["tokens"], r["validation/bits_per_byte"])
        for r in logged
        if "validation/bits_per_byte" in r
    ]
    figure, axes = plt.subplots(figsize=(7.2, 3.6), dpi=150, layout="constrained")
    axes.plot(*zip(*train, strict=True), color=QUIET, lw=1, label="training batch")
    if held_out:
        style = dict(color=ACCENT, lw=2, marker="o", ms=4)
        axes.plot(*zip(*held_out, strict=True), **style, label="held-out files")
    levels = run / "ngrams.json"
    if levels.is_file():
        scores = json.loads(levels.read_text())
        for name in ORDERS:
            axes.axhline(scores[name], color=INK, lw=0.8, ls=(0, (4, 4)))
            text = f"{name} counts  {scores[name]:.2f}"
            at = dict(xy=(1, scores[name]), xycoords=("axes fraction", "data"))
            shifted = dict(xytext=(-4, 3), textcoords="offset points", ha="right")
            axes.annotate(text, **at, **shifted, fontsize=8, color=INK)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("bits a byte")
    axes.set_ylim(top=min(6.0, max(loss for _, loss in train)))
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g}M")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center")
    figure.savefig(out)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=pathlib.Path, help="folder of the run")
    parser.add_argument("-o", "--out", type=pathlib.Path, default=pathlib.Path("curve.png"))
    given = parser.parse_args()
    if not (given.run / "metrics.jsonl").is_file():
        parser.error(f"there is no {given.run / 'metrics.jsonl'}")
    draw(given.run, given.out)
    print(given.out)


if __name__ == "__main__":
    main()
