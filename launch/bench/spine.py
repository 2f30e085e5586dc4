"""What Meshwork costs over bare JAX: speed of the quickstart's step, host time, time to a step.

The peer is launch/bench/bare.py: the same mathematics, batch and parameters, in the same process
and in turns with Meshwork. That both compute the same losses is asserted first. Wanted: at least
0.97 of the peer's tokens a second. The mesh has one device and all axes.
"""

import contextlib
import importlib
import pathlib

import jax

from launch.bench import host, measure, standin, start
from launch.bench.measure import Report, Row
from launch.bench.pair import Pair, Way, build, check, resolve

LEAST = 0.97


def bench(
    *,
    config: str = "quickstart",  # a configuration that differs from the quickstart in sizes
    seconds: float = 1.0,  # of steps in a sample
    repetitions: int = 15,  # samples of each quantity
    processes: int = 3,  # samples of the time to the first step, 0 for none
) -> Report:
    """Every row of the report. Raises UsageError; AssertionError where the losses differ."""
    resolved = resolve(config)
    progress = measure.Progress("spine")
    with contextlib.closing(progress):
        progress("building")
        pair = build(resolved)
        check(pair, progress.within("checking the losses"))
        rows = speed(pair, seconds, repetitions, progress)
        rows += host.call(pair, repetitions, progress.within("calls of the step"))
        rows += host.batches(pair, repetitions, progress.within("batches"))
        notes = []
        if (name := _missing("training.loop")) is None:
            rows += host.loop(pair, min(repetitions, 5), progress.within("loop"))
        else:
            notes.append(f"the loop around the step was not measured: {name} is not installed")
        if processes and (name or standin.in_use()):
            name = name or "ml_collections"
            notes.append(f"the start of train was not measured: {name} is not installed")
        elif processes:
            rows += start.rows(config, resolved, processes, progress.within("new processes"))
    return Report(_title(config, resolved), rows, notes, resolved)


def _title(config: str, resolved: dict) -> str:
    sizes = "{batch_size} x {length} tokens a step".format_map(resolved["data"])
    kind = jax.devices()[0].device_kind
    return f"{pathlib.Path(config).stem}, {sizes}, 1 x {kind}, jax {jax.__version__}"


def _missing(module: str) -> str | None:
    """The package for want of which this module cannot be imported; None where it can."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return error.name
    return None


def speed(pair: Pair, seconds: float, repetitions: int, progress: measure.Progress) -> list[Row]:
    """Tokens a second of steps that follow each other, the state donated."""
    once = 0.0
    for way in pair.ways.values():
        with way.scope():
            once = max(once, measure.seconds(way.take))
    count = measure.count_for(seconds, once)
    tokens = count * pair.data.batch_size * pair.data.length

    def sample(way: Way) -> float:
        with way.scope():
            return tokens / measure.seconds(lambda: way.take_many(count))

    ways = {name: lambda way=way: sample(way) for name, way in pair.ways.items()}
    found = measure.interleaved(ways, repetitions, progress.within(f"{count} steps"))
    rows = [Row("step", "tokens/s", found["meshwork"], found["bare"], LEAST)]
    if "unpadded" in found:
        what = "    peer without padded vocabulary"
        rows.append(Row(what, "tokens/s", found["meshwork"], found["unpadded"]))
    return rows
