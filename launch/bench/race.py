"""Contenders of one op at one spec after the other: refused, checked, timed in turns, judged."""

import contextlib
import dataclasses
import gc
import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence

import jax

from launch.bench import measure, target
from launch.bench.contender import Case, Declined, Jax
from launch.bench.measure import Row
from launch.kernels import chips
from launch.schema import UsageError
from pallas_kernels import dispatch

FLOOR_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "tf32"}
MOST_ON_CPU = 1e9  # FLOPs of a spec that is run without being named


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What was heard of a contender that was not timed. kind: the pass, empty for all."""

    spec: object
    kind: str
    name: str
    said: str


class Race:
    """Contenders of one op on this machine; rows and notes grow with every spec that is run."""

    def __init__(self, op, dtype: str, kinds: Sequence[str], against, seconds, repetitions):
        try:
            self._op = importlib.import_module(f"pallas_kernels.{op}")
            self._specs = importlib.import_module(f"pallas_kernels.{op}.specs")
        except ModuleNotFoundError:
            raise UsageError(f"--op: there is no kernel pallas_kernels/{op} with specs") from None
        self._dtype, self._kinds = dtype, kinds
        self._seconds, self._repetitions = seconds, repetitions
        self._rivals = _rivals(op)
        self._asked = _asked(self._rivals.peers() if self._rivals else {}, against)
        self._measured: list[tuple[object, str, str, Row]] = []
        self._heard: list[Refusal] = []
        self.rows: list[Row] = []
        self.device = jax.devices()[0].device_kind
        self.progress = measure.Progress("kernels")

    def specs(self, names: str | None) -> tuple[list, list[str]]:
        """The specs to run, and a note on what is left out."""
        known = {one.name: one for one in self._specs.SPECS}
        if names is not None:
            return [known[name] for name in among("spec", names, known)], []
        found = list(self._specs.tagged("bench"))
        if jax.default_backend() != "cpu":
            return found, []
        kept = [one for one in found if one.flops <= MOST_ON_CPU]
        left = ", ".join(one.name for one in found if one not in kept)
        return kept, [f"too large for a CPU unless named by --spec: {left}"]

    def run(self, spec) -> None:
        """Checks and times every contender at one spec."""
        case = Case.of(spec, self._dtype)
        reference = Jax(_first(spec.call("xla")), case)
        ours, peers = self._ready(case)
        for kind in self._kinds:
            self.progress(f"{spec.name}, {kind}: reference")
            wanted = reference.results(kind)
            reference.close() if kind == self._kinds[-1] else None
            right = {
                name: way
                for name, way in (ours | peers).items()
                if self._right(name, way, case, kind, wanted)
            }
            lead = next((name for name in ours if name in right), None)
            if lead is not None:
                self._time(case, kind, lead, right)
        for way in (ours | peers).values():
            way.close()
        gc.collect()

    def _ready(self, case) -> tuple[dict, dict]:
        """Contenders that do not decline: ours, the one to be judged first, and peers."""
        own = {
            name: lambda case, name=name: Jax(_first(case.spec.call(name)), case)
            for name in self._implementations()
        }
        found: tuple[dict, dict] = {}, {}
        for group, ways in zip(found, (own, self._asked), strict=True):
            for name, make in ways.items():
                with self._listening(name, case):
                    group[name] = make(case)
        return found

    def _implementations(self) -> list[str]:
        here, left_out = dispatch.platform(), getattr(self._rivals, "NOT_OURS", ("reference",))
        found = self._op.IMPLEMENTATIONS.items()
        return [name for name, on in found if on in (None, here) and name not in left_out]

    @property
    def _kernels(self) -> list[str]:
        """Those of ours that are made for this platform, for which the targets are."""
        return [name for name in self._implementations() if self._op.IMPLEMENTATIONS[name]]

    @contextlib.contextmanager
    def _listening(self, name: str, case, kind: str = "") -> Iterator[None]:
        """Keeps a refusal, and also a failure: what one contender cannot do stops no other."""
        try:
            yield
        except (Declined, NotImplementedError) as refusal:
            self._hear(name, case, kind, f"declines: {_line(refusal)}")
        except Exception as error:
            self._hear(name, case, kind, f"FAILED: {type(error).__name__}: {_line(error)}")

    def _hear(self, name: str, case, kind: str, said: str) -> None:
        self._heard.append(Refusal(case.spec, kind, name, said))

    def _right(self, name: str, way, case, kind: str, wanted: Sequence) -> bool:
        self.progress(f"{case.spec.name}, {kind}: {name}, check")
        error = None
        if name in getattr(self._rivals, "OTHERS", ()):
            self._hear(name, case, kind, "computes something else and is not compared")
            return True
        with self._listening(name, case, kind):
            error = case.error(kind, way.results(kind), wanted)
        if error is not None and not error <= case.allowed[kind]:
            most = f"of the values' size, at most {case.allowed[kind]:.3g} is allowed"
            self._hear(name, case, kind, f"is WRONG and not timed: error {error:.3g} {most}")
            return False
        return error is not None

    def _time(self, case, kind: str, lead: str, ways: Mapping) -> None:
        count = {
            name: measure.count_for(self._seconds, way.roughly(kind)) for name, way in ways.items()
        }
        takes = {n: lambda n=n: ways[n].seconds(kind, count[n]) for n in ways}
        progress = self.progress.within(f"{case.spec.name}, {kind}")
        samples = measure.interleaved(takes, self._repetitions, progress)
        what = f"{case.spec.name}, {kind}: {lead}"
        ms = [1e3 * s for s in samples[lead]]
        floor = floor_ms(self.device, case, kind)
        self.rows.append(Row(what, "ms", ms))
        if floor is not None:
            self.rows.append(Row("    the chip's floor", "ms", ms, [floor] * len(ms)))
        speed = lambda name: [1e-12 * flops(case.spec, kind) / s for s in samples[name]]
        for name in ways:
            if name != lead:
                least = self._wanted(case.spec, kind, lead, name)
                row = Row(f"    {name}", "TFLOP/s", speed(lead), speed(name), least)
                self.rows.append(row)
                if lead in self._kernels:
                    self._measured.append((case.spec, kind, name, row))
        if len(ways) == 1:
            self.rows.append(Row("    speed", "TFLOP/s", speed(lead)))
        self._memory(kind, lead, ways)

    def _memory(self, kind: str, lead: str, ways: Mapping) -> None:
        used = {name: way.memory(kind) for name, way in ways.items()}
        if used[lead] is None:
            return
        what, own = "    beside the arguments", [used[lead] / 1e6]
        others = {n: m for n, m in used.items() if n != lead and m}
        self.rows += [Row(f"{what}: {n}", "MB", own, [m / 1e6]) for n, m in others.items()]
        if not others:
            self.rows.append(Row(what, "MB", own))

    def _wanted(self, spec, kind: str, lead: str, peer: str) -> float | None:
        if lead not in self._kernels or target.DEVICE not in self.device:
            return None
        targets = [t for t in self._targets() if (t.kind, t.peer) == (kind, peer)]
        return max((t.least for t in targets if t.covers(spec)), default=None)

    def _targets(self) -> Sequence:
        return getattr(self._rivals, "TARGETS", ())

    def notes(self) -> list[str]:
        """What was left out and why, one line for all specs with the same reason."""
        grouped: dict[str, list[str]] = {}
        for heard in self._heard:
            where = f"{heard.spec.name} {heard.kind}".strip()
            grouped.setdefault(f"{heard.name} {heard.said}", []).append(where)
        return [f"{said} ({', '.join(where)})" for said, where in grouped.items()]

    def verdicts(self) -> list[str]:
        """A sentence for each target."""
        return [self._verdict(one) for one in self._targets()]

    def _verdict(self, wanted: target.Target) -> str:
        mine = lambda spec, kind, name: (
            name in (wanted.peer, *self._kernels)
            and kind in ("", wanted.kind)
            and wanted.covers(spec)
        )
        rows = [
            (spec.name, row) for spec, kind, name, row in self._measured if mine(spec, kind, name)
        ]
        if not self._kernels:
            return wanted.verdict([], [f"no kernel is for a {dispatch.platform()}"], self.device)
        heard = [f"{h.name} {h.said}" for h in self._heard if mine(h.spec, h.kind, h.name)]
        return wanted.verdict(rows, heard, self.device)


def among(flag: str, text: str, known: Sequence[str] | Mapping) -> list[str]:
    """The names in a flag, once each, each of which is known. Raises UsageError."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise UsageError(f"--{flag}: there is no {name!r}; there are: {', '.join(known)}")
    return names


def _rivals(op: str):
    """The op's file of peers, None where it has none."""
    name = f"launch.bench.peers.{op}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def _asked(peers: Mapping, against: str | None) -> Mapping:
    """The peers whose names contain a part of what is asked. Raises UsageError."""
    parts = [""] if against is None else [part.strip() for part in against.split(",")]
    for part in parts:
        if peers and not any(part in name for name in peers):
            raise UsageError(
                f"--against: no peer is called {part!r}; there are: {', '.join(peers)}"
            )
    return {n: way for n, way in peers.items() if any(part in n for part in parts)}


def _first(call):
    """The op's first result alone."""
    return lambda **arrays: call(**arrays)[0]


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def flops(spec, kind: str) -> float:
    """Of one call."""
    of = {"forward": spec.flops, "backward": spec.backward_flops}
    return of.get(kind, sum(of.values()))


def floor_ms(device: str, case, kind: str) -> float | None:
    """Least milliseconds on this device by matrix products and memory; None where not known."""
    chip = chips.chip_of(device)
    if chip is None:
        return None
    traffic = {k: case.spec.hbm_bytes(case.dtype, k == "backward") for k in ("forward", "backward")}
    moved = traffic.get(kind, sum(traffic.values()))
    dtype = FLOOR_DTYPES[case.dtype]
    least = chips.floors(flops(case.spec, kind), 0, moved, chip, dtype)
    return max(least["tensor cores"], least["memory"])
