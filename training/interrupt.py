"""Signals turned into a flag, so that a run ends between two steps with its state saved."""

import signal
import threading


class Interrupt:
    """Context manager: SIGTERM and the first SIGINT only set `requested`.

    A second SIGINT raises KeyboardInterrupt, for a run that hangs. The old handlers come back on
    exit. Python delivers signals to the main thread only, so elsewhere nothing is installed and
    `requested` stays False.
    """

    def __init__(self):
        self.requested = False
        self._interrupts = 0
        self._old = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._old.items():
            # None: installed by something other than Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old = {}

    def _handle(self, number, frame) -> None:
        self.requested = True
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
