"""The near side of a tunnel outlives the far one, and the tunnel does not outlive its process."""

import socket
import subprocess
import sys
import time

import pytest

from launch import tunnel
from launch.port import split

SOON = 20.0


@pytest.fixture
def far():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(SOON)
        yield listening


@pytest.fixture
def opened(far):
    """(the tunnel's process, its address)."""
    address = tunnel.start(*far.getsockname())
    process = tunnel._started.pop()
    yield process, split(address)
    process.stdin.close()
    process.stdout.close()
    assert process.wait(SOON) == 0


def through(far, opened):
    near = socket.create_connection(opened[1], timeout=SOON)
    return near, far.accept()[0]


def test_both_ways(far, opened):
    near, served = through(far, opened)
    with near, served:
        sent = b"x" * 3_000_000
        served.settimeout(SOON)
        near.sendall(sent[:9])
        assert served.recv(100) == sent[:9]
        served.sendall(sent)
        got = 0
        while got < len(sent):
            got += len(near.recv(1 << 20))
        near.close()
        assert served.recv(1) == b""


def test_the_near_side_stays_open(far, opened):
    near, served = through(far, opened)
    with near:
        served.close()
        far.close()
        near.settimeout(0.5)
        for _ in range(3):  # The first one is answered with a reset.
            near.sendall(b"are you there?")
            with pytest.raises(TimeoutError):
                near.recv(1)
        with socket.create_connection(opened[1], timeout=0.5) as again, pytest.raises(TimeoutError):
            again.recv(1)


def test_it_ends_with_its_process(far):
    """Although it is killed, and signals to both are for the run alone."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from launch import tunnel;"
        "print(tunnel.start('127.0.0.1', int(sys.argv[2])), flush=True); time.sleep(60)"
    )
    root, port = tunnel.__file__.removesuffix("launch/tunnel.py"), far.getsockname()[1]
    owner = subprocess.Popen(
        [sys.executable, "-c", code, root, str(port)], stdout=subprocess.PIPE, text=True
    )
    address = split(owner.stdout.readline().strip())
    socket.create_connection(address, timeout=SOON).close()
    owner.kill()
    owner.communicate()
    time.sleep(0.5)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=SOON)
