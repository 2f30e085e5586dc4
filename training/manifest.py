"""What a saved step consists of: every file with its size and sha256, so that damage is noticed.

The manifest is written last, into the step's folder. It is a line of JSON, {"format", "step",
"run", "files": {path: [bytes, sha256]}}, and a line with the sha256 of the first one; a later
format must keep that second line. Only JSON is ever parsed.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Collection, Iterable
from typing import NamedTuple

FORMAT = 1
NAME = "manifest.jsonl"
THREADS = min(8, os.cpu_count() or 1)  # hashlib lets others run while it hashes
NAMED = 3  # files named in one sentence
EXTRA = "does not belong to it"
TICK = 50_000_000  # nanoseconds; Linux tells the times of files in steps of up to 10 ms

Files = dict[str, list]  # {path in the step: [bytes, sha256]}, as JSON
# {(the manifest's sha256, path): what the system said of the file when its content was right}
Seen = dict[tuple[str, str], tuple]


class Unsound(ValueError):
    """A manifest cannot be trusted, or there is none; a phrase that says why."""


class Manifest(NamedTuple):
    """step: the number it was saved as. run: the token of its run. digest: of the manifest."""

    step: int
    run: str
    files: Files
    digest: str


def write(folder: pathlib.Path, *, step: int, run: str, files: Files | None = None) -> Manifest:
    """Seals the folder; `files` are hashed here if they are not given. Atomic and on the disk."""
    files = digests(folder, listing(folder), flush=True) if files is None else files
    body = {"format": FORMAT, "step": step, "run": run, "files": dict(sorted(files.items()))}
    line = json.dumps(body).encode()
    for path in {folder, *(parent for name in files for parent in (folder / name).parents)}:
        if path.is_relative_to(folder):
            sync(path)
    replace(folder / NAME, line + b"\n" + _seal(line))
    return Manifest(step, run, files, _digest(line))


def read(folder: pathlib.Path) -> Manifest:
    """The manifest of a step. Raises Unsound if it is absent, damaged or of a newer format."""
    try:
        line, _, seal = (folder / NAME).read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        raise Unsound(
            "it has no manifest, as a step of an older version or another program has none; "
            "--trust opens it unverified"
        ) from None
    except OSError as error:
        raise Unsound(f"{NAME} cannot be read: {error.strerror}") from error
    if seal != _seal(line):
        raise Unsound(f"{NAME} is damaged")
    try:
        body = json.loads(line)
        if body["format"] > FORMAT:
            raise Unsound(f"its format is {body['format']} and this version knows {FORMAT}")
        files = {path: [int(size), str(digest)] for path, (size, digest) in body["files"].items()}
        return Manifest(int(body["step"]), str(body["run"]), files, _digest(line))
    except (KeyError, TypeError, AttributeError) as error:
        raise Unsound(f"{NAME} is not a manifest of Meshwork") from error


def verify(
    folder: pathlib.Path,
    *,
    step: int | None = None,
    run: str | None = None,
    items: Collection[str] | None = None,
    contents: bool = True,
    seen: Seen | None = None,
) -> list[str]:
    """Phrases that say what is wrong with a step; none if it is what was saved.

    step, run: the number and the token that its manifest must have.  items: folders in it that
    are looked at, all files if None.  contents: False compares names and sizes alone.  seen:
    files found right earlier, which are read again only if the system says that they changed;
    grows.
    """
    try:
        manifest = read(folder)
    except Unsound as error:
        return [str(error)]
    if step is not None and manifest.step != step:
        return [f"it was saved as step {manifest.step}"]
    if run is not None and manifest.run != run:
        return [f"it is of another run ({manifest.run} and not {run})"]
    chosen = lambda path: items is None or path.partition("/")[0] in items
    wanted = {path: entry for path, entry in manifest.files.items() if chosen(path)}
    there = {path: stat for path, stat in _stats(folder).items() if chosen(path)}
    wrong = [f"{path} is missing" for path in wanted if path not in there]
    strange = [path for path in there if path not in wanted and not _is_hidden(path)]
    wrong += [f"{path} {EXTRA}" for path in strange]
    for path in wanted.keys() & there.keys():
        size, now = wanted[path][0], there[path][0]
        if now != size:
            wrong.append(f"{path} has {now:,} bytes and not {size:,}")
            del there[path]
    if contents:
        there = {path: stat for path, stat in there.items() if path in wanted}
        wrong += _damaged(folder, manifest, there, {} if seen is None else seen)
    return sorted(wrong)


def _damaged(
    folder: pathlib.Path, manifest: Manifest, there: dict[str, tuple], seen: Seen
) -> list[str]:
    """A phrase for every one of these files whose content is not what was saved."""

    def judge(path: str) -> str:
        try:
            _, digest = _hash(folder / path)
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        right = digest == manifest.files[path][1]
        return "" if right else f"{path} is damaged (its sha256 is another)"

    unread = [path for path, stat in there.items() if seen.get((manifest.digest, path)) != stat]
    phrases = dict(zip(unread, _map(judge, unread), strict=True))
    for path, phrase in phrases.items():
        if not phrase and _settled(there[path]):
            seen[manifest.digest, path] = there[path]
    return [phrase for phrase in phrases.values() if phrase]


def remember(folder: pathlib.Path, manifest: Manifest, seen: Seen) -> None:
    """Notes files that this process has written and hashed as right."""
    for path, stat in _stats(folder).items():
        if path in manifest.files and _settled(stat):
            seen[manifest.digest, path] = stat


def told(phrases: list[str], named: int = NAMED) -> str:
    """Several phrases as one; long lists are cut."""
    more = f"; and {len(phrases) - named} more" if len(phrases) > named else ""
    return "; ".join(phrases[:named]) + more


def listing(folder: pathlib.Path) -> list[str]:
    """Paths of the files in a step, but for the manifest, with / between their parts."""
    return sorted(_stats(folder))


def digests(folder: pathlib.Path, paths: Iterable[str], *, flush: bool = False) -> Files:
    """The entries of these files, hashed by several threads; flush: put on the disk before."""
    paths = list(paths)
    hashed = _map(lambda path: _hash(folder / path, flush=flush), paths)
    return {path: list(entry) for path, entry in zip(paths, hashed, strict=True)}


def replace(path: pathlib.Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all, whatever is cut off when."""
    half = path.with_name(path.name + ".tmp")
    with half.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)
    sync(path.parent)


def sync(folder: pathlib.Path) -> None:
    """Names in the folder are on the disk when this returns, where its file system can say so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _hash(path: pathlib.Path, *, flush: bool = False) -> tuple[int, str]:
    with path.open("rb", buffering=0) as file:
        if flush:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _stats(folder: pathlib.Path) -> dict[str, tuple]:
    """{path: (bytes, times, inode)} of all files below; what vanishes meanwhile is left out."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                stat = os.stat(os.path.join(parent, name))
                path = pathlib.Path(parent, name).relative_to(folder).as_posix()
                found[path] = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    found.pop(NAME, None)
    return found


def _is_hidden(path: str) -> bool:
    """Whether it is what file systems and browsers of them leave behind, such as .nfs0001."""
    return path.rpartition("/")[2].startswith(".")


def _settled(stat: tuple) -> bool:
    """Whether a later change would show in the file's times, whose clock may tick rarely."""
    _, *times, _ = stat
    return time.time_ns() - max(times) > TICK


def _map(function, items: list) -> list:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _seal(line: bytes) -> bytes:
    return _digest(line).encode() + b"\n"
