"""The processes of one run: who they are, and what the loop needs from all of them together.

`Alone` is what a run of one process has. Of several, process 0 is connected with every other one
(training/leader.py), and each of those with it (training/follower.py). Nothing here needs JAX: a
watchdog thread in each process speaks and listens, whatever its main thread or its devices do.
"""

import collections
import contextlib
import functools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from training.liveness import Beat, Limits, Pulse
from training.stopping import Stopping
from training.watchdog import Watchdog
from training.wire import Wire

LOST = 3  # exit status of a process that ends because another one is lost
# What all processes fail with is told by process 0 alone, if they come to it in this time.
GRACE = 3.0
BLOCKED = 5.0  # seconds after which a process leaves though its last words do not get out
LOOKING = 2.0  # seconds that looking for the latest checkpoint may take
WINDOW = 50  # steps in a mean


class TogetherError(ValueError):
    """One sentence that every process of the run raises."""


class Alone:
    """A run of one process."""

    index, count, leader = 0, 1, True

    def at(self, phase: str) -> None:
        """The main thread has come to a phase; all processes pass the same ones in one order."""

    def fed(self, batches: Iterator) -> Iterator:
        """The same batches; the time that each is waited for counts as input."""
        return batches

    def stops(self, step: int, wanted: bool) -> bool:
        """Whether the run ends with this step; to be asked at the end of every step.

        wanted: whether this process was told to stop; all of them then stop at one step soon.
        """
        return wanted

    def times(self) -> dict[str, float]:
        """Metrics of each of several processes: seconds a step, and those it had no batch.

        Every process calls it, and only the leader is given them.
        """
        return {}

    def go_on_from(self, steps: Callable[[], Sequence[int]]) -> None:
        """steps() tells from which steps the run could go on, for the last words of a process."""


class Hosts:
    """One of several processes; what it offers the loop is described in `Alone`.

    index: its number.  names: of all processes, such as 'host 2 (node17, process 4242)'.
    wires: to those that it is connected with.  judged: whose signs of life it judges.
    leave(status, sentence): ends this process, called from the watchdog's thread.
    """

    def __init__(
        self,
        index: int,
        names: Sequence[str],
        wires: Mapping[int, Wire],
        judged: Iterable[int],
        *,
        limits: Limits | None = None,
        leave: Callable[[int, str], None] | None = None,
    ):
        self.index, self.names, self.count = index, tuple(names), len(names)
        self.leader = index == 0
        # The progress bar of the leader leaves its line open.
        last = functools.partial(_leave, "\n" if self.leader else "")
        self._wires, self._end = wires, leave or last
        self._changed = threading.Condition()  # guards all that follows
        self._stopping = Stopping()
        self._mark, self._phase, self._step = 0, "starting", 0
        self._steps: collections.deque = collections.deque(maxlen=WINDOW)
        self._begun = self._waited = 0.0
        self._quiet = False  # nobody is missed any more
        self._compared: list[str] = []
        self._saved: Callable[[], Sequence[int]] | None = None
        self._pulse = Pulse(judged, time.monotonic(), limits or Limits.of())
        self._watchdog = Watchdog(wires, self._hear, self._lost, self._tick)

    def start(self) -> None:
        self._watchdog.start()

    # What the loop calls.

    def at(self, phase: str) -> None:
        with self._changed:
            self._mark, self._phase = self._mark + 1, phase

    def fed(self, batches: Iterator) -> Iterator:
        phase = "taking its first step"
        while True:
            self.at(phase)
            self._begun = time.perf_counter()
            batch = next(batches)
            self._waited = time.perf_counter() - self._begun
            self.at(phase if phase.startswith("taking") else "running a step")
            yield batch
            phase = "waiting for its batch"

    def stops(self, step: int, wanted: bool) -> bool:
        with self._changed:
            if self._step:  # The first step compiles.
                self._steps.append((time.perf_counter() - self._begun, self._waited))
            self._step = step
            if self._stopping.asks(step, wanted):
                self._say("want", passed=self._stopping.passed)
            while (stop := self._stopping.reach(step)) is None:
                self._changed.wait()
            return stop

    def go_on_from(self, steps: Callable[[], Sequence[int]]) -> None:
        self._saved = steps

    # How processes begin and end together.

    def compare(self, facts: Mapping[str, str]) -> None:
        """Waits for all. Raises TogetherError on each where the facts are not the same on all."""
        with self._changed:
            self._compared = []
            self._say("facts", facts=dict(facts))
            while not self._compared:
                self._changed.wait()
            if error := self._compared[0]:
                self._close()
                raise TogetherError(error)

    def finish(self) -> None:
        """Returns when all have come here; from then on nobody is missed."""
        raise NotImplementedError

    def part(self, status: int, sentence: str) -> bool:
        """Tells the others why this process fails. Returns whether it shall print that itself."""
        raise NotImplementedError

    # What the watchdog calls.

    def _say(self, kind: str, **content: Any) -> None:
        """To process 0."""
        raise NotImplementedError

    def _lost(self, process: int) -> None:
        raise NotImplementedError

    def _tick(self, now: float) -> None:
        raise NotImplementedError

    def _hear(self, process: int, message: dict) -> None:
        with self._changed:
            self._pulse.heard(process, None, time.monotonic())
            act = getattr(self, f"_on_{message.pop('kind')}", None)
            if act is not None:
                act(process, **message)
                self._changed.notify_all()

    def _on_beat(self, process: int, **beat: Any) -> None:
        self._pulse.heard(process, Beat(**beat), time.monotonic())

    def _on_propose(self, process: int, round: int, step: int) -> None:
        accepted = self._stopping.propose(step)
        self._say("answer", round=round, passed=None if accepted else self._stopping.passed)

    def _on_commit(self, process: int, step: int) -> None:
        self._stopping.settle(step)

    def _on_compared(self, process: int, error: str) -> None:
        self._compared, self._quiet = [error], self._quiet or bool(error)

    def _beat(self) -> Beat:
        means = [sum(column) / len(self._steps) for column in zip(*self._steps, strict=True)]
        return Beat(self._mark, self._phase, self._step, *means)

    def _close(self) -> None:
        self._quiet = True
        self._watchdog.close()

    def _leave(self, status: int, sentence: str) -> None:
        self._quiet = True
        self._end(status, sentence)

    def _why(self, process: int, what: str) -> str:
        """Who is lost and when, and from where the run could go on."""
        beat, step = self._pulse.beat(process), max(self._pulse.furthest(), self._step)
        when = f"after step {step}" if step else f"while {beat.phase}"
        return f"{self.names[process]} {what} {when}; {self._advice(what)}"

    def _advice(self, what: str) -> str:
        again = "start again with the same command"
        # One that hangs keeps its port and its lock.
        again = again if what == "died" else f"end it there, then {again}"
        found: list[Sequence[int]] = []
        # The file system may be what hangs.
        look = threading.Thread(target=self._look, args=(found,), daemon=True)
        look.start()
        look.join(LOOKING)
        if not found:
            return again
        (steps,) = found
        return f"{again} to go on from step {steps[-1]}" if steps else f"{again} to begin anew"

    def _look(self, found: list) -> None:
        with contextlib.suppress(OSError):  # Then nothing is said of it.
            if self._saved is not None:
                found.append(self._saved())


def end(status: int) -> None:
    """Ends this process at once, with those that build its data, and nothing else is tidied up."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


def _leave(before: str, status: int, sentence: str) -> None:
    """Says it and ends, whatever the main thread does; logs were flushed line by line."""
    # Writing to a terminal that is held never returns.
    timer = threading.Timer(BLOCKED, os._exit, [status])
    timer.daemon = True
    timer.start()
    os.write(2, f"{before}train: {sentence}\n".encode())
    end(status)
