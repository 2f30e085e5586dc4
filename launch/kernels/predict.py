"""How long a kernel will take, from its program's schedule and how often each piece of it runs.

predicted time = max(cycles / clock, bytes / bandwidth), where
cycles = sum over pieces of (length of the schedule x runs) / cores,
with the compiler's schedule of every piece (`llo`: waits for results and for busy matrix units
included), and runs of the heavy pieces from the implementation's `executions`. Other pieces in the
grid loop run once a grid step, those outside of it once a core.

Calibration. tokamax 0.0.17 ships median times of its splash attention on real chips, with the
fastest configurations (full attention, bfloat16, 16384 tokens, H x head size = 2048). The same
programs compiled here, and 0.54 GB that the op transposes in HBM around its kernel, at 70 % of the
bandwidth (the one number that is fitted), in ms:

    chip  length  head size  measured  predicted  ratio
    v5p   16k      64        10.464    10.219 + 0.277  1.00
    v5p   16k     128         5.368     5.108 + 0.277  1.00
    v5p   16k     256         5.371     5.056 + 0.277  1.01
    v5p    8k     128         2.862     2.588 + 0.277  1.00
    v6e   16k      64        12.667    12.256 + 0.468  1.00
    v6e   16k     128         6.658     6.123 + 0.468  1.01
    v6e   16k     256         3.754     3.187 + 0.468  1.03
    v6e    8k     128         3.554     3.081 + 0.468  1.00
    v6e    4k     128         2.014     1.576 + 0.468  0.99

With the last pass's bundles taken for cycles the kernels' part is 1 to 2 % smaller there, and it is
impossibly small where matrix units are the bound: a tile's backward pass on v5p has 9336 bundles,
and its matrix units are busy for 10240 cycles. Neither causal times nor forward passes on TPU7x are
in this table; a backward pass there (16k, head size 64) took 24.34 ms and is predicted at 19.61 and
0.3 to 0.8 of copies, so that predictions for a TPU7x are good for comparisons only.

Where it fails: a wait for HBM inside of a grid step is not in a schedule (the floor of all bytes
over the bandwidth is); a masked schedule needs runs that are right; launches (some 10 us), copies
that XLA puts around a kernel and collisions of the two cores of a v5p are not counted, so calls
below a quarter of a millisecond take longer than predicted.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from launch.kernels.program import Program
from launch.kernels.targets import Target

BACKWARD = ("backward", "bwd", "dkv", "dq")  # one of these is in a backward kernel's name


class MismatchError(ValueError):
    """One sentence and a list: the runs that an implementation gives do not fit its program."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel's program with what is known of its call.

    grid: steps of one call, cores together; None if that is not static.  calls: in the program.
    runs: of each heavy piece in one call of the op, cores together; None: one a grid step.
    """

    program: Program
    grid: int | None
    calls: int = 1
    runs: Sequence[float] | None = None

    def cores(self, target: Target) -> int:
        """How many cores share the grid: seen from the bound of each core's loop."""
        if not self.program.megacore:
            return 1
        if self.grid is None or self.program.bound is None:
            return target.cores
        return max(1, min(target.cores, round(self.grid / self.program.steps)))

    def steps(self, target: Target) -> float:
        """Grid steps of all calls, cores together."""
        own = self.program.steps * self.cores(target)
        return (own if self.grid is None else self.grid) * self.calls

    def weights(self, target: Target) -> list[float]:
        """How often each piece runs on a core. Raises MismatchError."""
        cores, steps, heavy = self.cores(target), self.steps(target), self.program.heavy
        runs = [steps] * len(heavy) if self.runs is None else list(self.runs)
        if len(runs) != len(heavy):
            raise MismatchError(mismatch(self.program, runs))
        given = iter(runs)
        weigh = lambda piece: next(given) if piece in heavy else steps
        return [weigh(p) / cores if p.depth else self.calls for p in self.program.pieces]


def mismatch(program: Program, runs: Sequence[float] | None) -> str:
    """What to say when there are not as many runs as heavy pieces."""
    given = "no runs" if runs is None else f"{len(runs)} runs"
    lines = [
        f"{program.name} has {len(program.heavy)} heavy pieces and its implementation's "
        f"`executions` gives {given}: give one for each of"
    ]
    for p in program.heavy:
        where = f"{p.start:#x}..{p.stop:#x}: {p.bundles} bundles, {p.cycles} cycles"
        inside = f"loops {p.depth}, branches {'/'.join(map(str, p.inside)) or 'none'}"
        lines.append(f"  {where}, {inside}, {p.matmuls} matmuls, {p.slots.get('EUP', 0)} EUP")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one pass of an op on one device, in milliseconds where nothing else is said.

    schedule: cycles over the clock.  hbm: bytes over the bandwidth.  mxu: FLOPs over the peak.
    cycles, bundles: that a core runs.  use: {slot class: its share in use over these cycles}.
    spills, fills: of registers, that a core runs.
    """

    schedule: float
    hbm: float
    mxu: float
    flops: float
    cycles: float
    bundles: float
    use: Mapping[str, float]
    spills: float
    fills: float

    @property
    def ms(self) -> float:
        """Predicted time: neither the schedule nor HBM can be beaten."""
        return max(self.schedule, self.hbm)

    @property
    def tflops(self) -> float:
        """TFLOP/s, of the FLOPs that the result needs."""
        return self.flops / self.ms / 1e9 if self.ms else math.nan

    @property
    def share(self) -> float:
        """Of the bound that the matrix units give."""
        return self.mxu / self.ms if self.ms else math.nan

    @property
    def busy(self) -> float:
        """Share of the cycles in which matrix units are busy."""
        return self.use.get("MXU", 0.0)


def predict(kernels: Sequence[Kernel], target: Target, flops: float, size: float) -> Prediction:
    """The prediction of a pass: its kernels one after the other.

    Args:
      flops, size: FLOPs that the result needs and the fewest bytes to be moved in HBM.

    Raises:
      MismatchError: a kernel's runs do not fit its program.
    """
    total, slots, room = {"cycles": 0.0, "bundles": 0.0}, Counter(), Counter()
    for kernel in kernels:
        for piece, weight in zip(kernel.program.pieces, kernel.weights(target), strict=True):
            total["cycles"] += piece.cycles * weight
            total["bundles"] += piece.bundles * weight
            for name, capacity in kernel.program.capacity.items():
                slots[name] += piece.slots.get(name, 0) * weight
                room[name] += piece.cycles * capacity * weight
    return Prediction(
        schedule=total["cycles"] / target.clock * 1e3,
        hbm=size / target.bandwidth * 1e3,
        mxu=flops / target.peak * 1e3,
        flops=flops,
        cycles=total["cycles"],
        bundles=total["bundles"],
        use={name: slots[name] / room[name] for name in room if room[name]},
        spills=slots["VSTORE:SPILL"],
        fills=slots["VLOAD:FILL"],
    )


def passes(found: Mapping[str, dict], executions: Mapping[str, Sequence[float]] | None):
    """{'forward' or 'backward': {name: Kernel}} of what `tpu.compile` found.

    Raises MismatchError: there are executions, and none of a kernel that was found.
    """
    sorted_ = {"forward": {}, "backward": {}}
    for name, facts in found.items():
        program = Program.from_plain(facts["program"])
        runs = None
        if executions is not None:
            runs = executions.get(name)
            if runs is None and program.heavy:
                known = ", ".join(executions) or "nothing"
                raise MismatchError(f"{mismatch(program, None)}\n(it speaks of {known})")
            if program.bound is None and runs and not program.heavy:
                raise MismatchError(
                    f"the grid of {name} has one step a core, and its program no loop whose pieces "
                    "could be counted: choose a larger batch, more heads or a longer sequence"
                )
            runs = runs or []
        side = "backward" if any(word in name for word in BACKWARD) else "forward"
        sorted_[side][name] = Kernel(program, facts["grid"], facts["calls"], runs)
    return {side: kernels for side, kernels in sorted_.items() if kernels}
