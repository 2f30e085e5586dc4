"""A study's runs as one dictionary: what the report's JSON holds, and its text and picture show.

Only files of the study's folder enter, so the same files give the same dictionary.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping

from analysis.compare import Rule, interval, spread
from analysis.records import leaves
from analysis.sameness import differences, ran
from analysis.studies import Study

POINTS = 50  # of a run's curve, at most


def summarise(study: Study) -> dict:
    """Everything that the report says, in types of JSON."""
    given, rule = study.given, study.rule
    names = dict.fromkeys(run["arm"] for run in given["runs"].values())
    arms = {arm: _arm(study, arm) for arm in names}
    for arm in arms:
        if arm != rule.base(arm):
            arms[arm]["paired"] = paired(arms[rule.base(arm)]["values"], arms[arm]["values"])
    differing = differences(study)
    return {
        "study": given["name"],
        "title": given["title"],
        "command": given["command"],
        "rule": given["rule"],
        "earlier_rules": given["earlier_rules"],
        "declared": dataclasses.asdict(rule) | {"seeds": given["seeds"]},
        "differing": differing,
        "claims": [_claim(rule, arm, arms[arm], differing) for arm in rule.judged],
        "arms": arms,
        "scored_rows": study.scored_rows,
        "ran": ran(study),
        "config": next(iter(study.records.values())).config,
        "runs": {name: _run(study, name) for name in given["runs"]},
    }


def _arm(study: Study, arm: str) -> dict:
    """Its grid, the point with the best mean over seeds, and the values there by seed."""
    grid: dict[str, dict] = {}
    for name, run in study.given["runs"].items():
        if run["arm"] == arm:
            label = ", ".join(f"{key}={text}" for key, text in run["point"].items())
            point = grid.setdefault(label, {"point": run["point"], "runs": [], "values": {}})
            point["runs"].append(name)
            point["values"][str(run["seed"])] = study.value(name)
    means = {label: found for label in grid if (found := _spread(grid[label])) is not None}
    best = study.rule.best({label: found["mean"] for label, found in means.items()})
    runs = [] if best is None else grid[best]["runs"]
    return {
        "chosen": best,
        "at_edge": [] if best is None else at_edge(best, grid),
        "values": {} if best is None else grid[best]["values"],
        "spread": means.get(best),
        "seconds": statistics.fmean(study.records[n].seconds for n in runs) if runs else None,
        "curve": _band([dict(study.curve(name)) for name in runs]),
        "grid": {label: point | {"spread": means.get(label)} for label, point in grid.items()},
    }


def _spread(point: Mapping) -> dict | None:
    """None where a seed diverged: a mean of the others would flatter the point."""
    values = list(point["values"].values())
    return None if None in values else spread(values)


def at_edge(best: str, grid: Mapping[str, Mapping]) -> list[str]:
    """Keys whose chosen number is the least or the greatest of those tried."""
    tried: dict[str, set[float]] = {}
    for point in grid.values():
        for key, text in point["point"].items():
            tried.setdefault(key, set()).add(_number(text))
    chosen = {key: _number(text) for key, text in grid[best]["point"].items()}
    ranges = {key: (min(x), max(x)) for key, x in tried.items() if len(x) > 1 and None not in x}
    return [key for key, ends in ranges.items() if chosen[key] in ends]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _band(curves: list[dict[int, float]]) -> dict[str, list]:
    """Mean, least and greatest over seeds, at each number of tokens that all seeds have."""
    shared = [tokens for tokens in curves[0] if all(tokens in c for c in curves)] if curves else []
    columns = [[c[tokens] for c in curves] for tokens in shared]
    return {
        "tokens": shared,
        "mean": [statistics.fmean(column) for column in columns],
        "low": [min(column) for column in columns],
        "high": [max(column) for column in columns],
    }


def paired(base: Mapping[str, float], values: Mapping[str, float]) -> dict:
    """Differences to the baseline's run of the same seed, and the interval of their mean."""
    by_seed = {seed: values[seed] - base[seed] for seed in values if seed in base}
    found = list(by_seed.values())
    low, high = interval(found) if len(found) > 1 else (None, None)
    of = spread(found) if found else {"n": 0, "mean": None, "sd": None, "min": None, "max": None}
    return {"by_seed": by_seed, **of, "low": low, "high": high}


def _claim(rule: Rule, arm: str, found: Mapping, differing: list[str]) -> dict:
    """The claim with its verdict; None where the runs cannot be compared."""
    by_seed = list(found["paired"]["by_seed"].values())
    kind = rule.judged[arm]
    verdict = None if differing else rule.judge(kind, by_seed)
    said = f"{arm} is {kind} than {rule.base(arm)}"
    return {"arm": arm, "said": said, "verdict": verdict}


def _run(study: Study, name: str) -> dict:
    """All that is kept of one run; its configuration as differences to that of the first run."""
    run, record = study.given["runs"][name], study.records[name]
    first = dict(leaves(next(iter(study.records.values())).config))
    losses = [(row["tokens"], row["loss"]) for row in record.rows if "loss" in row]
    return {
        "arm": run["arm"],
        "point": run["point"],
        "seed": run["seed"],
        "value": study.value(name),
        "after": run.get("after"),
        "diverged": record.diverged,
        "seconds": record.seconds,
        "attempts": len(record.attempts),
        "commits": list(dict.fromkeys(head.get("commit") for head in record.headers)),
        "config": {key: x for key, x in leaves(record.config) if first.get(key, ...) != x},
        "header": {key: x for key, x in record.headers[0].items() if key != "config"},
        "final": record.last if record.ended else {},
        "score": record.score,
        "curve": thinned(study.curve(name)),
        "loss": thinned([point for point in losses if math.isfinite(point[1])]),
    }


def thinned(points: list) -> list:
    """At most POINTS of them at even distances, the last one among them."""
    return points[:: -max(1, -(-len(points) // POINTS))][::-1]
