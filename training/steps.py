"""The folder of a run's checkpoints: what the names in it mean, and how they change.

A step's folder has its number for a name, and gets it by a rename once everything is in it, the
manifest included. A step that goes loses its name first. So what has a number is whole, whatever
was cut off when; the rest, and what Orbax leaves, is swept away by the next save.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import secrets
import shutil
import time
from collections.abc import Iterable

from training import manifest

RUN = "run.json"
COMMITTED = "commit_success.txt"  # Orbax's own mark, which old steps have and no manifest
LEFT = re.compile(
    r"\d+\.saving(\..*)?|\d+\.removed-\w+|\d+\.orbax-checkpoint-tmp.*|\.probe-\d+|run\.json\.tmp"
)


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found, or made to fit; one sentence with the path."""


def numbers(folder: pathlib.Path) -> list[int]:
    """All that have the name of a step, ascending, whether they are sound or not."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir()]
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def has_mark(path: pathlib.Path) -> bool:
    """Whether Orbax says that it finished; of a step that is trusted, this must do."""
    return (path / COMMITTED).is_file() and (path / "meta" / "metadata").is_file()


def saving(folder: pathlib.Path, step: int) -> pathlib.Path:
    """Where a step is until it is whole."""
    return folder / f"{step}.saving"


def put(saved: pathlib.Path, target: pathlib.Path) -> None:
    """Gives a whole step its name, on the disk when this returns. Raises OSError."""
    os.rename(saved, target)
    manifest.sync(target.parent)


def remove(path: pathlib.Path) -> None:
    """Removes a step, of which no reader ever finds a half. Raises OSError."""
    unnamed = path.with_name(f"{path.name}.removed-{secrets.token_hex(4)}")
    os.rename(path, unnamed)
    manifest.sync(path.parent)
    shutil.rmtree(unnamed)


def set_aside(path: pathlib.Path) -> pathlib.Path:
    """Takes a step's name from something that may be of use to somebody; its new path."""
    aside = path.with_name(f"{path.name}.aside-{secrets.token_hex(4)}")
    os.rename(path, aside)
    manifest.sync(path.parent)
    return aside


def sweep(folder: pathlib.Path) -> list[OSError]:
    """Removes what was cut off while it was written or removed; what cannot be, is told."""
    failed = []
    for path in folder.iterdir():
        if not LEFT.fullmatch(path.name):
            continue
        try:
            _discard(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            failed.append(error)
    return failed


def _discard(path: pathlib.Path, tries: int = 5) -> None:
    """Removes a file or folder, into which a failed save may still be writing."""
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY or tries == 1:
            raise
        time.sleep(0.02)
        _discard(path, tries - 1)


def probe(folder: pathlib.Path, process: int) -> None:
    """Raises OSError where this process could not save."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".probe-{process}"
    path.write_bytes(b"")
    path.unlink()


def surplus(
    ours: Iterable[int], sound: Iterable[int], keep: int, keep_every: int | None
) -> list[int]:
    """Which of a run's steps go, so that the newest `keep` sound ones stay, and multiples."""
    kept = sorted(sound)[-keep:]
    older = [step for step in sorted(ours) if len(kept) == keep and step < kept[0]]
    return [step for step in older if keep_every is None or step % keep_every]


def run_id(folder: pathlib.Path) -> str | None:
    """The token of the run whose folder this is; None where nothing says it yet.

    It stands in run.json; where that is missing or unreadable, all steps must agree. Raises
    CheckpointError if they do not.
    """
    if (named := _named(folder)) is not None:
        return named
    runs: dict[str, list[int]] = {}
    for step in numbers(folder):
        with contextlib.suppress(manifest.Unsound):
            runs.setdefault(manifest.read(folder / str(step)).run, []).append(step)
    if len(runs) > 1:
        told = "; ".join(f"{', '.join(map(str, steps))} of {run}" for run, steps in runs.items())
        raise CheckpointError(
            f"steps in {folder} are of several runs ({told}), and {RUN}, which says whose folder "
            "it is, is missing; move the others away"
        )
    return next(iter(runs), None)


def name_run(folder: pathlib.Path) -> str:
    """`run_id`, written down; a new one where there is none."""
    run = run_id(folder) or secrets.token_hex(8)
    if _named(folder) != run:
        manifest.replace(folder / RUN, json.dumps({"run": run}).encode() + b"\n")
    return run


def _named(folder: pathlib.Path) -> str | None:
    try:
        return str(json.loads((folder / RUN).read_bytes())["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
