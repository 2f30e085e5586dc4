"""Which process of a run hangs: judged from what each says about itself, about once a second.

A process whose watchdog says nothing is stopped or cut off. One whose watchdog lives while its main
thread hangs (a file system, a lock) is behind: main threads pass the same points in the same order,
so the others could pass a point that it has not reached without needing it. Where all are equally
far there is a long step, and nothing to judge.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping

BEAT = 1.0  # seconds between two signs of life
# A loaded machine keeps a thread waiting for seconds, a stopped one for good.
SILENT = 25.0
# Longer than any input or log file should keep one process alone, and still named within a minute.
BEHIND = 45.0
# Phases in which one process may rightly take longer than the others, in seconds.
PHASES = {
    "reading its corpus": math.inf,  # tokenizing one for the first time can take hours
    "starting": 1800.0,  # opens devices and reads a checkpoint from storage that may be slow
    "taking its first step": 1800.0,  # compiles; the largest programs take half an hour
    "saving": 600.0,
    "evaluating": 600.0,  # compiles the first time
    "sampling": 600.0,  # likewise
    "profiling": 600.0,  # writes what it has collected
    "ending": math.inf,  # all is saved, and process 0 counts n-grams of the corpus
}
OVERRULE = "MESHWORK_STALL_SECONDS"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds without a sign of life, and seconds behind the others in a phase not in PHASES."""

    silent: float = SILENT
    behind: float = BEHIND

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> "Limits":
        """MESHWORK_STALL_SECONDS is both; a large one lets a process be held in a debugger.

        Raises ValueError if it is not a number above 0.
        """
        text = environ.get(OVERRULE)
        if text is None:
            return cls()
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if not seconds > 0:
            raise ValueError(f"{OVERRULE} is {text!r}; give a number of seconds above 0")
        return cls(seconds, seconds)


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a process says of its main thread.

    mark: how many points it has passed.  step: the last one it has taken.  seconds, input: means
    over its last steps, of a step and of the part that it waited for its batch; None before any.
    """

    mark: int = 0
    phase: str = "starting"
    step: int = 0
    seconds: float | None = None
    input: float | None = None


@dataclasses.dataclass
class _Seen:
    at: float
    beat: Beat
    behind_since: float | None = None
    ended: bool = False


class Pulse:
    """The signs of life of some processes. Times are seconds of one clock."""

    def __init__(self, processes: Iterable[int], now: float, limits: Limits):
        self._limits, self._checked = limits, now
        self._seen = {process: _Seen(now, Beat()) for process in processes}

    def heard(self, process: int, beat: Beat | None, now: float) -> None:
        """beat: None if only the connection was heard of."""
        seen = self._seen[process]
        seen.at = now
        if beat is not None:
            if beat.mark != seen.beat.mark:
                seen.behind_since = None
            seen.beat = beat

    def ended(self, process: int) -> None:
        """It has said that it is done, and nothing more is expected of it."""
        self._seen[process].ended = True

    def beat(self, process: int) -> Beat:
        return self._seen[process].beat

    def furthest(self) -> int:
        """The last step that any process is known to have taken."""
        return max(seen.beat.step for seen in self._seen.values())

    def stalled(self, now: float) -> tuple[int, str] | None:
        """A process that hangs, and in words how; of several the one that is furthest behind."""
        if now - self._checked > max(self._limits.silent / 2, 3 * BEAT):
            self._forgive(now)  # It was this process that stood still.
        self._checked = now
        living = {p: seen for p, seen in self._seen.items() if not seen.ended}
        for process, seen in living.items():
            if now - seen.at > self._limits.silent:
                return process, f"has given no sign of life for {now - seen.at:.0f} seconds"
        return self._behind(living, now)

    def _forgive(self, now: float) -> None:
        for seen in self._seen.values():
            seen.at, seen.behind_since = now, None

    def _behind(self, living: Mapping[int, _Seen], now: float) -> tuple[int, str] | None:
        top = max(seen.beat.mark for seen in self._seen.values())
        late = []
        for process, seen in living.items():
            if seen.beat.mark >= top:
                seen.behind_since = None
                continue
            if seen.behind_since is None:
                seen.behind_since = now
            waited = now - seen.behind_since
            if waited > max(PHASES.get(seen.beat.phase, 0.0), self._limits.behind):
                late.append((seen.beat.mark, process, waited))
        if not late:
            return None
        _, process, waited = min(late)
        phase = self._seen[process].beat.phase
        return process, f"has kept the others waiting for {waited:.0f} seconds while {phase}"
