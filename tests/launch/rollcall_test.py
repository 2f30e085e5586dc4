"""What stands in the way of a run on several hosts is a sentence, on each of them."""

import contextlib
import dataclasses
import functools
import os
import socket
import threading
import time

import pytest

from launch import port, roll, rollcall
from launch.port import PortError
from launch.roll import FIXES, RollCallError
from launch.rollcall import Place
from tests.training.circle import together
from training import watchdog
from training.follower import Follower
from training.leader import Leader

SOON = 30.0  # seconds within which a loaded machine does what takes a moment
HOST, ME = "127.0.0.1", f"{socket.gethostname()}, process {os.getpid()}"
FACTS = {name: {"a": 1, "b": (1, None, "x")} for name in FIXES}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    for module, name, seconds in (
        (port, "RESOLVING", 0.2),
        (port, "LEAVING", 0.2),
        (rollcall, "BANNER", 0.5),
        (roll, "HELLO", 0.5),
        (roll, "LATE", 0.3),
        (rollcall, "LOOKING", 0.5),
        (roll, "PAUSE", 0.05),
        (watchdog, "BEAT", 0.05),
        (port, "PAUSE", 0.05),
    ):
        monkeypatch.setattr(module, name, seconds)


@pytest.fixture
def free():
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@pytest.fixture
def meet(tmp_path):
    """meet((place, options), ..): what each call gave or raised, all made at once.

    first(): called before, in the thread of that call.
    """
    hosts = []

    def call(place, facts=FACTS, workdir=tmp_path, note=lambda text: None, first=lambda: None):
        first()
        made = rollcall.call(place, facts, workdir, note, leave=lambda *how: None)
        hosts.append(made)
        return made

    yield lambda *calls: together(
        *(functools.partial(call, place, **options) for place, options in calls),
        seconds=SOON,
    )
    for host in hosts:
        with host._changed:
            host._close()
    for host in hosts:
        host._watchdog.join(SOON)


def places(port, count, *indices, seconds=20.0, host=HOST):
    indices = indices or range(count)
    return [Place(host, port, count, index, None, seconds) for index in indices]


def called(*places, **each):
    """Calls with options, {name: value} for the one at 0, 1, .."""
    return [(place, each.get(f"at{i}", {})) for i, place in enumerate(places)]


def same_sentence(results, *parts, error=RollCallError):
    assert [type(result) for result in results] == [error] * len(results), results
    (text,) = {str(result) for result in results}
    assert all(part in text for part in parts), text


def test_all_meet_and_the_port_is_free_again(free, meet, tmp_path):
    workdir = tmp_path / "new" / "run"
    found = meet(*((place, {"workdir": workdir}) for place in places(free, 3)))
    assert [type(host) for host in found] == [Leader, Follower, Follower]
    for index, host in enumerate(found):
        assert (host.index, host.count, host.leader) == (index, 3, index == 0)
        assert host.names == tuple(f"host {i} ({ME})" for i in range(3))
    assert list(workdir.iterdir()) == []
    # JAX's service listens there while these connections stay.
    with socket.create_server((HOST, free)) as service:
        socket.create_connection((HOST, free)).close()
        service.accept()[0].close()


@pytest.mark.parametrize("host", ["localhost", socket.gethostname()])
def test_names_of_this_machine(free, meet, host):
    assert [type(h) for h in meet(*called(*places(free, 2, host=host)))] == [Leader, Follower]


def test_process_0_may_come_last(free, meet):
    leader, follower = meet(*called(*places(free, 2), at0={"first": lambda: time.sleep(0.3)}))
    assert (type(leader), type(follower)) == (Leader, Follower)


@pytest.mark.parametrize("section", FIXES)
def test_what_differs_is_named_with_both_values_and_hosts(free, meet, section):
    other = FACTS | {section: {"a": 2, "b": (1, None, "x")}}
    results = meet(*called(*places(free, 3), at2={"facts": other}))
    who = f"host 0 ({ME}) and host 2 ({ME}) differ in a (1 and 2); {FIXES[section]}"
    same_sentence(results, who)


def test_a_host_that_never_comes_is_named(free, meet):
    results = meet(*called(*places(free, 4, 0, 2, seconds=0.4)))
    at = f"hosts 1, 3 of 4 did not come to {HOST}:{free} in 0 seconds; "
    same_sentence(results, at, "--process=1", "--roll_call_seconds")


def test_who_is_missing_is_noted_on_all(free, meet, monkeypatch):
    monkeypatch.setattr(rollcall, "NOTES", 0.2)
    notes = [[], []]
    here = places(free, 3, 0, 1, seconds=1.0)
    meet(*((place, {"note": own.append}) for place, own in zip(here, notes, strict=True)))
    for own in notes:
        assert any(text.startswith("waiting for host 2 of 3") for text in own), notes


@pytest.mark.parametrize(
    ("second", "parts"),
    [
        ({"count": 3}, ("was started with --processes=3 and host 0", "with --processes=2")),
        ({"index": 0}, ()),
    ],
)
def test_numbers_that_do_not_fit(free, meet, second, parts):
    first, other = places(free, 2)
    if "index" in second:  # Both would be process 0.
        first = dataclasses.replace(first, seconds=0.6)
        results = meet((first, {}), (first, {"first": lambda: time.sleep(0.3)}))
        assert sorted(str(result).partition(" ")[0] for result in results) == ["host", "port"]
        return
    same_sentence(meet((first, {}), (dataclasses.replace(other, **second), {})), *parts)


def test_a_number_given_twice_is_told_also_to_those_who_come_late(free, meet, monkeypatch):
    monkeypatch.setattr(roll, "LATE", SOON)
    first, second, late = places(free, 3)
    wait = lambda seconds: {"first": lambda: time.sleep(seconds)}
    results = meet((first, {}), (second, {}), (second, wait(0.2)), (late, wait(0.6)))
    same_sentence(results, f"host 1 ({ME}) is here twice (host 1 ({ME}))", "own --process")


def test_another_version_of_the_messages(free, meet, monkeypatch):
    """The second process takes another number while the first waits."""
    first, second = places(free, 2)

    def update():
        time.sleep(0.4)
        monkeypatch.setattr(rollcall, "FORMAT", 2)

    same_sentence(meet((first, {}), (second, {"first": update})), "run different versions")


def test_a_folder_that_is_not_shared(free, meet, tmp_path):
    own = [tmp_path / "a", tmp_path / "b"]
    here = places(free, 2)
    results = meet(*((place, {"workdir": dir}) for place, dir in zip(here, own, strict=True)))
    same_sentence(results, f"host 1 ({ME}) does not see in {own[1]} what", f"to {own[0]}; give all")
    assert list(own[0].iterdir()) == []


def test_a_folder_that_cannot_be_made(free, meet, tmp_path):
    (tmp_path / "file").touch()
    dir = {"workdir": tmp_path / "file" / "run"}
    leader, follower = meet(*called(*places(free, 2), at0=dir, at1=dir))
    assert isinstance(leader, OSError)
    assert str(follower) == str(leader)


def test_a_process_that_leaves_is_named(free, meet):
    def leave():
        time.sleep(0.3)
        with socket.create_connection((HOST, free)) as connection:
            wire = rollcall.Wire(connection)
            said = {"index": 1, "count": 3, "host": "x", "pid": 7, "facts": {}, "workdir": ""}
            wire.send("hello", format=roll.FORMAT, **said)
            time.sleep(0.3)

    threading.Thread(target=leave, daemon=True).start()
    same_sentence(meet(*called(*places(free, 3, 0))), "host 1 (x, process 7) has left")


def test_process_0_that_leaves_is_named(free, meet):
    with socket.create_server((HOST, free)) as listening:

        def leave():
            with listening.accept()[0] as connection:
                wire = rollcall.Wire(connection)
                wire.send("meshwork", format=roll.FORMAT)
                wire.receive(5.0)
            listening.close()

        threading.Thread(target=leave, daemon=True).start()
        results = meet(*called(*places(free, 2, 1)))
    same_sentence(results, f"process 0 at {HOST}:{free} has left the roll call")


def test_nobody_listens(free, meet):
    (error,) = meet(*called(*places(free, 2, 1, seconds=0.3)))
    same_sentence([error], f"nobody listens at {HOST}:{free} after 0 seconds", error=PortError)
    assert "is process 0 running there" in str(error)


@pytest.mark.parametrize("says", [b"SSH-2.0-OpenSSH_9.9\r\n", b"", None])
def test_somebody_else_answers(free, meet, says):
    """One that speaks, one that is silent, and one that ends each connection at once."""
    kept = []

    def serve(listening):
        with contextlib.suppress(OSError):
            while True:
                kept.append(listening.accept()[0])
                if says is None:
                    kept.pop().close()
                else:
                    kept[-1].sendall(says)

    with socket.create_server((HOST, free)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        (error,) = meet(*called(*places(free, 2, 1)))
        listening.shutdown(socket.SHUT_RDWR)
    for connection in kept:
        connection.close()
    why = "it ended the connection" if says is None else repr(says[:19])[:10] if says else "says no"
    same_sentence([error], f"what answers at {HOST}:{free} is not the roll", error=PortError)
    assert why in str(error)


def test_strangers_at_the_port_are_let_go(free, meet):
    def knock():
        for said in (b"GET / HTTP/1.1\r\n\r\n", b'{"kind": "other"}\n', b"", b"\xff\n"):
            with port.connect(HOST, free, SOON, SOON, lambda text: None) as stranger:
                stranger.sendall(said)
                stranger.settimeout(SOON)
                while stranger.recv(100):
                    pass

    found = meet(*called(*places(free, 2), at1={"first": knock}))
    assert [type(host) for host in found] == [Leader, Follower]


def test_a_port_in_use(free, meet):
    with socket.create_server((HOST, free)):
        (error,) = meet(*called(*places(free, 2, 0)))
    same_sentence([error], f"port {free} is in use on this machine; end", error=PortError)
    assert f"--coordinator={HOST}:PORT" in str(error)


def test_an_address_of_another_machine(free, meet):
    (error,) = meet(*called(*places(free, 2, 0, host="192.0.2.1")))
    text = "192.0.2.1 (192.0.2.1) is not an address of this machine; start process 0 there"
    same_sentence([error], text, error=PortError)


@pytest.mark.parametrize("index", [0, 1])
def test_a_name_that_does_not_resolve(free, meet, index, monkeypatch):
    def fail(*args, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    (error,) = meet(*called(*places(free, 2, index, host="nowhere")))
    text = "the name nowhere of the coordinator does not resolve (Name or service not known); "
    same_sentence([error], text, error=PortError)
