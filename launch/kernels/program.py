"""A TPU kernel's program as its compiler left it: straight pieces and their use of slots.

Two counts are kept of each piece. `bundles` is how many instruction words the final program has.
`cycles` is the length of the schedule that the compiler made them from, with every wait in it:
the last pass (its "delay converter") takes waits out, since the hardware stalls by itself until a
matrix unit is free or a result has arrived. Only cycles can be compared with a clock: in a piece
that is bound by its matrix units there may be fewer bundles than these are busy.
"""

import dataclasses
import math

STEERING = ("SALU", "VLOAD", "VLOAD:FILL")  # slots that a piece that only steers may use
LEAST, LEAST_INNER = 64, 16  # bundles of a heavy piece, in the grid loop and in loops inside it


@dataclasses.dataclass(frozen=True)
class Piece:
    """Bundles without a branch into or out of them, but for the branch at their end.

    start, stop: their addresses, [start, stop).  depth: the loops around it; the grid's is the
    first.  inside: the branches that may jump over it, as region numbers, outermost first.
    cycles: the schedule's length, waits included.  slots: {slot class: how many are used}, over
    those cycles; a matrix unit counts each cycle that it is busy.
    matmuls, pushes: instructions that stream rows through a matrix unit, and that load weights.
    """

    start: int
    stop: int
    depth: int
    inside: tuple[int, ...]
    cycles: int
    slots: dict[str, int]
    matmuls: int
    pushes: int

    @property
    def bundles(self) -> int:
        """Instruction words in the final program."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel: its pieces in the order of the text.

      capacity: {slot class: how many a cycle has}.  bound: the grid loop's, None without a loop.
      megacore: the program knows of two cores.
    vmem: bytes of vector memory, spilled registers included.
    profile: {slot class: share in use}, means over BINS equal parts of the schedule.
    """

    name: str
    pieces: tuple[Piece, ...]
    capacity: dict[str, int]
    bound: int | None
    megacore: bool
    vmem: int
    profile: dict[str, list[float]]

    @property
    def steps(self) -> int:
        """Grid steps a core runs: a pipeline's prologue and epilogue take two more turns."""
        return 1 if self.bound is None else max(self.bound - 2, 1)

    @property
    def heavy(self) -> tuple[Piece, ...]:
        """The pieces whose number of runs a prediction must be told, in the order of the text.

        Those inside the grid loop of 64 bundles or more, inside a further loop of 16 or more. A
        piece that hardly uses the vector slots only steers the pipeline and runs once a grid step.
        """
        return tuple(piece for piece in self.pieces if self._is_heavy(piece))

    def _is_heavy(self, piece: Piece) -> bool:
        vector = sum(n for name, n in piece.slots.items() if name not in STEERING)
        least = LEAST if piece.depth == 1 else LEAST_INNER
        return piece.depth > 0 and piece.bundles >= least and vector >= piece.bundles / 4

    def plain(self) -> dict:
        """As JSON takes it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, fields: dict) -> "Program":
        """What `plain` gave."""
        pieces = (
            Piece(**(piece | {"inside": tuple(piece["inside"])})) for piece in fields["pieces"]
        )
        return cls(**(fields | {"pieces": tuple(pieces)}))


def render(program: Program) -> str:
    """A table of the pieces, one a line."""
    total = sum(p.cycles for p in program.pieces)
    lines = [
        f"{program.name}: {sum(p.bundles for p in program.pieces)} bundles, {total} cycles, "
        f"{program.steps} grid steps{' on each core' if program.megacore else ''}"
    ]
    names = list(program.capacity)
    head = "  addresses       depth branches    bundles cycles matmul pushes"
    lines.append(head + "".join(f"{name[:9]:>10}" for name in names))
    for p in program.pieces:
        row = f"  {p.start:#6x}..{p.stop:#6x} {p.depth:>6} {'/'.join(map(str, p.inside)):>9}"
        row += f" {p.bundles:>9} {p.cycles:>6} {p.matmuls:>6} {p.pushes:>6}"
        for name in names:
            share = p.slots[name] / (program.capacity[name] * p.cycles) if p.cycles else math.nan
            row += f"{p.slots[name]:>6}{share:>4.0%}"
        lines.append(row + ("  *" if p in program.heavy else ""))
    return "\n".join(lines)
