"""Processes that are threads here: all come to one verdict, whoever fails and however late."""

import concurrent.futures
import threading
import time

import pytest

from training.agree import Agreement, PeerError


class Service:
    """The keys and values of the coordination service, and its errors."""

    def __init__(self):
        self.values, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self._changed:
            assert key not in self.values
            self.values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key, timeout_ms):
        with self._changed:
            if not self._changed.wait_for(lambda: key in self.values, timeout_ms / 1000):
                raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]

    def key_value_delete(self, key):
        with self._changed:
            for found in [name for name in self.values if name.startswith(key)]:
                del self.values[found]


def together(n, work):
    """work(agreement, process) of n processes at once: what each returned or raised."""
    service = Service()

    def one(process):
        agreement = Agreement(service, process, n)
        agreement._name = "run"
        try:
            return work(agreement, process)
        except PeerError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(n) as pool:
        return list(pool.map(one, range(n))), service


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_leader_hears_all_and_all_hear_the_leader(n):
    def work(agreement, process):
        time.sleep(0.01 * (n - process))
        return [agreement.meet(f"{process} {turn}") for turn in range(5)]

    found, service = together(n, work)
    assert found[0] == [[f"{process} {turn}" for process in range(n)] for turn in range(5)]
    assert all(other == [[f"0 {turn}"] for turn in range(5)] for other in found[1:])
    assert len(service.values) <= n  # of the last meeting alone


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_of_one_is_raised_by_all_and_the_next_meeting_is_in_order(failing):
    def work(agreement, process):
        agreement.meet()
        try:
            agreement.meet(error="full disk" if process == failing else "")
        except PeerError as error:
            told = str(error)
        return told, agreement.meet(str(process))[0]

    found, _ = together(3, work)
    told = "full disk" + (f" (process {failing})" if failing else "")
    assert found == [(told, "0")] * 3


def test_one_that_does_not_come_is_named():
    def work(agreement, process):
        return process == 1 or agreement.meet(timeout=0.05 if process == 0 else 5.0)

    first, _, third = together(3, work)[0]
    assert str(first) == "no answer for 0 seconds (process 1)"
    assert str(third) == str(first)


def test_a_leader_that_does_not_come():
    found, _ = together(2, lambda agreement, process: process and agreement.meet(timeout=0.05))
    assert str(found[1]) == "no answer for 0 seconds"


def test_what_the_leader_works_out_is_known_to_all():
    asked = []

    def work(agreement, process):
        return agreement.lead(lambda: asked.append(process) or {"step": 3})

    assert together(3, work)[0] == [{"step": 3}] * 3
    assert asked == [0]


def test_an_error_of_the_leader_keeps_its_kind_there():
    def work(agreement, process):
        def fail():
            raise KeyError("lost")

        try:
            agreement.lead(fail)
        except (KeyError, PeerError) as error:
            return type(error), str(error), agreement.meet("on")[0]

    assert together(2, work)[0] == [(KeyError, "'lost'", "on"), (PeerError, "'lost'", "on")]


def test_alone_nobody_is_asked():
    agreement = Agreement()
    assert agreement.meet("text") == ["text"]
    assert agreement.lead(lambda: 3) == 3
    with pytest.raises(PeerError, match="why"):
        agreement.meet(error="why")
    with pytest.raises(ZeroDivisionError):
        agreement.lead(lambda: 1 / 0)
