"""What must hold after every kill. Each function returns how much it compared, or raises."""

import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.chaos.evidence import MANIFEST

# Metrics of how fast a run goes and of how much memory it takes, which no two lives share.
MEASURED = re.compile(r"time|mfu|.*(second|memory|bytes_in_use|goodput).*")

PARTED = (0, 2, 3)  # finished; nobody answered its call; another process is lost


class Violation(Exception):
    """A promise that was broken; one sentence with the evidence."""


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what is measured, its numbers to the last bit."""
    return {name: _bits(value) for name, value in row.items() if not MEASURED.fullmatch(name)}


def _bits(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value


def rows(found: Sequence[Mapping], wanted: Sequence[Mapping], *, whole: bool = False) -> int:
    """Rows compared: `found` must be what `wanted` begins with, or all of it.

    Raises Violation, which names the first row and metric that differ.
    """
    for number, row in enumerate(found):
        if number == len(wanted):
            names = ", ".join(name for name in row if name not in ("step", "tokens", "time"))
            raise Violation(
                f"metrics.jsonl goes on with a row of step {row['step']} ({names}) where the "
                "reference has ended"
            )
        _same_row(plain(row), plain(wanted[number]), row, wanted[number])
    if whole and len(found) < len(wanted):
        raise Violation(
            f"metrics.jsonl has {len(found)} of {len(wanted)} rows; the first one that is missing "
            f"is of step {wanted[len(found)]['step']}"
        )
    return len(found)


def _same_row(mine: Mapping, its: Mapping, row: Mapping, wanted: Mapping) -> None:
    if mine == its:
        return
    if mine["step"] != its["step"]:
        raise Violation(
            f"metrics.jsonl has a row of step {mine['step']} where the reference has step "
            f"{its['step']}"
        )
    name = next(n for n in [*mine, *its] if mine.get(n) != its.get(n))
    raise Violation(
        f"step {row['step']} has {name} {row.get(name)!r} ({mine.get(name)}) and the reference "
        f"{wanted.get(name)!r} ({its.get(name)})"
    )


def resumed(step: int, newest: int) -> None:
    """A life must go on from the newest finished checkpoint, or from a later one."""
    if step < newest:
        raise Violation(
            f"the run went on from step {step} although step {newest} had been saved before the "
            "kill"
        )


def kept(before: Sequence[int], after: Sequence[int], every: Mapping) -> None:
    """No finished checkpoint may go but by retention."""
    if max(after, default=0) < max(before, default=0):
        raise Violation(
            f"step {max(before)} was saved and after the next kill the newest checkpoint is "
            f"{max(after, default='none')}"
        )
    keep, always = every["keep"], every["keep_every"]
    if len(after) < min(len(before), len(before) if keep is None else keep):
        raise Violation(f"of the checkpoints {_listed(before)} only {_listed(after)} are left")
    forever = [step for step in before if always is not None and step % always == 0]
    for step in sorted({*forever} - {*after}):
        raise Violation(f"the checkpoint of step {step} is gone, which is kept for good")


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def lost(logged: int, newest: int, save_every: int | None) -> int:
    """Steps that a kill undoes. The save before the one that is due has always ended."""
    steps = logged - newest
    if save_every is not None and steps > 2 * save_every:
        raise Violation(
            f"step {logged} was logged and the newest checkpoint is of step {newest}, more than "
            f"twice {save_every} steps before"
        )
    return steps


def parted(rank: int, status: int, words: str) -> None:
    """A process that has lost another one ends with a sentence, or had ended before."""
    if status not in PARTED:
        raise Violation(f"process {rank} ended with status {status} after the kill: {words}")


def sound(folder: pathlib.Path) -> int:
    """Bytes of a finished checkpoint, whose files must be those of its manifest."""
    try:
        line, _, seal = (folder / MANIFEST).read_bytes().partition(b"\n")
        wanted = json.loads(line)["files"]
    except (OSError, ValueError, KeyError) as error:
        raise Violation(f"{folder} has no manifest to be read: {error!r}") from error
    if seal.strip().decode() != hashlib.sha256(line).hexdigest():
        raise Violation(f"the manifest of {folder} is not the one that was written")
    there = {path for path in folder.rglob("*") if path.is_file()} - {folder / MANIFEST}
    names = {path.relative_to(folder).as_posix() for path in there}
    _same(f"the list of files in {folder}", sorted(names), sorted(wanted), "its manifest's")
    for name, (size, digest) in wanted.items():
        content = (folder / name).read_bytes()
        if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
            raise Violation(f"{folder / name} is not what its manifest says")
    return sum(size for size, _ in wanted.values())


def finals(mine: pathlib.Path, reference: pathlib.Path, step: int) -> int:
    """Arrays compared: the last checkpoints and the final scores of two runs must be the same."""
    _same("the final score", *(_json(folder / "final.json") for folder in (mine, reference)))
    saved = [folder / "checkpoints" / str(step) for folder in (mine, reference)]
    metas = [_json(folder / "meta" / "metadata") for folder in saved]
    for name in ("data", "shapes"):
        _same(f"{name!r} in the last checkpoint", *(meta.get(name) for meta in metas))
    return same_arrays(*(_arrays(folder, metas[0]["shapes"]) for folder in saved))


def same_arrays(mine: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> int:
    """How many there are. Raises Violation for the first one that differs in a bit."""
    _same("the list of arrays in the last checkpoint", sorted(mine), sorted(wanted))
    for name, array in mine.items():
        other = wanted[name]
        _same(f"the type of {name}", *((str(x.dtype), x.shape) for x in (array, other)))
        if array.tobytes() != other.tobytes():
            parts = (np.frombuffer(x.tobytes(), np.uint8) for x in (array, other))
            count = np.unique(np.flatnonzero(np.not_equal(*parts)) // array.itemsize).size
            raise Violation(f"{name} of the last checkpoint differs in {count} of {array.size}")
    return len(mine)


def _same(what: str, mine: Any, wanted: Any, whose: str = "the reference's") -> None:
    if mine != wanted:
        raise Violation(f"{what} is {mine!r} and {whose} {wanted!r}")


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Violation(f"{path} cannot be read: {error!r}") from error


def _arrays(folder: pathlib.Path, shapes: Mapping[str, Mapping]) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, {item/key: array}, read by Orbax alone."""
    from training.quiet import orbax

    ocp, found = orbax(), {}
    for item, keys in shapes.items():
        if keys:
            numpy = {key: ocp.RestoreArgs(restore_type=np.ndarray) for key in keys}
            args = ocp.args.PyTreeRestore(item=dict.fromkeys(keys, 0), restore_args=numpy)
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                tree = reader.restore(folder / item, args=args)
            found |= {f"{item}/{key}": np.asarray(leaf) for key, leaf in tree.items()}
    return found
