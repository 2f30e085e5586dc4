"""A study's report as text: its verdicts first, then what they follow from."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping

from analysis.compare import cell, paired_by, parts

PAIRS = """\
Each figure is an arm's run minus the run of {baseline} with the same {same}, of arms under a claim.
The seed decides the initial parameters and the order of the data: such a pair reads the same rows
in the same order, and begins with the same parameters where both have the same model. What makes a
seed easier or harder for both cancels, and the interval is that of the paired t-test."""
CHOICE = """\
An arm's point was chosen by the best mean of the same metric over the same seeds, which flatters
every arm with a grid, the baseline too. All points are under Grid and, run by run, in the JSON."""
FLOPS = "matrix products of the model, forward and backward, without the optimizer's own work"


def markdown(summary: Mapping) -> str:
    """The report of `analysis.summary.summarise`."""
    declared, study = summary["declared"], summary["study"]
    better = "higher" if declared["higher"] else "lower"
    numbers = listed(declared["seeds"])
    seeds = [f"seed {seed}" for seed in declared["seeds"]]
    blocks = [
        f"# {study}",
        summary["title"],
        f"The rule, as the study's docstring states it:\n\n{_quoted(summary['rule'])}",
        *(f"It was changed after runs had begun, from:\n\n{_quoted(x)}" for x in _earlier(summary)),
        "## Verdict",
        *_remarks(summary),
        table(("claim", "n", "mean difference", "95% interval", "verdict"), _claims(summary)),
        f"![{declared['metric']} of every arm]({study}.png)",
        "## Arms",
        f"{declared['metric']} at the last step, seeds {numbers}; {better} is better.",
        table(("arm", "point", "n", "mean", "sd", "range", "seconds a run"), _arms(summary)),
        *_notes(summary),
        *_shares(summary),
        "## Differences by seed",
        PAIRS.format(baseline=declared["baseline"], same=paired_by(declared.get("settings", ()))),
        table(("arm", *seeds, "mean", "sd"), _pairs(summary)),
        "## Grid",
        table(("arm", "point", *seeds, "mean", "sd"), _grid(summary)),
        "## What ran",
        table(("", ""), _ran(summary)),
    ]
    return "\n\n".join(blocks) + "\n"


def _earlier(summary: Mapping) -> list[str]:
    return summary["earlier_rules"]


def _quoted(text: str) -> str:
    return textwrap.fill(text, 98, initial_indent="> ", subsequent_indent="> ")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    lines = [tuple(head), *map(tuple, rows)]
    lines.insert(1, ("---",) * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _remarks(summary: Mapping) -> list[str]:
    told = [f"There is no verdict: {reason}." for reason in summary["differing"]]
    if not told and len(summary["claims"]) > 1:
        told.append("Each interval stands for itself; none is widened for the number of claims.")
    return told


def _claims(summary: Mapping) -> Iterator[tuple[str, ...]]:
    for claim in summary["claims"]:
        pair = summary["arms"][claim["arm"]]["paired"]
        ends = "" if pair["low"] is None else f"{signed(pair['low'])} to {signed(pair['high'])}"
        verdict = f"**{claim['verdict']}**" if claim["verdict"] else "none"
        yield claim["said"], str(pair["n"]), signed(pair["mean"]), ends, verdict


def _arms(summary: Mapping) -> Iterator[tuple[str, ...]]:
    for arm, found in summary["arms"].items():
        of = found["spread"]
        if of is None:
            yield arm, "none is finite", "0", "", "", "", ""
            continue
        around = f"{number(of['min'])} to {number(of['max'])}"
        mean, sd, seconds = number(of["mean"]), number(of["sd"]), f"{found['seconds']:.0f}"
        yield arm, found["chosen"], str(of["n"]), mean, sd, around, seconds


def _notes(summary: Mapping) -> list[str]:
    """What a reader must know of the points chosen, and of runs without a value."""
    arms, notes = summary["arms"], []
    if any(len(found["grid"]) > 1 for found in arms.values()):
        notes.append(CHOICE)
    edges = [f"{arm} ({', '.join(x['at_edge'])})" for arm, x in arms.items() if x["at_edge"]]
    if edges:
        notes.append(f"At the edge of what was tried, so better may lie outside: {listed(edges)}.")
    runs = summary["runs"].items()
    diverged = [f"{name} at step {x['diverged']}" for name, x in runs if x["diverged"] is not None]
    return notes + ([f"Not finite any more: {listed(diverged)}."] if diverged else [])


def _shares(summary: Mapping) -> Iterator[str]:
    """How far each arm comes on the way from the baseline to the arm `toward`."""
    declared, claimed = summary["declared"], {claim["arm"] for claim in summary["claims"]}
    means = {arm: x["spread"]["mean"] for arm, x in summary["arms"].items() if x["spread"]}
    for setting in declared.get("settings") or ("",):
        base, goal = (cell(declared[name], setting) for name in ("baseline", "toward"))
        if not {base, goal} <= means.keys() or means[base] == means[goal]:
            continue
        way = means[goal] - means[base]
        shares = [
            f"{arm} {(mean - means[base]) / way:.1%}"
            for arm, mean in means.items()
            if arm in claimed - {goal} and parts(arm)[1] == setting
        ]
        if shares:
            told = f"Of the way from {base} to {goal}, by the means: {listed(shares)}."
            free = f" No claim is on {goal}, so its data and FLOPs are not compared."
            yield told if goal in claimed else told + free


def _pairs(summary: Mapping) -> Iterator[tuple[str, ...]]:
    claimed = {claim["arm"] for claim in summary["claims"]}
    for arm, found in summary["arms"].items():
        if arm in claimed:
            pair = found["paired"]
            cells = [signed(pair["by_seed"].get(str(x))) for x in summary["declared"]["seeds"]]
            yield arm, *cells, signed(pair["mean"]), number(pair["sd"])


def _grid(summary: Mapping) -> Iterator[tuple[str, ...]]:
    for arm, found in summary["arms"].items():
        for label, point in found["grid"].items():
            of = point["spread"] or {"mean": None, "sd": None}
            cells = [number(x) or "not finite" for x in point["values"].values()]
            shown = f"**{label}**" if label and label == found["chosen"] else label
            yield arm, shown, *cells, number(of["mean"]), number(of["sd"])


def _ran(summary: Mapping) -> Iterator[tuple[str, str]]:
    """Facts that all runs share, or each fact with its runs."""
    yield "command", f"`{summary['command']}`"
    yield "seeds", listed(summary["declared"]["seeds"])
    runs = summary["runs"]
    after = {x["arm"]: runs[x["after"]]["arm"] for x in runs.values() if x.get("after")}
    if after:
        told = listed(f"{arm} from {before}" for arm, before in after.items())
        yield "go on", f"{told}; their tokens and FLOPs are counted together"
    for what, facts in summary["ran"].items():
        several = len(facts) > 1
        told = (f"{x}: {listed(runs)}" if several else x for x, runs in facts.items())
        yield what, "; ".join(told)
    if any("+changes" in commit for commit in summary["ran"]["commit"]):
        yield "+changes", "files differed from the commit"
    yield "FLOPs are", FLOPS


def listed(items: Iterable) -> str:
    """`a, b and c`."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def number(value: float | None) -> str:
    """Four decimals; nothing for None."""
    return "" if value is None else f"{value:.4f}"


def signed(value: float | None) -> str:
    """Four decimals with the sign; nothing for None."""
    return "" if value is None else f"{value:+.4f}"
