"""Builds what comes next while the consumer is busy, in a thread or in worker processes."""

import collections
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def in_thread(build: Callable[[int], object], depth: int) -> Iterator:
    """`build(0), build(1), ..` without end, up to `depth` of them ahead of the consumer.

    An exception of `build` is raised where its result is asked for. Closing the generator waits for
    the result in the making and ends the thread. depth 0 builds on demand without a thread.
    """
    if depth == 0:
        yield from map(build, itertools.count())
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="data")
    try:
        steps = itertools.count()
        ahead = collections.deque(pool.submit(build, next(steps)) for _ in range(depth))
        while True:
            ready = ahead.popleft().result()
            ahead.append(pool.submit(build, next(steps)))
            yield ready
    finally:
        pool.shutdown(cancel_futures=True)


def in_processes(build: Callable[[int], object], depth: int, workers: int) -> Iterator:
    """The same from `workers` Grain processes, each up to `depth` results ahead.

    `build` is pickled to the workers. Each runs the program's main module again and may import jax
    (seconds); worth it only where building is slower than the training step.
    """
    import grain  # Seconds to import, and absent on machines that only measure.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's worker pool reads flags.
    options = grain.multiprocessing.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=max(depth, 1)
    )
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    dataset = grain.MapDataset.source(_Endless(build)).to_iter_dataset(reading)
    iterator = iter(dataset.mp_prefetch(options))
    try:
        yield from map(_copied, iterator)
    finally:
        iterator.close()


def _copied(result):
    # Grain's arrays live in memory shared with the worker, which may go before the consumer does.
    if isinstance(result, np.ndarray):
        return np.array(result)  # Drops the subclass too.
    parts = map(_copied, result)
    return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)


class _Endless:
    """A random-access source of results; Grain wants a length."""

    def __init__(self, build: Callable[[int], object]):
        self.build = build

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, step: int):
        return self.build(int(step))
