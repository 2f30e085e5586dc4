"""How time grows with a row's length: Hedgehog's linear attention beside softmax attention.

The same heads and dtype, both as the platform computes them, in turns and in one process; the
linear one with its learned feature maps. The exponent is the slope of log time over log length, by
least squares over all lengths of a repetition, so that it has a spread of its own; softmax
attention's is over the lengths up to --peer_most. One is linear and two is quadratic.
"""

import contextlib

from launch.bench import measure
from launch.bench.measure import Report, Row
from launch.schema import UsageError

PASSES = ("forward", "both")


def bench(
    *,
    lengths: str = "1024,2048,4096,8192,16384,32768,65536",  # tokens a row, separated by commas
    peer_most: int = 8192,  # tokens of the longest row that softmax attention computes
    heads: int = 2,  # H, of one row
    size: int = 64,  # K = V = f of a head; features are 2 f
    dtype: str = "f32",  # bf16, f16 or f32
    repetitions: int = 7,  # samples of each quantity
) -> Report:
    """Every row of the report. Raises UsageError."""
    from launch.bench.kernels import DTYPES
    from launch.bench.lengths import Timed

    each = _numbers(lengths)
    if dtype not in DTYPES:
        raise UsageError(f"--dtype: there is no {dtype!r}; there are: {', '.join(DTYPES)}")
    if min(heads, size, repetitions) < 1:
        raise UsageError("--heads, --size and --repetitions must be at least 1")
    progress, rows = measure.Progress("length"), []
    with contextlib.closing(progress):
        for kind in PASSES:
            ours = Timed("linear", kind, heads, size, DTYPES[dtype])
            peer = Timed("softmax", kind, heads, size, DTYPES[dtype])
            rows += _pass(kind, ours, peer, each, peer_most, repetitions, progress)
    title = f"Hedgehog's attention against softmax's, {heads} heads of {size}, {DTYPES[dtype]}, "
    note = f"softmax attention up to {peer_most:,} tokens; both is forward and backward"
    config = {"lengths": each, "heads": heads, "size": size, "dtype": DTYPES[dtype]}
    return Report(f"{title}1 x {measure.device()['kind']}", rows, [note], config)


def _numbers(text: str) -> list[int]:
    """Ascending lengths. Raises UsageError."""
    parts = text.split(",")
    found = sorted({int(part) for part in parts if part.strip().isdecimal() and int(part)})
    if len(found) < max(2, len(parts)):
        raise UsageError(f"--lengths {text} are not two or more different numbers above 0")
    return found


def _pass(kind, ours, peer, lengths, peer_most, repetitions, progress) -> list[Row]:
    found, both = [], [length for length in lengths if length <= peer_most]
    taken = {}
    for length in lengths:
        ways = {"linear": ours.at(length)} | (
            {"softmax": peer.at(length)} if length in both else {}
        )
        stage = progress.within(f"{kind}, {length:,} tokens")
        taken[length] = measure.interleaved(ways, repetitions, stage)
        ms = {name: [1e3 * x for x in values] for name, values in taken[length].items()}
        found.append(Row(f"{kind}, {length:,} tokens", "ms", ms["linear"], ms.get("softmax", ())))
    slopes = lambda name, at: _exponents(at, [taken[length][name] for length in at])
    exponents = slopes("softmax", both) if len(both) > 1 else ()
    return [
        *found,
        Row(f"{kind}, time over length", "exponent", slopes("linear", lengths), exponents),
    ]


def _exponents(lengths, times) -> list[float]:
    """The slope of each repetition; times: of every length, a repetition each."""
    import numpy as np

    fit = lambda seconds: float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])
    return [fit(seconds) for seconds in zip(*times, strict=True)]
