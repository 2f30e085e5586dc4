"""Microseconds of the host a step: what Python does while the device could work."""

import contextlib
import copy
import dataclasses
import io
import itertools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import data.pipeline
from launch.bench import bare, measure
from launch.bench.measure import Row
from launch.bench.pair import Pair, Way
from training.feed import feed

CALLS = 3  # a sample is the median of them
PAUSE = 0.01  # seconds
LOOP = 200  # steps of the loop in a sample


def call(pair: Pair, repetitions: int, progress: Callable[[str], None]) -> list[Row]:
    """Microseconds until the call of the step returns."""

    def sample(way: Way) -> float:
        with way.scope():
            return _microseconds(way.take)

    ways = {name: lambda way=pair.ways[name]: sample(way) for name in ("meshwork", "bare")}
    found = measure.interleaved(ways, repetitions, progress)
    return [Row("call of the step, device idle", "us", *found.values())]


def batches(pair: Pair, repetitions: int, progress: Callable[[str], None]) -> list[Row]:
    """Microseconds to get a batch that lies ready onto the device, and those to build it."""
    build = lambda: pair.data.local(next(starts), 0, pair.data.batch_size)
    starts = itertools.count(0, pair.data.batch_size)
    with contextlib.ExitStack() as stack:
        fed = stack.enter_context(feed(pair.data, pair.program.batch, 0))
        plain = stack.enter_context(contextlib.closing(pair.data.iterate(0)))
        takes = {
            "meshwork": lambda: next(fed),
            "bare": lambda: jax.device_put(bare.fields(next(plain))),
            "build": build,
        }
        # In the pause, as long as a short step, the data's thread builds what was taken.
        ways = {name: lambda take=take: _microseconds(take, PAUSE) for name, take in takes.items()}
        found = measure.interleaved(ways, repetitions, progress)
    return [
        Row("batch onto the device", "us", found["meshwork"], found["bare"]),
        Row("building a batch, in a thread of its own", "us", found["build"]),
    ]


def _microseconds(work: Callable, pause: float = 0.0) -> float:
    """The median over a few calls of the time until they return."""

    def once() -> float:
        time.sleep(pause)
        return 1e6 * measure.until_return(work)

    return statistics.median(once() for _ in range(CALLS))


def loop(pair: Pair, repetitions: int, progress: Callable[[str], None], *, warm_up=1) -> list[Row]:
    """Microseconds a step of all that surrounds it: the step does nothing and batches lie ready.

    In Meshwork the whole of training/loop.py: batches onto the device, the call, metrics, log,
    TensorBoard, progress bar. The peer does the first two and writes its loss as often.
    """
    ways = {"meshwork": lambda: _whole_loop(pair), "bare": lambda: _bare_loop(pair)}
    found = measure.interleaved(ways, repetitions, progress, warm_up=warm_up)
    return [Row("loop around the step", "us", *found.values())]


def _whole_loop(pair: Pair) -> float:
    from training import loop

    program, stamps = pair.program, []
    with jax.set_mesh(pair.mesh):
        like = jax.eval_shape(program.step, program.state, program.batch)[1]
    ones = lambda: jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), like)
    idle = jax.jit(lambda s, batch: (s._replace(step=s.step + 1), ones()), donate_argnums=0)

    def step(state, batch):
        stamps.append(time.perf_counter())
        return idle(state, batch)

    score = lambda params, batch: {n: np.float32(1) for n in ("nll", "weight", "right")}
    never = dict.fromkeys(("eval_every", "sample_every", "save_every"))
    config = dict(pair.config) | {"steps": LOOP, "train": pair.config["train"] | never}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        job = loop.Run(
            config=config,
            program=dataclasses.replace(program, step=step, evaluate=score),
            data=_still(pair.data),
            mesh=pair.mesh,
            workdir=pathlib.Path(folder),
            header={"fingerprint": ""},
            flops=0.0,
        )
        with jax.set_mesh(pair.mesh):
            loop.run(job)
    return _a_step(stamps)


def _bare_loop(pair: Pair) -> float:
    state, stamps, every = pair.ways["bare"].state, [], pair.config["train"]["log_every"]
    state = jax.tree.map(jnp.copy, state)
    idle = jax.jit(lambda params, opt, batch: (params, opt, jnp.float32(1)), donate_argnums=(0, 1))
    with tempfile.TemporaryFile("w") as log:
        for step, batch in zip(range(LOOP), _still(pair.data).iterate(0), strict=False):
            stamps.append(time.perf_counter())
            *state, loss = idle(*state, jax.device_put(bare.fields(batch)))
            if step % every == 0:
                print(step, float(loss), file=log, flush=True)
    return _a_step(stamps)


def _a_step(stamps: list[float]) -> float:
    """Microseconds between the calls of two steps, without the first tenth of them."""
    first = len(stamps) // 10
    return 1e6 * (stamps[-1] - stamps[first]) / (len(stamps) - 1 - first)


def _still(corpus: data.pipeline.Data) -> data.pipeline.Data:
    """The data, of which every batch is the first and lies ready."""
    still = copy.copy(corpus)

    def iterate(position, indices=None):
        batch = corpus.batch(0)
        yield from itertools.repeat(batch if indices is None else [batch] * len(indices))

    still.iterate = iterate
    still.evaluation = lambda rows, limit=None: corpus.evaluation(rows, 1)
    return still
