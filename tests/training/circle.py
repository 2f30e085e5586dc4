"""Processes of a run as threads of one, connected by real sockets."""

import contextlib
import socket
import threading

from training.follower import Follower
from training.leader import Leader
from training.liveness import Limits
from training.wire import Wire

SOON = 20.0  # seconds within which a loaded machine does what takes a moment


class Circle:
    """`hosts`, of which `left` says with what their watchdogs have ended them.

    started: whose watchdogs run, all if None.
    """

    def __init__(self, count, limits=None, started=None):
        self.names = [f"host {i} (node{i}, process {40 + i})" for i in range(count)]
        pairs = [connected() for _ in range(1, count)]
        self.left, self.changed = {}, threading.Condition()
        self.sockets = {0: [mine for mine, _ in pairs]}
        self.sockets |= {i: [its] for i, (_, its) in enumerate(pairs, 1)}
        options = lambda i: dict(limits=limits or Limits(), leave=lambda *how: self._leave(i, how))
        wires = {i: Wire(mine) for i, (mine, _) in enumerate(pairs, 1)}
        self.hosts = [Leader(self.names, wires, **options(0))]
        for i, (_, its) in enumerate(pairs, 1):
            self.hosts.append(Follower(i, self.names, Wire(its), **options(i)))
        for i in range(count) if started is None else started:
            self.hosts[i].start()

    def _leave(self, index, how):
        with self.changed:
            self.left[index] = how
            self.changed.notify_all()
        self.end(index)

    def kill(self, index):
        """It is gone, and its watchdog with it."""
        with self.hosts[index]._changed:
            self.hosts[index]._close()
        self.end(index)

    def end(self, index):
        """What the system does with its connections."""
        for its in self.sockets[index]:
            with contextlib.suppress(OSError):  # Its peer may have gone first.
                its.shutdown(socket.SHUT_RDWR)

    def wait(self, *indices):
        """How these were ended, once they were."""
        with self.changed:
            assert self.changed.wait_for(lambda: set(indices) <= set(self.left), SOON), self.left
        return [self.left[index] for index in indices]


def connected():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname())
        return listening.accept()[0], one


def together(*acts, seconds=SOON):
    """What they return, or the errors that they raise, when called at once."""
    results = [None] * len(acts)

    def call(i):
        try:
            results[i] = acts[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive()
    return results
