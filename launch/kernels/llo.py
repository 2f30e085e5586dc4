"""The parser of what libtpu dumps of a kernel: LLO, its bundles and their use of slots.

`python -m launch.kernels.llo FOLDER [KERNEL]` prints the pieces of every kernel dumped into FOLDER
by LIBTPU_INIT_ARGS="--xla_jf_dump_to=FOLDER --xla_jf_dump_llo_text=true".
"""

import bisect
import collections
import dataclasses
import itertools
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence

from launch.kernels.program import Piece, Program, render

BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +([A-Z]{2})?: +(>*) *\{")
STARTS = re.compile(r"Start region (\d+)")
ENDS = re.compile(r"End region (\d+)")
BRANCH = re.compile(r"sbr\.\w+ (?:\((!?%\w+)\) )?target = \$region(\d+)")
LOOP_TEST = re.compile(r"totalorder %\w+, (\d+) +/\* loop exit test \*/")
VMEM = re.compile(r"space=vmem, size = (0x[0-9a-f]+), offset = (0x[0-9a-f]+|0)")
SCHEDULED = "-pre-delay_hlo-static-per-bundle-utilization.txt"
FINAL = "-final_hlo-static-per-bundle-utilization.txt"
ALLOCATIONS = "-post-delay-converter.txt"
BUSY = ("MXU", "XLU")  # slot classes whose use is counted for every cycle that a unit is busy
BINS = 400  # parts of a schedule that a profile has
KERNEL = re.compile(r"^\d+-(.+?)(?:\.\d+)?-\d+-final_bundles\.txt$")


class DumpError(Exception):
    """One sentence on a dump that is not what this parser knows."""


def read(folder: pathlib.Path) -> dict[str, list[Program]]:
    """{kernel: its programs} of every custom call dumped into the folder. Raises DumpError."""
    found = collections.defaultdict(list)
    for path in sorted(folder.glob("*-final_bundles.txt")):
        match = KERNEL.match(path.name)
        text = path.read_text(encoding="utf-8") if match else ""
        if "custom-call(" not in text.split("= control target key end", 1)[-1][:200_000]:
            continue
        if "schedule-analysis" in path.name or match[1] == "TLP":
            continue
        stem = path.name.rsplit("-", 2)[0]
        others = [_only(folder, stem, ending) for ending in (SCHEDULED, FINAL, ALLOCATIONS)]
        found[match[1]].append(parse(match[1], text, *others))
    return dict(found)


def _only(folder: pathlib.Path, stem: str, ending: str) -> str:
    names = [p for p in folder.iterdir() if p.name.startswith(stem) and p.name.endswith(ending)]
    if len(names) != 1:
        raise DumpError(f"{folder} has {len(names)} files {stem}-*-{ending}; there must be one")
    return names[0].read_text(encoding="utf-8")


def parse(name: str, text: str, scheduled: str, final: str, allocations: str) -> Program:
    """The program in a `final_bundles` dump. Raises DumpError.

    scheduled, final: its tables of slot use, before and after waits are taken out.
    allocations: any dump that lists them, as `post-delay-converter` does at its head.
    """
    bundles = list(_bundles(text))
    capacity, rows = table(final)
    _, cycles = table(scheduled)
    if len(rows) != len(bundles):
        raise DumpError(
            f"{name}: {len(bundles)} bundles in the program and {len(rows)} in its table of slots"
        )
    starts = _starts(bundles)
    places = [*_places(name, capacity, rows, cycles, starts), len(cycles)]
    spans = _spans(bundles)
    pieces = []
    for k, (a, b) in enumerate(itertools.pairwise([*starts, len(bundles)])):
        around = sorted((i, n) for n, (i, j) in spans.items() if i <= a < j)
        own = cycles[places[k] : places[k + 1]]
        pieces.append(_piece(a, bundles[a:b], [n for _, n in around], capacity, own))
    tests = [int(m[1]) for bundle in bundles if (m := LOOP_TEST.search(bundle.text))]
    return Program(
        name,
        tuple(pieces),
        capacity,
        tests[-1] if tests else None,
        "megacore core id" in text,
        max((int(size, 16) + int(at, 16) for size, at in VMEM.findall(allocations)), default=0),
        _profile(capacity, cycles),
    )


def _piece(start: int, bundles, inside, capacity: dict[str, int], cycles) -> Piece:
    words = " ".join(bundle.text for bundle in bundles)
    return Piece(
        start=start,
        stop=start + len(bundles),
        # The last bundles behind a branch may be marked as if they were outside already.
        depth=max(bundle.depth for bundle in bundles),
        inside=tuple(inside),
        cycles=len(cycles),
        slots={name: sum(row[i] for row in cycles) for i, name in enumerate(capacity)},
        matmuls=words.count("= vmatmul"),
        pushes=words.count("= vmatpush"),
    )


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One instruction word: its marker (LB, PF, ...), the loops around it and its text."""

    marker: str
    depth: int
    text: str


def _bundles(text: str) -> Iterator[Bundle]:
    head, lines = None, []
    for line in text.splitlines():
        if match := BUNDLE.match(line):
            if head:
                yield Bundle(head[2] or "", len(head[3]), "\n".join(lines))
            head, lines = match, []
        if head:
            lines.append(line)
    if head:
        yield Bundle(head[2] or "", len(head[3]), "\n".join(lines))


def table(text: str) -> tuple[dict[str, int], list[tuple[int, ...]]]:
    """({slot class: capacity}, a row a bundle) of a `static-per-bundle-utilization` dump."""
    head, sign, body = text.partition("== UTILIZATION:\n")
    lines = head.splitlines()
    if not sign or len(lines) < 3:
        raise DumpError("a table of slots has no '== UTILIZATION:'; the compiler's dump changed")
    names = [name.strip() for name in lines[1].split(",")]
    capacity = dict(zip(names, map(int, lines[2].split()), strict=True))
    return capacity, [tuple(map(int, line.split())) for line in body.splitlines() if line.strip()]


def _delay(bundles: Sequence[Bundle]) -> int:
    """Bundles behind a branch that run whether it is taken or not: 4 or, on TPU7x, 6.

    Read off the grid loop: the bundle with its branch back ends a region only when they are over.
    """
    for i in reversed(range(len(bundles))):
        match = BRANCH.search(bundles[i].text)
        if match and bundles[i].marker != "LB":
            ends = (
                j for j in range(i + 1, min(i + 9, len(bundles))) if ENDS.search(bundles[j].text)
            )
            return next(ends, i + 4) - i
    return 4


def _starts(bundles: Sequence[Bundle]) -> list[int]:
    delay = _delay(bundles)
    starts = {0} | {i for i, bundle in enumerate(bundles) if bundle.marker}
    starts |= {i + delay + 1 for i, b in enumerate(bundles) if BRANCH.search(b.text)}
    return sorted(start for start in starts if start < len(bundles))


def _spans(bundles: Sequence[Bundle]) -> dict[int, tuple[int, int]]:
    """{target region: (behind the branch, its target)} of the branches that jump forward."""
    delay = _delay(bundles)
    ended = {int(n): i for i, b in enumerate(bundles) for n in ENDS.findall(b.text)}
    spans = {}
    for i, bundle in enumerate(bundles):
        for _, region in BRANCH.findall(bundle.text):
            over = (
                ended.get(int(region) - 1, -1) + 1
            )  # the region jumped over has the number before
            if over > i:
                spans[int(region)] = (i + delay + 1, over)
    return spans


def _places(name: str, capacity, rows, cycles, starts: Sequence[int]) -> list[int]:
    """The cycle at which the schedule reaches each start.

    Waits are left out of `rows` and neighbours may be joined, but nothing changes places: what
    has been issued before a branch target, matrix units' busy cycles aside, is the same in both.
    """
    issued = [i for i, name in enumerate(capacity) if name not in BUSY]
    count = lambda rows: [0, *itertools.accumulate(sum(row[i] for i in issued) for row in rows)]
    done, todo = count(rows), count(cycles)
    if done[-1] != todo[-1]:
        raise DumpError(f"{name}: the schedule issues {todo[-1]} slots and the program {done[-1]}")
    places = [bisect.bisect_right(todo, done[start]) - 1 for start in starts]
    return [0, *places[1:]]


def _profile(capacity: dict[str, int], cycles: Sequence[tuple[int, ...]]) -> dict[str, list[float]]:
    edges = [round(i * len(cycles) / BINS) for i in range(BINS + 1)]
    spans = [(a, b) for a, b in itertools.pairwise(edges) if b > a]
    share = lambda i, most, a, b: sum(row[i] for row in cycles[a:b]) / (most * (b - a))
    return {
        name: [round(share(i, most, a, b), 3) for a, b in spans]
        for i, (name, most) in enumerate(capacity.items())
    }


def main(argv: Sequence[str]) -> None:
    for name, programs in read(pathlib.Path(argv[0])).items():
        if len(argv) < 2 or argv[1] in name:
            print(*map(render, programs), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
