"""How fast kernels are: the op's implementations and its peers in turns, beside the chip's floor.

Each contender's results are compared with the xla implementation's at the same inputs before it is
timed; one that is wrong is reported and not timed. A sample is many calls in one dispatch, see
launch/bench/contender.py. Speeds are of the op's FLOPs: what masks leave out is not counted.
"""

import contextlib
import os

from launch.bench.measure import Report
from launch.schema import UsageError

DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def bench(
    *,
    op: str = "flash_attention",  # a folder of pallas_kernels
    spec: str | None = None,  # names of specs, separated by commas; none for those tagged bench
    passes: str = "forward,backward",  # of forward, backward, both
    dtype: str = "bf16",  # bf16, f16 or f32
    against: str | None = None,  # peers' names that contain one of these, by commas; none for all
    seconds: float = 0.1,  # of calls in a sample
    repetitions: int = 10,  # samples of each contender
) -> Report:
    """Every row of the report. Raises UsageError."""
    # torch wants memory on the same GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from launch.bench.contender import PASSES
    from launch.bench.race import Race, among

    kinds = among("passes", passes, PASSES)
    if dtype not in DTYPES:
        raise UsageError(f"--dtype: there is no {dtype!r}; there are: {', '.join(DTYPES)}")
    if repetitions < 1 or not seconds > 0:
        raise UsageError("--repetitions must be at least 1, and --seconds more than 0")
    race = Race(op, DTYPES[dtype], kinds, against, seconds, repetitions)
    specs, notes = race.specs(spec)
    with contextlib.closing(race.progress):
        for one in specs:
            race.run(one)
    title = f"{op}, {DTYPES[dtype]}, 1 x {race.device}"
    config = {"op": op, "specs": [one.name for one in specs], "dtype": DTYPES[dtype]}
    method = f"times are a call's, of chains of calls in one dispatch, about {seconds:g} s"
    return Report(title, race.rows, [method, *notes, *race.notes(), *race.verdicts()], config)
