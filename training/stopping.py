"""How processes agree on the step to stop at, over messages that may take any time.

Two phases. A process that is asked to stop says so; process 0 proposes a step to all. A process
that has not passed that step accepts, and from then on waits at its end until the proposal is
either committed or followed by a later one. One that has passed it refuses with the step it has
passed, and process 0 proposes a later one. A step that all have accepted is committed. Nothing is
computed on the devices for this, and nobody waits before the proposed step, so that steps whose
collectives need every process go on until then.

Both classes are plain state without threads: the caller holds a lock.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Number `round` of the proposals to stop at the end of `step`."""

    round: int
    step: int


class Proposals:
    """Of process 0, which is also one of those it asks."""

    def __init__(self, processes: int):
        self._processes = processes
        self._now: Proposal | None = None
        self._accepted: set[int] = set()
        self._margin = 1
        self.settled: int | None = None

    def wanted(self, passed: int) -> Proposal | None:
        """Somebody wants to stop. passed: the last step that any process is known to have passed.

        Returns a proposal for all; None if there was one already.
        """
        return None if self._now else self._propose(1, passed + 1)

    def accepted(self, round: int, process: int) -> int | None:
        """The step to commit, once all have accepted it."""
        if self._current(round):
            self._accepted.add(process)
            if len(self._accepted) == self._processes:
                self.settled = self._now.step
                return self.settled
        return None

    def refused(self, round: int, passed: int) -> Proposal | None:
        """The next proposal. Its distance doubles, so that a fast run is caught up with."""
        if not self._current(round):
            return None
        self._margin *= 2
        return self._propose(round + 1, passed + self._margin)

    def _current(self, round: int) -> bool:
        return self._now is not None and self._now.round == round and self.settled is None

    def _propose(self, round: int, step: int) -> Proposal:
        self._now, self._accepted = Proposal(round, step), set()
        return self._now


class Stopping:
    """Of every process. passed: the last step behind which it can no longer stop."""

    def __init__(self, passed: int = 0):
        self.passed = passed
        self._asked = False
        self._held: int | None = None  # the step accepted last
        self._settled: int | None = None

    def asks(self, step: int, wanted: bool) -> bool:
        """At the end of a step: whether process 0 has to be told that a stop is wanted."""
        self.passed = max(self.passed, step - 1)
        first, self._asked = wanted and not self._asked, self._asked or wanted
        return first and self._held is None

    def propose(self, step: int) -> bool:
        """Whether this process accepts."""
        if step <= self.passed:
            self._held = None
            return False
        self._held = step
        return True

    def settle(self, step: int) -> None:
        self._settled = step

    def reach(self, step: int) -> bool | None:
        """At the end of a step: True to stop there, False to go on, None to wait for a message."""
        if self._settled is not None:
            return self._settled == step or self._go_on(step)
        if self._held == step or (self._held is None and self._asked):
            return None
        return self._go_on(step)

    def _go_on(self, step: int) -> bool:
        self.passed = step
        return False
