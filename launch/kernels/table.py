"""The table of predictions: rows as JSON, printed as Markdown."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

TPU = ("ms", "TFLOP/s", "of MXU bound", "schedule ms", "HBM ms", "MXU ms")
SLOTS = {"MXU": "MXU", "XLU": "XLU", "VALU": "VALU", "EUP": "EUP", "VLOAD": "VLD", "VSTORE": "VST"}
TPU_MORE = ("spills", "VMEM MiB", "temp MiB")
GPU = ("floor ms", "HBM ms", "MMA ms", "registers", "spills B", "shared KiB", "wgmma", "TMA in")
GPU_MORE = ("TMA out", "temp MiB")
NOTES = """\
`ms` is predicted by the compiler's schedule: the larger of `schedule ms` (cycles of every piece of
the program x how often it runs / cores / clock) and `HBM ms` (fewest bytes / bandwidth). `MXU ms`
is useful FLOPs / peak, `of MXU bound` that over `ms`. MXU to VST are shares of each unit's slots in
use over all cycles. `spills` are stores of registers that a core runs. Not counted: waits for HBM
within a grid step, launches, and what XLA does around a kernel; see launch/kernels/predict.py for
how predictions compare with published times. On GPUs no time is predicted: floors, what ptxas says
of the kernels, and the instructions of their programs (a loop's counted once)."""
HEADING = "# Kernels, as their compilers see them"
COMMAND = "`uv run --extra aot kernels --all` writes this page, on any machine."
MIB = 2**20


def markdown(rows: Iterable[Mapping]) -> str:
    """Tables of the rows, one a platform, and notes."""
    rows, parts = list(rows), []
    for head, which in ((TPU + tuple(SLOTS.values()) + TPU_MORE, _tpu), (GPU + GPU_MORE, _gpu)):
        chosen = [row for row in rows if which(row) is not None]
        if chosen:
            heading = ("op", "spec", "pass", "implementation", "target", *head)
            parts.append(_table(heading, [_names(row) + which(row) for row in chosen]))
    failed = [
        f"- {' '.join(filter(None, _names(row)))}: {row['error']}" for row in rows if "error" in row
    ]
    parts += ["\n".join(failed)] if failed else []
    parts += [NOTES] if len(failed) < len(rows) else []
    return "\n\n".join([*parts, *_compilers(rows)]) + "\n"


def _compilers(rows: Iterable[Mapping]) -> list[str]:
    """What made the rows, as one line; none where they do not say."""
    known = {item for row in rows for item in row.get("compilers", {}).items()}
    return [f"Compiled with {', '.join(f'{n} {v}' for n, v in sorted(known))}."] if known else []


def _names(row: Mapping) -> tuple[str, ...]:
    return tuple(row[name] for name in ("op", "spec", "pass", "implementation", "target"))


def _tpu(row: Mapping) -> tuple[str, ...] | None:
    if "ms" not in row:
        return None
    use = (f"{row['use'].get(name, 0):.0%}" for name in SLOTS)
    times = (f"{row[name]:.3f}" for name in ("schedule", "hbm", "mxu"))
    sizes = f"{row['vmem'] / MIB:.1f}", f"{row['temporaries'] / MIB:.0f}"
    ms = f"{row['ms']:.3f}" + ("" if row["counted"] else " (at most)")
    return (
        ms,
        f"{row['tflops']:.0f}",
        f"{row['share']:.0%}",
        *times,
        *use,
        f"{row['spills']:,}",
        *sizes,
    )


def _gpu(row: Mapping) -> tuple[str, ...] | None:
    if "registers" not in row:
        return None
    floors = max(row["hbm"], row["mxu"]), row["hbm"], row["mxu"]
    spills = row["spill_stores"] + row["spill_loads"]
    count = lambda *names: sum(_number(k[n]) for k in row["kernels"].values() for n in names)
    counts = count("wgmma"), count("tma_loads"), count("tma_stores", "tma_reductions")
    sizes = f"{row['shared'] / 1024:.0f}", *map(str, counts), f"{row['temporaries'] / MIB:.0f}"
    return (*(f"{ms:.3f}" for ms in floors), str(row["registers"]), f"{spills}", *sizes)


def _number(count: int | Mapping[str, int]) -> int:
    return sum(count.values()) if isinstance(count, Mapping) else count


def _table(heading: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heading, *cells, strict=True)]
    pad = lambda row: (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    lines = [f"| {' | '.join(pad(row))} |" for row in (heading, *cells)]
    return "\n".join([lines[0], rule, *lines[1:]])


def load(path: pathlib.Path) -> dict[str, list[dict]]:
    """{case's key: its rows} of a record; {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}


def _line(item: tuple[str, Sequence[Mapping]]) -> str:
    """A line a row, so that a difference of two records can be read."""
    key, rows = item
    return f"{json.dumps(key)}: [\n{',\n'.join(f' {json.dumps(row)}' for row in rows)}]"


def save(path: pathlib.Path, cases: Mapping[str, Sequence[Mapping]]) -> None:
    """Writes the record and, beside it, the table in Markdown. Sorted, and replaced as a whole."""
    ordered = dict(sorted(cases.items()))
    rows = (row for found in ordered.values() for row in found)
    texts = {
        path: f'{{"cases": {{\n{",\n".join(map(_line, ordered.items()))}\n}}}}\n',
        path.with_suffix(".md"): f"{HEADING}\n\n{COMMAND}\n\n{markdown(rows)}",
    }
    for name, text in texts.items():
        part = name.with_name(f"{name.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(name)
