"""A picture of a kernel's program: how full each slot class is, cycle by cycle."""

import pathlib
from collections.abc import Mapping, Sequence

from launch.kernels.program import Program
from launch.schema import UsageError

NARROW = 0.06  # of a panel's width: a piece below it has no room for its label
SHOWN = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE", "VLOAD:FILL", "VSTORE:SPILL", "SALU")


def draw(
    programs: Mapping[str, Program],
    executions: Mapping[str, Sequence[float]] | None,
    path: pathlib.Path,
    title: str,
) -> None:
    """A panel a program: a row a slot class, dark where it is full; heavy pieces are framed.

    executions: {program: runs of its heavy pieces in one call}, written above those that are wide
    enough, behind the address where they start, as in the table of `program.render`.

    Raises UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UsageError("--picture needs matplotlib: uv sync --group dev") from None
    figure = Figure(figsize=(14, 3.4 * len(programs)), layout="constrained")
    panels = figure.subplots(len(programs), squeeze=False)[:, 0]
    for axes, (name, program) in zip(panels, programs.items(), strict=True):
        shades = _panel(axes, name, program, (executions or {}).get(name))
    figure.suptitle(title)
    figure.colorbar(shades, ax=panels, label="share of the slots in use", fraction=0.02, pad=0.01)
    figure.savefig(path, dpi=120)


def _panel(axes, name: str, program: Program, runs: Sequence[float] | None):
    names = [slot for slot in SHOWN if slot in program.capacity]
    cycles = sum(piece.cycles for piece in program.pieces)
    shares = [program.profile[slot] for slot in names]
    extent = (0, cycles, len(names), 0)
    fill = dict(vmin=0, vmax=1, extent=extent, interpolation="none")
    shades = axes.imshow(shares, "Blues", aspect="auto", **fill)
    axes.set_yticks([i + 0.5 for i in range(len(names))], names)
    axes.set_xlabel("cycle of the schedule")
    axes.set_title(name, pad=18)
    given, start = iter(runs or ()), 0
    for piece in program.pieces:
        stop = start + piece.cycles
        if piece in program.heavy:
            axes.axvspan(start, stop, fill=False, edgecolor="tab:red", linewidth=0.8)
            times = next(given, None)
            label = f"{piece.start:#x}" + ("" if times is None else f"  x{times:,.0f}")
            label = label if piece.cycles >= NARROW * cycles else ""
            axes.annotate(label, ((start + stop) / 2, 0), (0, 3), ha="center", fontsize=8,
                          textcoords="offset points")  # fmt: skip
        start = stop
    return shades
