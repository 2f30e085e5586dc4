"""The roll as process 0 keeps it: who has come, whether all fit, and what is told to them."""

import contextlib
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path

from launch.port import listen
from training.leader import differing
from training.wire import NotMeshworkError, Wire

FORMAT = 1  # of the messages
SECONDS = 120.0  # to wait for all
PAUSE = 0.2
HELLO = 5.0  # seconds for the first word of whoever comes
LOOKING = 20.0  # until a file written by one host is seen by another: NFS keeps old listings
LATE = 5.0  # that a failure waits for those who have yet to come and hear it
# What must be the same everywhere, in the order in which it is compared, and what helps.
FIXES = {
    "versions": "install the same on every host",
    "platforms": "set JAX_PLATFORMS, or find out why a host lacks what the others have",
    "sources": "give every host the same sources",
    "config": "start every host with the same command",
}


class RollCallError(ValueError):
    """The processes cannot run together; one sentence, the same for all that could be told."""


class Roll:
    """hello: of process 0 itself.  note(text) -> whether it was passed on.

    Raises PortError and RollCallError, which every process that comes is told.
    """

    def __init__(self, host: str, port: int, count: int, hello: dict, note: Callable[[str], bool]):
        self._host, self._port, self._count, self._note = host, port, count, note
        self._hellos, self._wires = {0: hello}, {}

    def call(self, workdir: Path, seconds: float) -> tuple[list[str], dict[int, Wire]]:
        """The names of all and the connections with the others, once all fit."""
        with listen(self._host, self._port) as listening:
            listening.settimeout(PAUSE)
            try:
                self._gather(listening, seconds)
                self._compare()
                self._look(workdir)
            except (ValueError, OSError) as error:
                self._refuse(str(error), listening)
                raise
        self._tell("go", names=self._names())
        return self._names(), self._wires

    def _gather(self, listening: socket.socket, seconds: float) -> None:
        until = time.monotonic() + seconds
        while missing := [i for i in range(self._count) if i not in self._hellos]:
            listed = f"host{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            place = f"{self._host}:{self._port}"
            if self._note(f"waiting for {listed} of {self._count} at {place}"):
                self._tell("note", text=f"waiting for {listed} of {self._count}")
            if time.monotonic() > until:
                raise RollCallError(
                    f"{listed} of {self._count} did not come to {place} in {seconds:.0f} seconds; "
                    f"start it there with the same command and --process={missing[0]}, or let all "
                    "wait longer with --roll_call_seconds"
                )
            with contextlib.suppress(TimeoutError):
                self._meet(Wire(listening.accept()[0]))
            for index, wire in self._wires.items():
                if wire.ended():
                    raise RollCallError(f"{self._name(index)} has left the roll call")

    def _meet(self, wire: Wire) -> None:
        send(wire, "meshwork", format=FORMAT)
        try:
            hello = wire.receive(HELLO)
        except (NotMeshworkError, TimeoutError):
            hello = None
        if hello is None or hello["kind"] != "hello":  # Somebody who tries ports.
            wire.close()
        elif error := self._misfit(hello):
            send(wire, "refused", error=error)
            wire.end(time.monotonic() + HELLO)
            wire.close()
            raise RollCallError(error)
        else:
            self._hellos[hello["index"]], self._wires[hello["index"]] = hello, wire

    def _misfit(self, hello: dict) -> str | None:
        own, index, who = self._hellos[0], hello["index"], name(hello)
        if hello["format"] != own["format"]:
            return f"{who} and {name(own)} run different versions; install the same on every host"
        if hello["count"] != own["count"]:
            return (
                f"{who} was started with --processes={hello['count']} and {name(own)} with "
                f"--processes={own['count']}; give all the same"
            )
        if index in self._hellos:
            return f"{self._name(index)} is here twice ({who}); give each its own --process"
        return None

    def _compare(self) -> None:
        for section, fix in FIXES.items():
            facts = {i: hello["facts"].get(section, {}) for i, hello in self._hellos.items()}
            if error := differing(facts, self._names(), fix):
                raise RollCallError(error)

    def _look(self, workdir: Path) -> None:
        """Writes a file that all the others must see."""
        workdir.mkdir(parents=True, exist_ok=True)
        file = workdir / f".rollcall-{secrets.token_hex(8)}"
        file.touch()
        try:
            self._tell("look", file=file.name)
            for index, wire in self._wires.items():
                if not next_word(wire, LOOKING + HELLO, self._name(index)).get("found"):
                    raise RollCallError(
                        f"{self._name(index)} does not see in {self._hellos[index]['workdir']} "
                        f"what {self._name(0)} writes to {self._hellos[0]['workdir']}; give all "
                        "hosts one --workdir on a file system that they share"
                    )
        finally:
            file.unlink(missing_ok=True)

    def _refuse(self, error: str, listening: socket.socket) -> None:
        self._tell("refused", error=error)
        came, until = len(self._hellos), time.monotonic() + LATE
        while came < self._count and time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                wire = Wire(listening.accept()[0])
                send(wire, "meshwork", format=FORMAT)
                send(wire, "refused", error=error)
                wire.end(time.monotonic() + HELLO)
                wire.close()
                came += 1
        for wire in self._wires.values():
            wire.end(time.monotonic() + PAUSE)
            wire.close()

    def _tell(self, kind: str, **content) -> None:
        for wire in self._wires.values():
            send(wire, kind, **content)

    def _name(self, index: int) -> str:
        return name(self._hellos[index])

    def _names(self) -> list[str]:
        return [self._name(index) for index in sorted(self._hellos)]


def name(hello: dict) -> str:
    return f"host {hello['index']} ({hello['host']}, process {hello['pid']})"


def send(wire: Wire, kind: str, **content) -> None:
    with contextlib.suppress(OSError):  # Its end shows where it is read.
        wire.send(kind, **content)


def next_word(wire: Wire, seconds: float, who: str) -> dict:
    """The next message. Raises RollCallError where there is none."""
    try:
        message = wire.receive(seconds)
    except TimeoutError:
        raise RollCallError(f"{who} said nothing for {seconds:.0f} seconds") from None
    if message is None:
        raise RollCallError(f"{who} has left the roll call")
    return message
