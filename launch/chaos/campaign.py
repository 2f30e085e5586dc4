"""The campaign: a reference that is left alone, and runs that are killed until they have ended."""

import itertools
import pathlib
import random
import shutil
from collections.abc import Callable, Mapping

from launch.chaos import evidence, moments, verdict, victim
from launch.chaos.evidence import LOG, Marks, Sight
from launch.chaos.moments import Moment, Spans
from launch.chaos.record import Kill, Tally
from launch.chaos.verdict import Violation
from launch.chaos.victim import ALONE, Life, Victim
from training.metrics import MetricsError, read


class Campaign:
    """victim: starts lives.  folder: gets one for every run.  kills: how many in all.

    tell(kill): called after each.
    """

    def __init__(
        self,
        victim: Victim,
        folder: pathlib.Path,
        kills: int,
        seed: int,
        tell: Callable[[Kill], None] = lambda kill: None,
    ):
        self.tally = Tally(victim.config["steps"])
        self.header: Mapping = {}  # of the reference
        self._victim, self._folder, self._wanted, self._tell = victim, folder, kills, tell
        self._random = random.Random(seed)
        self._reference = folder / "reference"
        self._rows: list[dict] = []
        self._spans: Spans | None = None

    def run(self) -> None:
        """The reference, then runs until there were enough kills and the last run has ended.

        Raises Violation; what there is to see stays in `folder`.
        """
        self._take_reference()
        while len(self.tally.kills) < self._wanted:
            self._take_run(self.tally.runs + 1)

    def _take_reference(self) -> None:
        marks, life, _ = self._live(self._reference, "reference", None, fresh=True)
        life.check()
        config, steps = self._victim.config, self.tally.steps
        self._spans = moments.measured(marks, life.began, life.ended_at, config)
        self.header, self._rows = _read(self._reference)
        logged = [row["step"] for row in self._rows if "loss" in row]
        if logged != list(range(1, steps + 1)):
            raise Violation(f"the reference has logged {len(logged)} of {steps} losses")
        _check_sound(self._reference, evidence.look(self._reference))
        verdict.finals(self._reference, self._reference, steps)

    def _take_run(self, run: int) -> None:
        folder, before = self._folder / f"run-{run}", Sight()
        for count in itertools.count(1):
            name = f"run-{run}-life-{count}"
            try:
                before, kill = self._take_life(folder, name, run, count, before)
                if kill is None:
                    break
            except Violation as error:
                raise Violation(f"{name}: {error}") from error
            self.tally.kills.append(kill)
            self._tell(kill)
        self.tally.runs += 1
        for done in (folder, victim.compiled(folder)):
            shutil.rmtree(done, ignore_errors=True)

    def _take_life(self, folder, name, run, count, before: Sight) -> tuple[Sight, Kill | None]:
        """What a life left behind, and its kill; no kill if it came to the run's end."""
        enough, fresh = len(self.tally.kills) >= self._wanted, count == 1
        moment = None if enough else moments.draw(self._random, fresh)
        marks, life, rank = self._live(folder, name, moment, fresh)
        rows = _read(folder)[1] if (folder / LOG).exists() else []
        after, config = evidence.look(folder), self._victim.config
        self._judge(folder, life, rank, marks, rows, before, after)
        self.tally.lived(run, marks, rows, life.began)
        if marks.first_at is not None and not fresh:
            self._spans.warm.append(marks.first_at - life.began)
        if rank is None:
            self.tally.arrays += verdict.finals(folder, self._reference, self.tally.steps)
            return after, None
        lost = None
        if marks.logged is not None:
            lost = verdict.lost(marks.logged, after.newest, config["train"]["save_every"])
        seen = evidence.phases(marks, before, after, rows, config)
        seconds, others = life.killed_at - life.began, life.ended_at - life.killed_at
        ends = before.newest, after.newest, marks.logged, lost
        return after, Kill(run, count, moment.aim, rank, seconds, seen, *ends, others)

    def _judge(self, folder, life: Life, rank, marks, rows, before: Sight, after: Sight) -> None:
        """Raises Violation for what a life did, and for how its processes ended."""
        if marks.resumed is not None:
            verdict.resumed(marks.resumed, before.newest)
        verdict.rows(rows, self._rows)
        verdict.kept(before.steps, after.steps, self._victim.config["train"])
        _check_sound(folder, after)
        if rank is None:
            life.check()
            verdict.rows(rows, self._rows, whole=True)
            return
        for other, status in life.others(rank).items():
            verdict.parted(other, status, life.words(other))

    def _live(self, folder, name, moment: Moment | None, fresh) -> tuple[Marks, Life, int | None]:
        """One life, with the rank that was killed; None where it ended by itself."""
        marks, life = Marks(folder, self.tally.steps), self._victim.start(folder, name)
        try:
            rank = None
            if moments.wait(life, marks, moment, self._spans, fresh):
                rank = life.kill(self._random)
            if not life.wait(ALONE):
                raise Violation(
                    f"a process still ran {ALONE:.0f} s after another one of its run had "
                    f"{'ended' if rank is None else 'been killed'}"
                )
            marks.look(life.ended_at)
            return marks, life, rank
        finally:
            life.stop()
            marks.close()


def _check_sound(folder: pathlib.Path, sight: Sight) -> None:
    for step in sight.steps:
        verdict.sound(folder / "checkpoints" / str(step))


def _read(folder: pathlib.Path) -> tuple[dict, list[dict]]:
    try:
        return read(folder / LOG)
    except MetricsError as error:
        raise Violation(f"metrics.jsonl cannot be read: {error}") from error
