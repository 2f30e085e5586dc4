"""Simulated processes with messages of any delay all stop at one step, or none does."""

import heapq
import itertools
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from training.stopping import Proposals, Stopping


class Simulation:
    """Processes that run steps, which need each other, and exchange messages first in first out.

    ahead: how many steps a process may be ahead of one that has not begun them: devices compute
    while the host goes on.  seconds(process): of a step, drawn.  delay(source, target): of a
    message, drawn.  wants: {process: from when}.
    """

    def __init__(self, processes, first, last, ahead, seconds, delay, wants):
        self.last, self.ahead, self.seconds, self.delay, self.wants = (
            last, ahead, seconds, delay, wants,
        )  # fmt: skip
        self.now, self.queue, self.order = 0.0, [], itertools.count()
        self.sides = [Stopping() for _ in range(processes)]
        self.proposals = Proposals(processes)
        self.begun = [first + 1] * processes
        self.waiting: dict[int, int] = {}  # for a message
        self.held: dict[int, int] = {}  # for other processes' devices
        self.stopped: dict[int, int] = {}
        self.arrives: dict[tuple[int, int], float] = {}
        for process in range(processes):
            self.later(seconds(process), self.end, process, first + 1)

    def later(self, seconds, act, *args):
        heapq.heappush(self.queue, (self.now + seconds, next(self.order), act, args))

    def send(self, source, target, act, *args):
        at = self.now if source == target else self.now + self.delay(source, target)
        at = self.arrives[source, target] = max(at, self.arrives.get((source, target), 0.0))
        self.later(at - self.now, act, target, *args)

    def run(self):
        while self.queue:
            self.now, _, act, args = heapq.heappop(self.queue)
            act(*args)
        return self

    def end(self, process, step):
        """The step has been dispatched; its end may need devices of processes that are behind."""
        if min(self.begun) < step - self.ahead:
            self.held[process] = step
            return
        wanted = self.now >= self.wants.get(process, float("inf"))
        if self.sides[process].asks(step, wanted):
            self.send(process, 0, self.want, self.sides[process].passed)
        self.reach(process, step)

    def reach(self, process, step):
        stop = self.sides[process].reach(step)
        if stop is None:
            self.waiting[process] = step
        elif stop:
            self.stopped[process] = step
        else:
            self.begun[process] = step + 1
            if step < self.last:
                self.later(self.seconds(process), self.end, process, step + 1)
            held, self.held = self.held, {}
            for other, its in held.items():
                self.end(other, its)

    def wake(self, process):
        if process in self.waiting:
            self.reach(process, self.waiting.pop(process))

    def want(self, _, passed):
        self.tell(self.proposals.wanted(max(self.sides[0].passed, passed)))

    def tell(self, proposal):
        if proposal is not None:
            for process in range(len(self.sides)):
                self.send(0, process, self.propose, proposal)

    def propose(self, process, proposal):
        accepted = self.sides[process].propose(proposal.step)
        passed = None if accepted else self.sides[process].passed
        self.send(process, 0, self.answer, process, proposal.round, passed)
        self.wake(process)

    def answer(self, _, process, round, passed):
        if passed is not None:
            self.tell(self.proposals.refused(round, passed))
        elif (step := self.proposals.accepted(round, process)) is not None:
            for other in range(len(self.sides)):
                self.send(0, other, self.settle, step)

    def settle(self, process, step):
        self.sides[process].settle(step)
        self.wake(process)


@settings(max_examples=300, deadline=None)
@given(
    processes=st.integers(1, 5),
    first=st.sampled_from([0, 7, 100_000]),
    steps=st.integers(1, 12),
    ahead=st.integers(0, 2),
    slow=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 10**6),
    wanting=st.dictionaries(st.integers(0, 4), st.floats(0.0, 12.0), max_size=3),
)
@example(2, 100, 12, 1, 30.0, 3, {1: 0.0})
def test_all_stop_at_one_step_or_all_run_to_the_end(
    processes, first, steps, ahead, slow, seed, wanting
):
    last, random = first + steps, Random(seed)
    done = Simulation(
        processes, first, last, ahead, lambda p: random.expovariate(1),
        lambda *_: random.expovariate(1 / slow), wanting,
    ).run()  # fmt: skip
    assert not done.held
    assert not done.waiting
    ended = {done.stopped.get(process, last) for process in range(processes)}
    assert len(ended) == 1
    if done.stopped:
        assert set(done.stopped) == set(range(processes))
        assert ended == {done.proposals.settled}
    else:
        assert set(done.begun) == {last + 1}


@pytest.mark.parametrize("first", [0, 100_000])
@pytest.mark.parametrize("slow", [0.01, 1.0, 1000.0])
def test_a_long_run_is_stopped(slow, first):
    """Also with its first step, and if a thousand steps go by while a message travels."""
    random = Random(1)
    done = Simulation(
        4, first, first + 20_000, 1, lambda p: random.expovariate(1),
        lambda *_: random.expovariate(1 / slow), {2: 0.0},
    ).run()  # fmt: skip
    assert set(done.stopped) == {0, 1, 2, 3}
    (step,) = set(done.stopped.values())
    assert first < step < first + 20 + 10 * slow


def test_one_that_hears_late_is_caught_up_with():
    """The others go on with each proposal long before it hears of it, and so does it."""
    delay = lambda source, target: 50.0 if target == 2 else 0.01
    done = Simulation(3, 0, 2_000, 1, lambda p: 1.0, delay, {0: 5.0}).run()
    assert set(done.stopped) == {0, 1, 2}
    assert max(done.stopped.values()) < 500


def test_one_process_stops_with_the_step_under_way():
    done = Simulation(1, 4, 50, 0, lambda p: 1.0, lambda *_: 0.0, {0: 2.5}).run()
    assert done.stopped == {0: 7}


def test_the_first_step_of_a_resumed_run_may_be_the_last():
    """All are asked to stop there before any of them has told how far it is."""
    done = Simulation(3, 500, 600, 1, lambda p: 1.0 + p, lambda *_: 0.01, {0: 0.0}).run()
    assert done.stopped == dict.fromkeys(range(3), 501)


def test_without_a_wish_nobody_waits():
    done = Simulation(3, 0, 20, 0, lambda p: 1.0, lambda *_: 1.0, {}).run()
    assert done.stopped == {}
    assert done.now == 20.0
