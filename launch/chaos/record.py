"""What a campaign has seen: every kill, and how much was compared."""

import dataclasses
from collections.abc import Mapping, Sequence

from launch.chaos import verdict
from launch.chaos.evidence import Marks


@dataclasses.dataclass
class Kill:
    """One kill. run, life: counted from 1.  aim: of the moment.  rank: of the process killed.

    seconds: into the life.  phases: what was under way.  before: the newest finished checkpoint
    when the life began, 0 for none; newest: after the kill.  logged: the last step of which this
    life logged the loss, and lost: how many of its steps are gone; None where it logged none.
    others: seconds that the life's other processes lived on.  resumed: the step from which the run
    went on, in the next life that came so far.
    """

    run: int
    life: int
    aim: str
    rank: int
    seconds: float
    phases: list[str]
    before: int
    newest: int
    logged: int | None
    lost: int | None
    others: float
    resumed: int | None = None


@dataclasses.dataclass
class Tally:
    """steps: of the reference.  restarts: seconds from each to its first step.

    runs: that have ended and were compared as a whole, and arrays: of their last checkpoints.
    rows, losses, values: of metrics.jsonl, each time that a life logged one.
    """

    steps: int
    kills: list[Kill] = dataclasses.field(default_factory=list)
    restarts: list[float] = dataclasses.field(default_factory=list)
    runs: int = 0
    arrays: int = 0
    rows: int = 0
    losses: int = 0
    values: int = 0

    def lived(self, run: int, marks: Marks, rows: Sequence[Mapping], began: float) -> None:
        """Counts what a life logged, and tells the kills before it where the run went on."""
        if marks.resumed is None:
            return
        earlier = [kill for kill in self.kills if kill.run == run]
        for kill in earlier:
            kill.resumed = marks.resumed if kill.resumed is None else kill.resumed
        if earlier and marks.first_at is not None:
            self.restarts.append(marks.first_at - began)
        new = [row for row in rows if row["step"] > marks.resumed]
        self.rows += len(new)
        self.losses += sum("loss" in row for row in new)
        self.values += sum(len(verdict.plain(row)) for row in new)

    @property
    def phases(self) -> dict[str, int]:
        """How many kills hit what; one may hit a save and an evaluation at once."""
        seen = [phase for kill in self.kills for phase in kill.phases]
        return {phase: seen.count(phase) for phase in sorted(set(seen))}
