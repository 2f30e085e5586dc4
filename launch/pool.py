"""Runs of a study worked off several at a time, with one progress bar for all of them."""

import pathlib
import sys
import time
from collections.abc import Sequence

from analysis.records import read
from launch.children import Child, shares
from launch.study import Planned, Study, finished
from training.interrupt import Interrupt
from training.progress import bar

SECONDS = 0.1  # between two looks at the processes
SHOWN = 4  # running ones that the bar names


class Pool:
    """Runs at most `parallel` at a time.

    held: a descriptor that every run keeps open as long as it lives.  failed: {name: sentence} and
    interrupted: whether a signal ended it, both after `work`.
    """

    def __init__(self, study: Study, workdir: pathlib.Path, parallel: int, held: int):
        self._study, self._workdir, self._held = study, workdir, held
        self._free = shares(parallel)
        self._running: dict[str, tuple[Planned, Child]] = {}
        self._next = 0.0  # when the bar is next drawn
        self._ended: set[str | None] = {None}  # what runs may go on from; None is nothing
        self.failed: dict[str, str] = {}
        self.interrupted = False

    def work(self, waiting: Sequence[Planned], total: int) -> None:
        """Starts every run and waits until the last one has ended.  total: with those done before.

        SIGTERM and the first Ctrl-C are passed on: runs save and end, and no other begins. A second
        Ctrl-C kills them. Raises UsageError where a finished run lacks the metric; others save.
        """
        waiting = list(waiting)
        parents = {run.after for run in waiting}
        known = (run for run in self._study.runs if run.name in parents)
        self._ended |= {run.name for run in known if finished(self._study, run, self._workdir)}
        shown = bar(total=total, initial=total - len(waiting), unit="run")
        with Interrupt() as interrupt, shown:
            try:
                while self._running or (waiting and not self.interrupted):
                    if interrupt.requested and not self.interrupted:
                        self.interrupted = True
                        self._terminate()
                    while waiting and self._free and not self.interrupted:
                        able = (run for run in waiting if run.after in self._ended)
                        ready = next(able, None)
                        if ready is None:
                            break
                        waiting.remove(ready)
                        self._start(ready)
                    if waiting and not self._running and not self.interrupted:
                        self._give_up(waiting)
                        break
                    self._collect(shown)
                    self._tell(shown)
                    time.sleep(SECONDS)
            except Exception:
                self._terminate()
                raise
            except BaseException:
                self._kill()
                raise

    def _give_up(self, waiting: Sequence[Planned]) -> None:
        for run in waiting:
            self.failed[run.name] = said = f"{run.after}, from which it goes on, has not ended"
            print(f"{run.name} did not begin: {said}", file=sys.stderr)

    def _start(self, run: Planned) -> None:
        arguments = self._study.arguments(run, self._workdir)
        folder, cores = self._workdir / run.name, self._free.pop(0)
        self._running[run.name] = run, Child(arguments, folder, cores, [self._held])

    def _collect(self, shown) -> None:
        """Says how each run ended that has, and gives its cores back."""
        for name, (run, child) in list(self._running.items()):
            status = child.poll()
            if status is None:
                continue
            del self._running[name]
            self._free.insert(0, child.cores)
            if finished(self._study, run, self._workdir):
                self._ended.add(name)
                shown.update()
                shown.write(self._line(run), file=sys.stdout)
            elif not self.interrupted:
                said = child.complaint() if status else "it was told to stop before its last step"
                self.failed[name] = said
                shown.write(f"{name} failed: {said}; all it said is in {child.folder}/log.txt",
                            file=sys.stderr)  # fmt: skip

    def _line(self, run: Planned) -> str:
        record, metric = read(self._workdir / run.name), self._study.rule.metric
        return f"{run.name}  {metric} {record.last[metric]:.4f}  {record.seconds:.0f} s"

    def _tell(self, shown) -> None:
        """Names of those that run, with their steps; a log file gets them now and then."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + max(1.0, shown.mininterval)
        told = [f"{name} {child.step}/{run.steps}" for name, (run, child) in self._running.items()]
        more = len(told) - SHOWN
        shown.set_postfix_str(", ".join(told[:SHOWN]) + (f" and {more} more" if more > 0 else ""))

    def _terminate(self) -> None:
        for _, child in self._running.values():
            child.terminate()

    def _kill(self) -> None:
        for _, child in self._running.values():
            child.kill()
