"""Before JAX is started on several processes: all are there, and all are about to run the same.

Process 0 listens at the coordinator's port until every other process has come and said who it is
and what it would run (launch/roll.py). What does not fit is told to all of them in one sentence.
The connections stay for the whole run (training/hosts.py), and the port is free again for JAX.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from launch.port import PortError, connect
from launch.roll import FORMAT, LATE, LOOKING, SECONDS, Roll, RollCallError, next_word
from training.follower import Follower
from training.hosts import Hosts
from training.leader import Leader
from training.wire import NotMeshworkError, Wire

NOTES = 10.0  # seconds between two notes on who is missing
BANNER = 10.0  # seconds until whoever answers at the port has shown that it is Meshwork
GLANCE = 0.2  # seconds between two looks for a file


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands: number `index` of `count`, which meet at host:port.

    devices: the local ones that it shall use, all if None.  seconds: to wait for the others.
    """

    host: str
    port: int
    count: int
    index: int
    devices: tuple[int, ...] | None = None
    seconds: float = SECONDS


def call(
    place: Place,
    facts: Mapping[str, Mapping],
    workdir: Path,
    note: Callable[[str], None] = lambda text: print(f"train: {text}", file=sys.stderr),
    **options,
) -> Hosts:
    """Meets the other processes; starts the watchdog. options: as for training.hosts.Hosts.

    facts: {section of launch.roll.FIXES: {key: JSON}}, which must be the same on every host.
    workdir: the run's folder, which all must see.  note(text): tells who is missing.

    Raises PortError and RollCallError.
    """
    hello = {
        "format": FORMAT,
        "index": place.index,
        "count": place.count,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "workdir": str(workdir.absolute()),
        "facts": json.loads(json.dumps(facts)),
    }
    slowly = _Slowly(note)
    if place.index == 0:
        names, wires = Roll(place.host, place.port, place.count, hello, slowly).call(
            workdir, place.seconds
        )
        hosts = Leader(names, wires, note, **options)
    else:
        names, wire = _answer(place, hello, workdir, slowly)
        hosts = Follower(place.index, names, wire, **options)
    hosts.start()
    return hosts


class _Slowly:
    """Passes on a note now and then, the first one after a while; whether it did."""

    def __init__(self, note: Callable[[str], None]):
        self._note, self._began = note, time.monotonic()
        self._last = self._began

    def __call__(self, text: str) -> bool:
        now = time.monotonic()
        if due := now > self._last + NOTES:
            self._last = now
            self._note(f"{text} ({now - self._began:.0f} seconds)")
        return due


def _answer(place: Place, hello: dict, workdir: Path, note: _Slowly) -> tuple[list[str], Wire]:
    """The names of all and the connection with process 0."""
    wire = _reach(place, note)
    try:
        return _hear(wire, place, hello, workdir, note), wire
    except BaseException:
        wire.close()
        raise


def _hear(wire: Wire, place: Place, hello: dict, workdir: Path, note: _Slowly) -> list[str]:
    with contextlib.suppress(OSError):  # What it said before it left is read below.
        wire.send("hello", **hello)
    # Process 0 has its own deadline, and tells when it is over.
    patience = place.seconds + LOOKING + LATE + BANNER
    while True:
        word = next_word(wire, patience, f"process 0 at {place.host}:{place.port}")
        match word["kind"]:
            case "note":
                note(word["text"])
            case "refused":
                raise RollCallError(word["error"])
            case "look":
                wire.send("seen", found=_sees(workdir / word["file"]))
            case "go":
                return word["names"]


def _reach(place: Place, note: _Slowly) -> Wire:
    """A connection on which process 0 has shown itself; an earlier run may be about to leave."""
    until, strange = time.monotonic() + place.seconds, None
    while True:
        left = max(until - time.monotonic(), 0.0)
        wire = Wire(connect(place.host, place.port, left, place.seconds, note))
        try:
            word = wire.receive(BANNER)
            said = "it ended the connection" if word is None else ""
        except NotMeshworkError as error:
            word, said = None, str(error)
        except TimeoutError:
            word, said = None, "it says nothing"
        if word is not None and word["kind"] == "meshwork":
            return wire
        wire.close()
        strange = strange or time.monotonic()
        if time.monotonic() > strange + BANNER:
            raise PortError(
                f"what answers at {place.host}:{place.port} is not the roll call of a run that "
                f"begins ({said}); end it, or choose another port in --coordinator"
            )
        time.sleep(GLANCE)


def _sees(file: Path) -> bool:
    until = time.monotonic() + LOOKING
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            # Listing makes a network file system look again; asking for a name may not.
            if file.name in os.listdir(file.parent):
                return True
        time.sleep(GLANCE)
    return False
