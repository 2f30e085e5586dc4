"""JSON messages between the processes of a run, one a line on a TCP connection."""

import contextlib
import json
import select
import socket
import threading
import time

LONGEST = 1 << 24  # bytes in one message: a configuration has a few thousand
SENDING = 10.0  # seconds until a peer that takes nothing in is given up
CHUNK = 1 << 16


class NotMeshworkError(ValueError):
    """What has arrived is not a line of JSON that Meshwork would send."""


class Wire:
    """Any thread may send; one thread at a time receives."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(SENDING)
        # Messages are small and wait for their answers.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection, self._rest, self._lock = connection, b"", threading.Lock()
        self._arrived: list[dict] = []

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, kind: str, **content) -> None:
        """Raises OSError if the peer is gone or takes nothing in."""
        line = json.dumps({"kind": kind, **content}).encode() + b"\n"
        with self._lock:
            self._connection.sendall(line)

    def arrived(self) -> list[dict] | None:
        """The messages that one read completes; None at the end of the connection.

        Call it when there is something to read. Raises NotMeshworkError.
        """
        try:
            data = self._connection.recv(CHUNK)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST:
            raise NotMeshworkError("a line has no end")
        left, self._arrived = self._arrived, []
        return left + [_read(line) for line in lines]

    def receive(self, seconds: float) -> dict | None:
        """The next message; None at the end of the connection.

        Raises TimeoutError after that many seconds, and NotMeshworkError.
        """
        until = time.monotonic() + seconds
        while not self._arrived:
            self._connection.settimeout(max(until - time.monotonic(), 1e-3))
            try:
                found = self.arrived()
            finally:
                self._connection.settimeout(SENDING)
            if found is None:
                return None
            self._arrived += found
            if not found and time.monotonic() > until:
                raise TimeoutError
        return self._arrived.pop(0)

    def ended(self) -> bool:
        """Whether the peer has ended the connection; reads nothing."""
        try:
            readable, _, _ = select.select([self._connection], [], [], 0)
            return bool(readable) and not self._connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def end(self, until: float) -> None:
        """Sends no more, and waits for the peer's end, at most until that time (monotonic).

        What was sent still arrives: a connection closed with something unread would be reset.
        """
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
            while (left := until - time.monotonic()) > 0:
                self._connection.settimeout(left)
                if not self._connection.recv(CHUNK):
                    return

    def close(self) -> None:
        self._connection.close()


def _read(line: bytes) -> dict:
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise NotMeshworkError(f"it said {line[:40]!r}")
    return message
