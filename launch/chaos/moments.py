"""When to kill: moments drawn from a seed, and the wait for them."""

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Mapping

from launch.chaos.evidence import Marks
from launch.chaos.verdict import Violation
from launch.chaos.victim import Life

# What a moment is aimed at, and how often. A save's last stages are short and seldom hit by chance.
AIMS = {"life": 0.6, "start": 0.1, "save": 0.1, "seal": 0.1, "removal": 0.1}
FRESH = {"life": 1 / 3, "start": 2 / 3}  # Of a run's first life, which compiles.
SPARED = 1 / 3  # of the lives that reach the last step
SAVES = 3  # the latest of a life that is aimed at
PERIODS = 6  # periods of saving within which a life is killed
BEYOND = 1.25  # of a stage's length, so that what follows is hit too
POLL = 0.001  # seconds
STALL = 900.0  # seconds without any sign of life


@dataclasses.dataclass(frozen=True)
class Moment:
    """aim: of AIMS.  part: from 0 to 1, of the span that the aim has.

    saves: for the stages of a save, which one of the life.  end: the part of the run's end at which
    a life is killed that reaches the end before its moment; None spares it.
    """

    aim: str
    part: float
    saves: int
    end: float | None


def draw(random: random.Random, fresh: bool) -> Moment:
    """The moment of one life. fresh: it is the first one of its run, which compiles."""
    aims = FRESH if fresh else AIMS
    (aim,) = random.choices(list(aims), list(aims.values()))
    part, saves = random.random(), random.randint(1, SAVES)
    spared, end = random.random() < SPARED, random.random()
    return Moment(aim, part, saves, None if spared else end)


@dataclasses.dataclass
class Spans:
    """Seconds. cold, warm: from the start to the first step, compiling and of the lives after.

    life: within which moments are drawn.  end: from the last step to the end of the process.
    stages: how long each stage of a save goes on.
    """

    cold: float
    warm: list[float]
    life: float
    end: float
    stages: Mapping[str, float]

    def start(self, fresh: bool) -> float:
        return self.cold if fresh or not self.warm else statistics.median(self.warm)


def measured(marks: Marks, began: float, ended: float, config: Mapping) -> Spans:
    """The spans of a life that went from a run's first step to its last."""
    rate = (marks.last_at - marks.first_at) / max(1, config["steps"] - 1)
    # A run that saves at its end alone is killed anywhere in it.
    period = rate * (config["train"]["save_every"] or config["steps"] / PERIODS)
    stages = {name: statistics.median(s.values()) for name, s in marks.seconds.items() if s}
    return Spans(marks.first_at - began, [], PERIODS * period, ended - marks.last_at, stages)


def due(moment: Moment | None, marks: Marks, began: float, spans: Spans, fresh: bool) -> float:
    """When to kill, as far as it can be told by now; infinite where it cannot."""
    if moment is None:
        return math.inf
    if moment.aim == "start":
        return began + moment.part * spans.start(fresh)
    if marks.last_at is not None:
        return math.inf if moment.end is None else marks.last_at + moment.end * spans.end
    if moment.aim in marks.seen:
        seen = sorted(marks.seen[moment.aim].values())
        if len(seen) < moment.saves:
            return math.inf
        return seen[moment.saves - 1] + moment.part * BEYOND * spans.stages.get(moment.aim, 0.0)
    return math.inf if marks.first_at is None else marks.first_at + moment.part * spans.life


def wait(life: Life, marks: Marks, moment: Moment | None, spans: Spans | None, fresh: bool) -> bool:
    """Until the moment (True), or until a process has ended before (False).

    Raises Violation where nothing happens for STALL seconds.
    """
    while life.running():
        now = time.monotonic()
        marks.look(now)
        if now >= due(moment, marks, life.began, spans, fresh):
            return True
        if now - marks.changed_at > STALL:
            raise Violation(f"{STALL:.0f} s went by without a step; it said: {life.words()}")
        time.sleep(POLL)
    marks.look(time.monotonic())
    return False
