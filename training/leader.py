"""Process 0 of several: it hears all the others, judges who is missing, and tells them."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from training.hosts import GRACE, LOST, Hosts
from training.stopping import Proposal, Proposals
from training.wire import Wire

NOTES = 30.0  # seconds between two notes on who is waited for
NAMED = 3  # keys named in one sentence
FIX = "give every host the same files"


class Leader(Hosts):
    """wires: to every other process.  note(text): says who is waited for where facts are compared.

    options: as for Hosts.
    """

    def __init__(
        self,
        names: Sequence[str],
        wires: Mapping[int, Wire],
        note: Callable[[str], None] = lambda text: None,
        **options: Any,
    ):
        super().__init__(0, names, wires, range(len(names)), **options)
        self._note, self._noted = note, time.monotonic()
        self._proposals = Proposals(self.count)
        self._facts: dict[int, dict] = {}
        self._finished: set[int] = set()
        self._failed: dict[int, tuple[float, int, str]] = {}

    def times(self) -> dict[str, float]:
        with self._changed:
            self._pulse.heard(0, self._beat(), time.monotonic())
            beats = [self._pulse.beat(process) for process in range(self.count)]
        known = [(process, beat) for process, beat in enumerate(beats) if beat.seconds is not None]
        steps = {f"host_step_seconds/{process}": beat.seconds for process, beat in known}
        return steps | {f"host_input_seconds/{process}": beat.input for process, beat in known}

    def finish(self) -> None:
        self.at("ending")
        with self._changed:
            self._say("finished")
            while len(self._finished) < self.count:
                self._changed.wait()
            self._tell("bye")
            self._close()

    def part(self, status: int, sentence: str) -> bool:
        with self._changed:
            if not self._quiet:
                self._last_words(0, status, f"{self.names[0]} ended: {sentence}", sentence)
            self._close()
        return True

    def _say(self, kind: str, **content: Any) -> None:
        getattr(self, f"_on_{kind}")(0, **content)
        self._changed.notify_all()

    def _tell(self, kind: str, **content: Any) -> None:
        for wire in self._wires.values():
            with contextlib.suppress(OSError):  # Its end is seen where it is read.
                wire.send(kind, **content)

    def _last_words(self, by: int, status: int, text: str, said: str | None = None) -> None:
        """by: the process that is lost, or that failed with the sentence `said`."""
        self._quiet = True
        self._tell("verdict", status=status, text=text, said=said, by=by)
        self._part_from_all()

    def _part_from_all(self) -> None:
        until = time.monotonic() + GRACE
        for wire in self._wires.values():
            wire.end(until)

    def _condemn(self, process: int, what: str) -> None:
        text = self._why(process, what)
        self._last_words(process, LOST, text)
        self._leave(LOST, text)

    # What the watchdog calls.

    def _lost(self, process: int) -> None:
        with self._changed:
            missed = process not in self._finished and process not in self._failed
            if missed and not self._quiet:
                self._condemn(process, "died")

    def _tick(self, now: float) -> None:
        with self._changed:
            self._tell("beat", **vars(self._beat()))
            self._pulse.heard(0, self._beat(), now)
            if self._quiet:
                return
            self._tell_of_waiting(now)
            if self._failed and now > min(self._failed.values())[0]:
                self._repeat_failure()
            elif stalled := self._pulse.stalled(now):
                self._condemn(*stalled)

    def _repeat_failure(self) -> None:
        process, (_, status, sentence) = min(self._failed.items(), key=lambda item: item[1])
        text = f"{self.names[process]} ended: {sentence}"
        self._last_words(process, status, text, sentence)
        self._leave(status, text)

    def _tell_of_waiting(self, now: float) -> None:
        if 0 in self._facts and now > self._noted + NOTES:
            self._noted = now
            missing = [self.names[p] for p in range(self.count) if p not in self._facts]
            self._note(f"waiting for {', '.join(missing)} to read the corpus")

    def _on_want(self, process: int, passed: int) -> None:
        self._propose(self._proposals.wanted(max(self._stopping.passed, passed)))

    def _on_answer(self, process: int, round: int, passed: int | None) -> None:
        if passed is not None:
            self._propose(self._proposals.refused(round, passed))
        elif (step := self._proposals.accepted(round, process)) is not None:
            self._tell("commit", step=step)
            self._on_commit(0, step)

    def _propose(self, proposal: Proposal | None) -> None:
        if proposal is not None:
            self._tell("propose", **vars(proposal))
            self._on_propose(0, **vars(proposal))

    def _on_facts(self, process: int, facts: dict) -> None:
        self._facts[process] = facts
        if len(self._facts) == self.count:
            error = differing(self._facts, self.names)
            self._facts = {}
            self._tell("compared", error=error)
            self._on_compared(0, error)
            if error:
                self._quiet = True
                self._part_from_all()

    def _on_finished(self, process: int) -> None:
        self._finished.add(process)
        self._pulse.ended(process)

    def _on_ended(self, process: int, status: int, sentence: str) -> None:
        self._failed[process] = time.monotonic() + GRACE, status, sentence
        self._pulse.ended(process)


def differing(facts: Mapping[int, Mapping], names: Sequence[str], fix: str = FIX) -> str:
    """A sentence on one process and up to three facts that are not those of process 0; or ''.

    facts: {key: value} by process.  fix: what helps.
    """
    for process in sorted(facts):
        first, other = facts[0], facts[process]
        keys = [key for key in first | other if first.get(key) != other.get(key)]
        if keys:
            spell = lambda key, own: repr(own[key]) if key in own else "absent"
            told = [f"{key} ({spell(key, first)} and {spell(key, other)})" for key in keys[:NAMED]]
            more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
            return f"{names[0]} and {names[process]} differ in {', '.join(told)}{more}; {fix}"
    return ""
