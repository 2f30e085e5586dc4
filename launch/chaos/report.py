"""The report of a campaign: a page for people, and every kill for programs."""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence

from launch import provenance
from launch.bench import measure
from launch.chaos.record import Tally

PACKAGES = (*measure.PACKAGES, "orbax-checkpoint")
MEANT = {
    "start": "before the log was open: imports, data, programs, restoring",
    "first step": "compiling and computing the first step of a life",
    "steps": "steps, and nothing else under way",
    "save, writing": "Orbax was writing",
    "save, no manifest": "Orbax had finished, and files were hashed",
    "save, naming": "the manifest was there, and the checkpoint had no name yet",
    "save, retention": "an old checkpoint was due to be removed, or half removed",
    "evaluation": "a held-out score was due and not logged yet",
    "end": "after the last step: last save, final score, sample",
}


def record(tally: Tally, about: Mapping, header: Mapping) -> dict:
    """Everything, as JSON holds it. about: what the command knows of itself."""
    return {
        **about,
        "commit": provenance.commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": measure.device() | header.get("device", {}),
        "versions": provenance.versions(PACKAGES),
        "steps": tally.steps,
        "runs": tally.runs,
        "restarts": tally.restarts,
        "compared": {name: getattr(tally, name) for name in ("losses", "rows", "values", "arrays")},
        "phases": tally.phases,
        "kills": [dataclasses.asdict(kill) for kill in tally.kills],
        "config": header.get("config"),
    }


def page(found: Mapping) -> str:
    """The record as Markdown."""
    kills, compared = found["kills"], found["compared"]
    rows = [
        ("kills", f"{len(kills)} of {found['wanted']}, seed {found['seed']}"),
        ("violations", found["violation"] or "0"),
        ("runs that ended", f"{found['runs']}, each of {found['steps']:,} steps"),
        ("losses compared", f"{compared['losses']:,}"),
        ("rows compared", f"{compared['rows']:,} with {compared['values']:,} numbers"),
        ("arrays compared", f"{compared['arrays']:,} of last checkpoints"),
        ("steps lost by a kill", _lost(kills)),
        ("restarts", _restarts(found["restarts"])),
        *_others(kills, found["processes"]),
        ("time", f"{found['seconds'] / 60:.1f} min"),
    ]
    lines = [f"# {_title(found)}", "", f"`{found['command']}`", "", _made(found), ""]
    lines += _table(("", ""), rows)
    lines += ["", _explained(found), ""]
    phases = [(name, found["phases"].get(name, 0), what) for name, what in MEANT.items()]
    lines += _table(("a kill hit", "times", "what that is"), phases)
    return "\n".join(lines) + "\n"


def _title(found: Mapping) -> str:
    count = len(found["kills"])
    if found["violation"]:
        return f"A kill changed training, after {count} kills"
    if found["interrupted"]:
        return f"{count} kills, and then the campaign was stopped"
    return f"{count} kills lost and changed nothing"


def _made(found: Mapping) -> str:
    device = "{count} x {kind} ({processor}, {cores} cores)".format_map(found["device"])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"Commit {found['commit']}, {found['time']}, {device}, {found['processes']} process(es) a "
        f"run; {versions}."
    )


def _explained(found: Mapping) -> str:
    every = (found["config"] or {}).get("train", {}).get("save_every")
    saved = "at the end alone" if every is None else f"every {every} steps"
    return (
        "What is compared is compared to the last bit: after every kill all rows of metrics.jsonl "
        "but times, and of every run that ended the parameters, optimizer, counters and averages "
        "of its last checkpoint, its mixture's state and its final score. After every kill each "
        "finished checkpoint must have the sha256 sums of its manifest, and the next start must go "
        f"on from the newest one. A save ({saved}) is written while training goes on and ends "
        "before the next one begins, so that a kill may undo up to twice as many steps. A kill is "
        "SIGKILL: what was written still reaches the disk; a loss of power is not tried. A kill is "
        "counted in every row that it hit:"
    )


def _lost(kills: Sequence[Mapping]) -> str:
    lost = [kill["lost"] for kill in kills if kill["lost"] is not None]
    if not lost:
        return "none came after a step"
    median = statistics.median(lost)
    return f"{min(lost)} to {max(lost)}, median {median:g} ({len(lost)} kills after a step)"


def _restarts(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none came to a step"
    median, longest = statistics.median(seconds), max(seconds)
    return f"{len(seconds)} came to a step, in {median:.1f} s (median), {longest:.1f} s at most"


def _others(kills: Sequence[Mapping], processes: int) -> list[tuple[str, str]]:
    if processes == 1 or not kills:
        return []
    longest = max(kill["others"] for kill in kills)
    return [("the other processes ended", f"by themselves, {longest:.1f} s after the kill at most")]


def _table(head: Sequence[str], rows: Sequence[Sequence]) -> list[str]:
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return [line(head), line("---" for _ in head), *map(line, rows)]
