"""The thread that listens to the other processes while the main thread computes."""

import os
import selectors
import threading
import time
import traceback
from collections.abc import Callable, Mapping

from training.liveness import BEAT
from training.wire import NotMeshworkError, Wire

BROKEN = 70  # exit status of a process whose watchdog has a defect (EX_SOFTWARE)


class Watchdog(threading.Thread):
    """hear(process, message) for each message, lost(process) once where a connection has ended,
    and tick(now) about once a second, after all messages that had arrived. Ends after `close`."""

    def __init__(
        self,
        wires: Mapping[int, Wire],
        hear: Callable[[int, dict], None],
        lost: Callable[[int], None],
        tick: Callable[[float], None],
    ):
        super().__init__(name="watchdog", daemon=True)
        self._wires, self._hear, self._lost, self._tick = wires, hear, lost, tick
        self._closed = False

    def close(self) -> None:
        self._closed = True

    def run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                for process, wire in self._wires.items():
                    selector.register(wire, selectors.EVENT_READ, process)
                self._watch(selector)
        except BaseException:
            # A run without its watchdog could hang unseen.
            traceback.print_exc()
            os._exit(BROKEN)

    def _watch(self, selector: selectors.BaseSelector) -> None:
        due = time.monotonic()
        while not self._closed:
            for key, _ in selector.select(max(0.0, due - time.monotonic())):
                if not self._read(key.data, key.fileobj):
                    selector.unregister(key.fileobj)
            now = time.monotonic()
            # After a pause of this process all that has arrived meanwhile is read first.
            if now >= due and not (now > due + BEAT and selector.select(0)):
                self._tick(now)
                due = now + BEAT
        for wire in self._wires.values():
            wire.close()

    def _read(self, process: int, wire: Wire) -> bool:
        try:
            messages = wire.arrived()
        except NotMeshworkError:
            messages = None
        for message in messages or ():
            self._hear(process, message)
        if messages is None and not self._closed:
            self._lost(process)
        return messages is not None
