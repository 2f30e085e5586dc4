"""A study's folder: `study.json`, which `sweep` writes, and beside it a folder for each run."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

from analysis.compare import Rule
from analysis.records import Record, read


@dataclasses.dataclass(frozen=True)
class Study:
    """given: study.json.  records: {name of a run: what it left}, in the order of the grid."""

    given: Mapping
    records: Mapping[str, Record]

    @property
    def rule(self) -> Rule:
        names = [field.name for field in dataclasses.fields(Rule)]
        found = {name: self.given[name] for name in names if name in self.given}
        return Rule(**found | {"settings": tuple(found.get("settings", ()))})

    def compared(self) -> list[list[str]]:
        """Of each setting, the runs of arms that a verdict is on, and of its baseline."""
        rule, groups = self.rule, {}
        for name, run in self.given["runs"].items():
            base = rule.base(run["arm"])
            if run["arm"] in (base, *rule.judged):
                groups.setdefault(base, []).append(name)
        return list(groups.values())

    def chain(self, name: str | None) -> list[Record]:
        """The run, and those that it goes on from: whose parameters it began with, and so on."""
        found = []
        while name is not None:
            found.append(self.records[name])
            name = self.given["runs"][name].get("after")
        return found

    def value(self, name: str) -> float | None:
        """The metric of a run at its last step; None if it diverged."""
        record = self.records[name]
        return None if record.diverged is not None else record.last[self.given["metric"]]

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(tokens, metric) of a run: scores of the same rows throughout.

        The last score is of all held-out rows; where earlier ones are of a part, it is left out.
        """
        record, metric = self.records[name], self.given["metric"]
        rows = [(row["tokens"], row[metric]) for row in record.rows if metric in row]
        partial = metric.startswith("validation/") and self.scored_rows is not None
        return rows[:-1] if partial and record.ended else rows

    @property
    def scored_rows(self) -> int | None:
        """Held-out rows that evaluations before the last one read; None is all."""
        return next(iter(self.records.values())).config["train"]["eval_rows"]


def load(folder: pathlib.Path) -> Study:
    """The study in this folder. Raises ValueError, one sentence: runs are missing or lack a metric.

    A run that diverged has ended, without a value.
    """
    path = folder / "study.json"
    if not path.is_file():
        raise ValueError(f"there is no {path}; `uv run sweep` writes it when it starts runs there")
    given = json.loads(path.read_text(encoding="utf-8"))
    found = {name: read(folder / name) for name in given["runs"]}
    for name, run in given["runs"].items():
        before = found.get(run.get("after"))
        if before is not None and before.diverged is not None:
            raise ValueError(
                f"{run['after']} diverged at step {before.diverged}, so {name} cannot go on from "
                "it and there is no report; change what it is trained with"
            )
    missing = [name for name, record in found.items() if not _over(record)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(found)} runs in {folder} have not ended, {missing[0]} for "
            "one; `sweep` goes on with them"
        )
    for name, record in found.items():
        if record.diverged is None and given["metric"] not in record.last:
            raise ValueError(f"{folder / name} {lacks(record, given['metric'])}")
    return Study(given, found)


def _over(record: Record | None) -> bool:
    return record is not None and (record.ended or record.diverged is not None)


def lacks(record: Record, metric: str) -> str:
    """What to say of a run that has ended without the metric."""
    logged = ", ".join(sorted(set(record.last) - {"step", "tokens", "time"}))
    return f"has no {metric} at its last step; METRIC may be one of {logged}"
