"""A study's report from its runs: `uv run python -m analysis.report runs/optimizers`.

Written are <out>/<study>.json, .md and .png. `uv run sweep` does it when the last run has ended.
The same runs give the same bytes of the first two.
"""

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Mapping

from analysis import picture
from analysis.markdown import markdown
from analysis.studies import load
from analysis.summary import summarise

RESULTS = pathlib.Path("experiments/results")


def write(folder: pathlib.Path, out: pathlib.Path = RESULTS) -> dict:
    """Writes the three files of the study in `folder`; returns what the JSON holds.

    Raises ValueError, one sentence: a run has not ended or lacks the metric. ImportError, the same,
    where matplotlib is missing: then there is no picture.
    """
    summary = summarise(load(folder))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{summary['study']}.json"
    path.write_text(render(summary), encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(summary), encoding="utf-8")
    picture.draw(summary, path.with_suffix(".png"))
    return summary


def render(summary: Mapping) -> str:
    """JSON with a line for each run, and for each key of the rest."""
    runs = ",\n".join(f"  {_json(name)}: {_json(run)}" for name, run in summary["runs"].items())
    rest = [f" {_json(key)}: {_json(x)}" for key, x in summary.items() if key != "runs"]
    return "{\n" + ",\n".join([*rest, f' "runs": {{\n{runs}\n }}']) + "\n}\n"


def _json(tree: object) -> str:
    return json.dumps(finite(tree), allow_nan=False)


def finite(tree: object) -> object:
    """JSON has no infinity and no NaN: their names stand for them, as in metrics.jsonl."""
    if isinstance(tree, Mapping):
        return {key: finite(x) for key, x in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(x) for x in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return "NaN" if math.isnan(tree) else "Infinity" if tree > 0 else "-Infinity"
    return tree


def main() -> None:
    """Exits with 2 and one sentence where there is no report to be had."""
    parser = argparse.ArgumentParser(prog="report", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path, help="of the study, as `sweep` filled it")
    parser.add_argument("-o", "--out", type=pathlib.Path, default=RESULTS)
    given = parser.parse_args()
    try:
        summary = write(given.folder, given.out)
    except (ValueError, OSError, ImportError) as error:
        print(f"report: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(closing(summary, given.out))


def closing(summary: Mapping, out: pathlib.Path) -> str:
    """The verdicts, a line each, and where to read more."""
    lines = [f"{claim['said']}: {claim['verdict'] or 'no verdict'}" for claim in summary["claims"]]
    return "\n".join([*lines, f"report: {out / summary['study']}.md"])


if __name__ == "__main__":
    main()
