"""Any process of several but the first: it is connected with process 0, and judges it alone."""

import contextlib
import time
from collections.abc import Sequence
from typing import Any

from training.hosts import GRACE, LOST, Hosts
from training.wire import Wire

WORD = 5.0  # seconds that a process which failed waits for what process 0 has to say


class Follower(Hosts):
    """wire: to process 0.  options: as for Hosts."""

    def __init__(self, index: int, names: Sequence[str], wire: Wire, **options: Any):
        super().__init__(index, names, {0: wire}, [0], **options)
        self._wire = wire
        self._parting = False
        self._word: list[str | None] = []  # with which sentence the run ends; None for no word
        self._verdict: tuple[float, int, str] | None = None  # to leave with, and from when on

    def times(self) -> dict[str, float]:
        with self._changed:
            self._say("beat", **vars(self._beat()))
        return {}

    def finish(self) -> None:
        self.at("ending")
        with self._changed:
            self._say("beat", **vars(self._beat()))
            self._say("finished")
            while not self._quiet:
                self._changed.wait()

    def part(self, status: int, sentence: str) -> bool:
        with self._changed:
            self._parting = True
            self._say("ended", status=status, sentence=sentence)
            self._changed.wait_for(lambda: self._word, WORD)
            self._close()
            return sentence not in self._word

    def _say(self, kind: str, **content: Any) -> None:
        with contextlib.suppress(OSError):  # Its end is seen where it is read.
            self._wire.send(kind, **content)

    def _lost(self, process: int) -> None:
        with self._changed:
            self._word.append(None)
            self._changed.notify_all()
            if not (self._parting or self._quiet or self._verdict):
                self._leave(LOST, self._why(process, "died"))

    def _tick(self, now: float) -> None:
        with self._changed:
            self._say("beat", **vars(self._beat()))
            if self._quiet or self._parting:
                return
            if self._verdict and now > self._verdict[0]:
                self._leave(*self._verdict[1:])
            elif stalled := self._pulse.stalled(now):
                text = self._why(*stalled)
                self._say("ended", status=LOST, sentence=text)  # in case it wakes up
                self._leave(LOST, text)

    def _on_verdict(self, process: int, status: int, text: str, said: str | None, by: int) -> None:
        self._word.append(None if by == self.index else said)
        if said is not None:  # This process may be about to fail in the same way.
            self._verdict = time.monotonic() + GRACE, status, text
        elif not (self._parting or self._quiet):
            self._leave(status, text)

    def _on_bye(self, process: int) -> None:
        self._close()
