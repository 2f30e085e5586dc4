"""What a run's folder shows from outside: while a life goes on, and when it is over."""

import dataclasses
import json
import os
import pathlib
import re
import time
from collections.abc import Iterator, Mapping

LOG = "metrics.jsonl"
MANIFEST = "manifest.jsonl"
COMMITTED = "commit_success.txt"  # Orbax's mark
SAVING = re.compile(r"(\d+)\.saving(\..*)?")  # longer while Orbax writes
REMOVED = re.compile(r"(\d+)\.removed-\w+")
STAGES = ("save", "seal", "removal")
# A name in the folder of checkpoints with inode and time of change: what a life left untouched.
Place = tuple[str, int, int]


class Marks:
    """The first step of a life, its last one, and its saves, with the time at which each was seen.

    resumed: the step that the life began from, None until its log is open.  logged: the last step
    of which this life has logged the loss.  seen: {stage: {step: when it was first seen}} of
    STAGES: a save, its files that Orbax has finished, the removal of an old checkpoint.
    seconds: the same, from then until the save was finished or the old checkpoint gone.
    """

    def __init__(self, workdir: pathlib.Path, steps: int):
        self._log, self._steps = workdir / LOG, steps
        self._checkpoints = workdir / "checkpoints"
        self._inodes = {self._inode()}
        self._file, self._rest = None, b""
        self._left = set(_places(self._checkpoints))
        self.resumed = self.logged = self.first_at = self.last_at = None
        self.seen: dict[str, dict[int, float]] = {stage: {} for stage in STAGES}
        self.seconds: dict[str, dict[int, float]] = {stage: {} for stage in STAGES}
        self.changed_at = time.monotonic()

    def look(self, now: float) -> None:
        """Takes in what has changed."""
        self._look_at_log(now)
        self._look_at_saves(now)
        if self.last_at is None and self._steps in (self.resumed, self.logged):
            self.last_at = now

    def _look_at_log(self, now: float) -> None:
        inode = self._inode()
        if inode not in self._inodes:  # A life replaces the file before it adds to it.
            self.close()
            self._inodes.add(inode)
            self._file, self._rest = open(self._log, "rb"), b""  # noqa: SIM115 (closed by close)
        if self._file is None or not (added := self._file.read()):
            return
        *lines, self._rest = (self._rest + added).split(b"\n")
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # Judged when the life is over.
                continue
            if "header" in row:
                self.resumed, self.logged = row.get("resumed", 0), None
            elif "loss" in row:
                self.logged = row["step"]
        self.changed_at = now
        if self.first_at is None and self.logged is not None:
            self.first_at = now

    def _look_at_saves(self, now: float) -> None:
        there = list(_places(self._checkpoints))
        stages = [(place, _stage(place[0])) for place in there if place not in self._left]
        for place, found in stages:
            for stage in found:
                self.seen[stage].setdefault(_step(place[0]), now)
        going = {_step(place[0]) for place, found in stages if "removal" in found}
        over = {"save": set(_steps(there)), "removal": self.seen["removal"].keys() - going}
        for stage, steps in (over | {"seal": over["save"]}).items():
            for step in steps & self.seen[stage].keys() - self.seconds[stage].keys():
                self.seconds[stage][step] = now - self.seen[stage][step]

    def _inode(self) -> int | None:
        try:
            return os.stat(self._log).st_ino
        except FileNotFoundError:
            return None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _places(folder: pathlib.Path) -> Iterator[Place]:
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        try:
            stat = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # renamed or removed since
            continue
        yield entry.name, stat.st_ino, stat.st_mtime_ns


def _stage(name: str) -> tuple[str, ...]:
    """Of STAGES, what a name among the checkpoints says to be under way."""
    if REMOVED.fullmatch(name):
        return ("removal",)
    if not (saving := SAVING.fullmatch(name)):
        return ()
    return ("save",) if saving[2] else ("save", "seal")


def _step(name: str) -> int:
    return int(name.partition(".")[0])


def _steps(places: list[Place]) -> list[int]:
    """A finished checkpoint's folder has the number of its step for a name."""
    return sorted(int(name) for name, *_ in places if name.isdecimal())


@dataclasses.dataclass(frozen=True)
class Sight:
    """The checkpoints that lie there when no process runs.

    steps: finished ones, ascending.  halves: what was being done to others, by their place.
    """

    steps: tuple[int, ...] = ()
    halves: Mapping[Place, str] = dataclasses.field(default_factory=dict)

    @property
    def newest(self) -> int:
        """The last finished checkpoint, 0 where there is none."""
        return max(self.steps, default=0)


def look(workdir: pathlib.Path) -> Sight:
    folder = workdir / "checkpoints"
    there = list(_places(folder))
    halves = {place: _half(folder / place[0]) for place in there}
    return Sight(tuple(_steps(there)), {place: what for place, what in halves.items() if what})


def _half(path: pathlib.Path) -> str | None:
    """What was under way with a folder that is not, or no longer, a finished checkpoint."""
    stage = _stage(path.name)
    if not stage or "removal" in stage:
        return "save, retention" if stage else None
    if (path / MANIFEST).is_file():
        return "save, naming"
    return "save, no manifest" if (path / COMMITTED).is_file() else "save, writing"


def phases(marks: Marks, before: Sight, after: Sight, rows: list[Mapping], config) -> list[str]:
    """What was under way when a life ended, read from what it left behind."""
    every = config["train"]
    if marks.resumed is None:
        return ["start"]
    found = {after.halves[place] for place in after.halves.keys() - before.halves.keys()}
    if _too_many(after.steps, every):
        found.add("save, retention")
    if marks.last_at is not None:
        found.add("end")
    elif marks.first_at is None:
        found.add("first step")
    elif _evaluating(rows, every["eval_every"]):
        found.add("evaluation")
    return sorted(found) or ["steps"]


def _too_many(steps: tuple[int, ...], every: Mapping) -> bool:
    keep, always = every["keep"], every["keep_every"]
    return keep is not None and any(always is None or step % always for step in steps[:-keep])


def _evaluating(rows: list[Mapping], every: int | None) -> bool:
    """Whether the last step was due to be followed by a score that is not there."""
    return bool(rows) and every is not None and "loss" in rows[-1] and rows[-1]["step"] % every == 0
