"""What a compiled program sends between devices and carries through its loops, from its text."""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z\-]+)\((.*)")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
TRIPS = re.compile(r"known_trip_count\D+(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """kind; shapes of its results; how often a step runs it, None where the text does not say."""

    kind: str
    shapes: list[tuple[int, ...]]
    bytes: int
    times: int | None


def shapes(text: str) -> list[tuple[int, ...]]:
    """Of the arrays of an instruction's type."""
    return [tuple(map(int, filter(None, dims.split(",")))) for _, dims in _arrays(text)]


def collectives(hlo: str) -> list[Collective]:
    """Every collective of a program, those in loops once with the number of turns."""
    computations = _computations(hlo)
    return list(_collectives(computations, "ENTRY", 1))


def loops(hlo: str) -> list[list[tuple[int, ...]]]:
    """The shapes that each while loop carries, those it only reads included."""
    found = (INSTRUCTION.match(line) for line in hlo.splitlines())
    return [shapes(m.group(1)) for m in found if m and m.group(2) == "while"]


def _arrays(text):
    return [(kind, dims) for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", text) if kind in BYTES]


def _bytes(text):
    return sum(
        BYTES[kind] * math.prod(map(int, filter(None, dims.split(","))))
        for kind, dims in _arrays(text)
    )


def _computations(hlo):
    found, name = {}, None
    for line in hlo.splitlines():
        if line[:1].strip() and line.rstrip().endswith("{"):
            entry, name = re.match(r"(ENTRY )?%?([\w.\-]+)", line).groups()
            name = "ENTRY" if entry else name
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def _collectives(computations, name, times) -> Iterator[Collective]:
    for line in computations.get(name, ()):
        match = INSTRUCTION.match(line)
        if match is None:
            continue
        result, op, rest = match.groups()
        kind = op.removesuffix("-start")
        if kind in KINDS:
            yield Collective(kind, shapes(result), _bytes(result), times)
            continue
        trips = TRIPS.search(rest)
        turns = 1 if op != "while" else int(trips.group(1)) if trips else None
        inner = None if None in (times, turns) else times * turns
        for called in CALLED.findall(rest):
            if "all-reduce-scatter" in called:  # how a TPU may do it, in one fusion
                yield Collective("reduce-scatter", shapes(result), _bytes(result), inner)
            else:
                yield from _collectives(computations, called, inner)
