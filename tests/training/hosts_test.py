"""Several processes as threads of one, connected by real sockets: what each hears, and how it ends.

The watchdogs run as they do in a run, with a twentieth of its seconds between signs of life.
"""

import itertools
import random
import threading
import time

import pytest

from tests.training.circle import SOON, Circle, together
from training import follower, hosts, leader, liveness, watchdog
from training.hosts import LOST, Alone, TogetherError
from training.leader import differing
from training.liveness import Limits

AGAIN = "start again with the same command"


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    for module in (liveness, watchdog):
        monkeypatch.setattr(module, "BEAT", 0.05)
    for module in (hosts, follower, leader):
        monkeypatch.setattr(module, "GRACE", 0.5)
    monkeypatch.setattr(hosts, "LOOKING", 0.5)


@pytest.fixture
def circle():
    made = []

    def make(*args, **options):
        made.append(Circle(*args, **options))
        return made[-1]

    yield make
    for one in made:
        for host in one.hosts:
            with host._changed:
                host._close()
        for host in one.hosts:
            if host._watchdog.is_alive():
                host._watchdog.join(SOON)
        for its in itertools.chain(*one.sockets.values()):
            its.close()


def test_alone_there_is_nothing_to_agree_on():
    alone, batches = Alone(), iter([1, 2])
    assert (alone.index, alone.count, alone.leader) == (0, 1, True)
    assert alone.fed(batches) is batches
    assert [alone.stops(3, wanted) for wanted in (False, True)] == [False, True]
    assert alone.times() == {}
    alone.at("saving")
    alone.go_on_from(list)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_process_that_dies_is_named_to_all_others(circle, victim):
    ring = circle(3)
    others = [i for i in range(3) if i != victim]
    for i in others:
        ring.hosts[i].stops(7, False)
        ring.hosts[i].go_on_from(lambda: [3, 6])
    ring.kill(victim)
    text = f"{ring.names[victim]} died after step 7; {AGAIN} to go on from step 6"
    assert ring.wait(*others) == [(LOST, text)] * 2
    assert victim not in ring.left


@pytest.mark.parametrize(
    ("saved", "end"),
    [
        (None, AGAIN),
        (list, f"{AGAIN} to begin anew"),
        (lambda: time.sleep(60), AGAIN),
        (lambda: (_ for _ in ()).throw(OSError("stale")), AGAIN),
    ],
    ids=["not begun", "none", "hangs", "fails"],
)
def test_where_the_run_can_go_on(circle, saved, end):
    """Before there are checkpoints to ask for, without any, and if the file system hangs."""
    ring = circle(2)
    ring.hosts[0].at("reading its corpus")
    ring.hosts[1].at("reading its corpus")
    time.sleep(0.3)
    if saved is not None:
        ring.hosts[0].go_on_from(saved)
    ring.kill(1)
    ((_, text),) = ring.wait(0)
    assert text == f"{ring.names[1]} died while reading its corpus; {end}"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_says_nothing_is_named(circle, victim):
    others = [i for i in range(3) if i != victim]
    ring = circle(3, Limits(silent=0.6), started=others)
    for status, text in ring.wait(*others):
        assert status == LOST
        assert text.startswith(f"{ring.names[victim]} has given no sign of life for 1 seconds ")
        assert text.endswith(f"; end it there, then {AGAIN}")
    ring.hosts[victim].start()  # It wakes up.
    ((status, text),) = ring.wait(victim)
    assert status == LOST
    assert f"{ring.names[victim]} has given no sign of life" in text


@pytest.mark.parametrize("victim", [0, 2])
def test_a_main_thread_that_hangs_is_named_with_its_phase(circle, victim, monkeypatch):
    monkeypatch.setitem(liveness.PHASES, "saving", 0.5)
    ring = circle(3, Limits(behind=0.1))
    for i, host in enumerate(ring.hosts):
        host.at("saving")
        if i != victim:
            host.at("waiting for its batch")
    for status, text in ring.wait(0, 1, 2):
        assert status == LOST
        start = f"{ring.names[victim]} has kept the others waiting for 1 seconds while saving "
        assert text.startswith(start)


def test_what_one_process_fails_with_is_told_to_all(circle):
    ring = circle(3)
    assert ring.hosts[1].part(2, "the disk is full")
    text = f"{ring.names[1]} ended: the disk is full"
    assert ring.wait(0, 2) == [(2, text)] * 2


def test_what_process_0_fails_with_is_told_to_all(circle):
    ring = circle(3)
    assert ring.hosts[0].part(1, "the loss is NaN")
    assert ring.wait(1, 2) == [(1, f"{ring.names[0]} ended: the loss is NaN")] * 2


def test_what_all_fail_with_is_printed_once(circle):
    """Also by one that comes to it a little later."""
    ring = circle(3)
    fail = lambda host: host.part(1, "the loss is NaN")
    later = lambda host: time.sleep(0.2) or fail(host)
    first, second, third = ring.hosts
    printed = together(lambda: fail(first), lambda: fail(second), lambda: later(third))
    assert printed == [True, False, False]
    assert ring.left == {}


def test_each_prints_what_only_it_fails_with(circle):
    ring = circle(2)
    acts = [lambda host=host: host.part(2, f"{host.index} fails") for host in ring.hosts]
    assert together(*acts) == [True, True]


def test_processes_that_have_finished_are_not_missed(circle):
    ring = circle(3)
    done = threading.Thread(target=ring.hosts[1].finish, daemon=True)
    done.start()
    time.sleep(0.3)
    ring.kill(1)
    time.sleep(0.3)
    assert ring.left == {}
    together(ring.hosts[0].finish, ring.hosts[2].finish)
    ring.kill(0)
    ring.kill(2)
    time.sleep(0.2)
    assert ring.left == {}


def test_facts_are_compared(circle):
    ring = circle(3)
    same = {"corpus": "a", "tokenizer": "b"}
    assert together(*(lambda h=h: h.compare(same) for h in ring.hosts)) == [None] * 3
    facts = [same, same, {"corpus": "c", "tokenizer": "b"}]
    acts = [lambda h=h, f=f: h.compare(f) for h, f in zip(ring.hosts, facts, strict=True)]
    errors = together(*acts)
    text = f"{ring.names[0]} and {ring.names[2]} differ in corpus ('a' and 'c'); "
    assert [type(error) for error in errors] == [TogetherError] * 3
    assert {str(error) for error in errors} == {text + "give every host the same files"}
    time.sleep(0.2)
    assert ring.left == {}


def test_process_0_may_leave_at_once_when_facts_differ(circle):
    """The end of its connection is read before the main thread has woken up."""
    ring = circle(2, started=[1])
    ring.hosts[0]._tell("compared", error="they differ")
    ring.end(0)
    time.sleep(0.3)
    assert ring.left == {}


def test_up_to_three_differences_of_one_process_are_named():
    facts = {0: {k: 1 for k in "abcd"}, 1: {k: 1 for k in "abcd"}, 2: {k: 2 for k in "bcde"}}
    assert differing(facts, ["A", "B", "C"], "mend it") == (
        "A and C differ in a (1 and absent), b (1 and 2), c (1 and 2) and 2 more; mend it"
    )
    assert differing({0: {"a": 1}, 1: {"a": 1}}, ["A", "B"]) == ""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("wanting", [{0: 5}, {2: 3}, {0: 20, 1: 20, 2: 20}])
def test_all_stop_at_one_step(circle, seed, wanting):
    """Steps that need every process, as those of a run do, after a first one of any number."""
    first, draw = 100, random.Random(seed)
    delays = [[draw.expovariate(300) for _ in range(200)] for _ in range(3)]
    ring, meet = circle(3), threading.Barrier(3)

    def loop(host):
        for step in range(first + 1, first + 200):
            time.sleep(delays[host.index][step - first])
            meet.wait(SOON)
            if host.stops(step, step >= first + wanting.get(host.index, 1000)):
                return step
        return None

    ended = together(*(lambda host=host: loop(host) for host in ring.hosts))
    assert len(set(ended)) == 1, ended
    asked = first + min(wanting.values())
    assert asked <= ended[0] <= asked + 20  # Messages take less than 20 steps of some milliseconds.


def test_each_process_tells_how_long_its_steps_and_its_input_take(circle):
    ring = circle(2)
    slow = {0: 0.0, 1: 0.04}

    def loop(host):
        def batches():
            for number in itertools.count():
                time.sleep(slow[host.index] if number else 0.5)  # The first step does not count.
                yield number

        fed = host.fed(batches())
        for step in range(1, 8):
            assert next(fed) == step - 1
            time.sleep(0.02)
            host.stops(step, False)
        time.sleep(0.5)
        return host.times()

    times, none = together(*(lambda host=host: loop(host) for host in ring.hosts))
    assert none == {}
    names = [f"host_{what}_seconds/{i}" for what in ("step", "input") for i in (0, 1)]
    assert list(times) == names
    step0, step1, input0, input1 = times.values()
    assert 0.02 <= step0 < step1
    assert 0.0 <= input0 < 0.04 <= input1 < 0.4
    assert input1 + 0.02 <= step1


def test_something_else_on_the_wire_is_a_loss(circle):
    ring = circle(2, started=[0])
    ring.sockets[1][0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    ((status, text),) = ring.wait(0)
    assert (status, text.startswith(f"{ring.names[1]} died")) == (LOST, True)
