"""A local port that leads to another one and outlives it: `python tunnel.py HOST PORT`.

JAX's coordination client ends its process by a C++ abort with a stack trace as soon as its
connection to process 0 is cut, which nothing in Python can prevent or outrun. Through this tunnel
it never sees that end: the far side may go, the near side stays open for as long as the process
does, and training/hosts.py, which sees the same end elsewhere, says in a sentence what happened.

A process of its own, because JAX may hold the interpreter's lock while it waits for an answer.
It prints its port and ends when its standard input does.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

PATIENCE = 60.0  # seconds until the far side must have begun to listen
CHUNK = 1 << 16


_started: list[subprocess.Popen] = []  # their standard inputs must stay open


def start(host: str, port: int) -> str:
    """An address on this machine that leads there; it ends with this process. Raises OSError."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, host, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the run.
    )
    line = process.stdout.readline()
    if not line:
        raise OSError(f"the tunnel to {host}:{port} could not be opened")
    _started.append(process)
    return f"127.0.0.1:{int(line)}"


def _join(near: socket.socket, host: str, port: int) -> None:
    """Copies both ways; the near side is closed only by its own end."""
    far = _reach(host, port)
    if far is None:
        _drain(near)
        return
    threading.Thread(target=_copy, args=(far, near), daemon=True).start()
    _copy(near, far)
    _drain(near)
    # Closing alone would not wake the other thread, nor tell the far side.
    with contextlib.suppress(OSError):
        far.shutdown(socket.SHUT_RDWR)
    far.close()
    near.close()


def _reach(host: str, port: int) -> socket.socket | None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            far = socket.create_connection((host, port), timeout=10.0)
        except OSError:
            time.sleep(0.1)
            continue
        far.settimeout(None)
        # Firewalls forget connections that are silent, as JAX's are for most of a run.
        far.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return far
    return None


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            sink.sendall(data)


def _drain(source: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while source.recv(CHUNK):
            pass


def _serve(host: str, port: int) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    while True:
        near, _ = listening.accept()
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_join, args=(near, host, port), daemon=True).start()


def main() -> None:
    # The run decides when it ends; a signal to all processes of a job must not cut it off.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_serve, args=(sys.argv[1], int(sys.argv[2])), daemon=True).start()
    while os.read(0, CHUNK):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
