import gc
import itertools
import threading
import time

import pytest

from data import prefetch


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("data")]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_order_and_end(depth):
    results = prefetch.in_thread(lambda step: step * step, depth)
    assert list(itertools.islice(results, 20)) == [k * k for k in range(20)]
    results.close()
    assert not data_threads()


def test_never_further_ahead_than_its_depth():
    built = []
    results = prefetch.in_thread(built.append, 3)
    for _ in range(5):
        next(results)
    time.sleep(0.05)
    assert len(built) <= 5 + 3
    results.close()


def test_exceptions_reach_the_consumer_in_their_turn():
    def build(step):
        if step == 2:
            raise OSError("disk")
        return step

    results = prefetch.in_thread(build, 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="disk"):
        next(results)
    assert not data_threads()


def test_an_abandoned_consumer_leaves_no_thread():
    results = prefetch.in_thread(lambda step: step, 2)
    next(results)
    del results
    gc.collect()
    assert not data_threads()
    prefetch.in_thread(lambda step: step, 2).close()  # Never started.
