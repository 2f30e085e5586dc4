"""Saving a step in the background: Orbax's files, their manifest, the step's name, retention.

The order is what makes it safe. Orbax writes into `<step>.saving` and commits; every process
hashes what it wrote; the manifest is put beside it; the folder gets the step's number by one
rename; only then old steps go. A save that is cut off anywhere leaves every earlier step alone.
"""

import contextlib
import json
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from training import manifest, steps
from training.agree import Agreement, PeerError
from training.quiet import cause, fix, orbax, together
from training.steps import CheckpointError
from training.verified import Verified

# Files of one process, in Orbax's folders of arrays.
OWNED = re.compile(r"[^/]+/(?:ocdbt\.|array_metadatas/)process_(\d+)(?:/.*)?")
TIMEOUT = 1800  # seconds that Orbax waits for the writes of other processes
VISIBLE = 60.0  # seconds that a network disk's client may remember what was not there


class Saver:
    """Writes steps one at a time; several processes write one step together.

    keep, keep_every: as for `Checkpoints`.
    """

    def __init__(self, there: Verified, *, keep: int | None, keep_every: int | None):
        self.folder, self._there = there.folder, there
        self._keep, self._keep_every = keep, keep_every
        self._agreement, self._orbax, self._run = Agreement(), None, ""
        self._thread, self._error, self._complained = None, None, False

    def start(self, step: int, args: dict[str, Any]) -> None:
        """Returns once all arrays are copied to the host; nothing else may be running.

        args: {item: its arguments for Orbax}. Raises CheckpointError if it cannot be begun.
        """
        try:
            self._agreement.lead(lambda: self._prepare(step))
        except PeerError as error:
            raise CheckpointError(str(error)) from error
        try:
            self._orbax = self._orbax or self._open()
            path = steps.saving(self.folder, step)
            self._orbax.save(path, args=orbax().args.Composite(**args))
        except Exception as error:
            raise self._failed(step, error) from error
        self._thread = threading.Thread(target=self._finish, args=(step,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is running. Raises CheckpointError if the last save failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """`wait`, and the end of Orbax's threads."""
        try:
            self.wait()
        finally:
            self._close()

    def _close(self) -> None:
        checkpointer, self._orbax = self._orbax, None
        if checkpointer is not None:
            # It keeps errors of a failed save, which has been told, and raises them again.
            with contextlib.suppress(Exception):
                checkpointer.close()

    def _open(self):
        ocp = orbax()
        options = ocp.AsyncOptions(
            timeout_secs=TIMEOUT,
            # A process whose writes failed ends the waiting of the others.
            barrier_sync_fn=lambda *, key, timeout_ms: self._agreement.meet(),
            create_directories_asynchronously=False,
        )
        own = ocp.CompositeOptions(async_options=options, **together())
        handler = ocp.CompositeCheckpointHandler(composite_options=own)
        return ocp.AsyncCheckpointer(handler, async_options=options, **together())

    def _prepare(self, step: int) -> None:
        self._there.allow(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self._run = steps.name_run(self.folder)
        except OSError as error:
            raise self._sentence(step, cause(error)) from error

    def _finish(self, step: int) -> None:
        saved = steps.saving(self.folder, step)
        try:
            self._orbax.wait_until_finished()
            parts = self._agreement.meet(json.dumps(self._hash(saved)))
            if self._agreement.leads:
                self._commit(step, saved, [json.loads(part) for part in parts])
            self._agreement.meet()
        except BaseException as error:
            # First without a look at the folder, which may be what failed.
            self._error = CheckpointError(f"step {step} cannot be saved: {cause(error)}")
            with contextlib.suppress(OSError):
                self._error = self._failed(step, error)
            self._error.__cause__ = error
            return
        if self._agreement.leads:
            self._retain(step)

    def _hash(self, saved: pathlib.Path) -> manifest.Files:
        """Of the files that this process wrote; the leader's are all that nobody else wrote."""

        def mine(path: str) -> bool:
            owned = OWNED.fullmatch(path)
            owner = int(owned[1]) if owned else 0
            return owner == self._agreement.process

        _soon(lambda: saved.name in os.listdir(saved.parent))
        paths = [path for path in manifest.listing(saved) if mine(path)]
        return manifest.digests(saved, paths, flush=True)

    def _commit(self, step: int, saved: pathlib.Path, parts: list[manifest.Files]) -> None:
        files = {path: entry for part in parts for path, entry in part.items()}
        differing = lambda: set(files) ^ set(manifest.listing(saved))
        if not _soon(lambda: not differing()):
            raise OSError(f"not every process sees the same files in {saved}: {min(differing())}")
        sealed = manifest.write(saved, step=step, run=self._run, files=files)
        target = self.folder / str(step)
        fate = self._there.allow(step)
        if fate == "remove":
            steps.remove(target)
        elif fate == "set aside":
            aside = steps.set_aside(target)
            print(f"note: what was step {step} in {self.folder} is {aside} now", file=sys.stderr)
        steps.put(saved, target)
        self._there.skipped.pop(step, None)
        manifest.remember(target, sealed, self._there.seen)

    def _retain(self, step: int) -> None:
        """Removes what need not stay; a step that is not whole does not count as one that stays."""
        if self._keep is None:
            return
        try:
            ours = [s for s in steps.numbers(self.folder) if s <= step and self._is(s, whole=False)]
            sound = [s for s in ours if s not in self._there.skipped and self._is(s, whole=True)]
            for number in steps.surplus(ours, sound, self._keep, self._keep_every):
                steps.remove(self.folder / str(number))
        except OSError as error:
            self._complain(error)

    def _is(self, step: int, *, whole: bool) -> bool:
        """Whether the step is this run's; whole: with all its files, in their sizes."""
        given = dict(step=step, run=self._run, contents=False, items=None if whole else ())
        return not manifest.verify(self.folder / str(step), **given)

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        """The error as a sentence, once the others have it and the room is free again."""
        words = str(error) if isinstance(error, (PeerError, CheckpointError)) else cause(error)
        if not isinstance(error, PeerError):
            try:
                self._agreement.meet(error=words)
            except Exception as told:
                words = str(told) if isinstance(told, PeerError) else words
        self._close()
        if self._agreement.leads and self.folder.is_dir():
            steps.sweep(self.folder)  # writes still under way may undo it, until the next save
        return error if isinstance(error, CheckpointError) else self._sentence(step, words)

    def _sentence(self, step: int, words: str) -> CheckpointError:
        before = set(steps.numbers(self.folder)) - {step, *self._there.skipped}
        last = f"; step {max(before)} is the last one saved" if before else ""
        what = f"step {step} cannot be saved in {self.folder}"
        return CheckpointError(f"{what}: {words}{fix(words)}{last}")

    def _sweep(self) -> None:
        if failed := steps.sweep(self.folder):
            self._complain(failed[0])

    def _complain(self, error: Exception) -> None:
        """On a network disk a file that is being read elsewhere may stay for a while."""
        if not self._complained:
            told = f"note: {self.folder} is to be tidied up at the next save: {error}"
            print(told, file=sys.stderr)
        self._complained = True


def _soon(true: Callable[[], bool]) -> bool:
    """Whether it is, or becomes so while another machine's files come into sight."""
    until = time.monotonic() + VISIBLE
    while not (so := true()) and time.monotonic() < until:
        time.sleep(0.5)
    return so
