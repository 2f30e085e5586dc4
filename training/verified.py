"""Which steps of a folder are sound, and opening them so that what is read is what was saved."""

import pathlib
import sys
from collections.abc import Callable, Collection
from typing import Any

from training import manifest, steps
from training.agree import Agreement, PeerError
from training.quiet import cause, fix
from training.steps import CheckpointError

HASHING = 6 * 3600.0  # seconds that the first process may take to read a step of terabytes
Items = Collection[str] | None  # of a step those whose files are verified; None: all


class Verified:
    """The steps of a run. The first process verifies for all, which make the same calls.

    trust: nothing is verified, and steps without a manifest count too.  Files that were found
    right once are hashed again only if the system says that they changed.
    skipped: {step: why} of what was passed over; seen: as for `manifest.verify`.
    """

    def __init__(self, folder: pathlib.Path, *, trust: bool = False):
        self.folder, self._trust = folder, trust
        self.seen: manifest.Seen = {}
        self.skipped: dict[int, str] = {}
        self._agreement = Agreement()

    def finished(self) -> list[int]:
        """Numbers of the steps that were completed, ascending, whatever became of them since."""
        return [step for step in steps.numbers(self.folder) if self._is_finished(step)]

    def latest(self, items: Items = None) -> int | None:
        """The newest sound step; None where nothing looks like a step.

        Every step that is skipped is told on stderr, once. Raises CheckpointError with all of
        them if none is sound: a run must not begin anew beside steps that may be mended.
        """
        return self._lead(lambda: self._latest(items))

    def newest(self, read: Callable[[int], Any], items: Items = None) -> Any:
        """read(step) of the newest sound step; of a newer one where that is removed meanwhile.

        Raises CheckpointError if there is no step.
        """
        while True:
            step = self.latest(items)
            if step is None:
                raise CheckpointError(f"no finished checkpoint in {self.folder}")
            try:
                return read(step)
            except CheckpointError:
                # A training process beside this one may keep fewer steps than are read.
                if (self.folder / str(step)).exists():
                    raise

    def opened(self, step: int, items: Items, read: Callable[[pathlib.Path], Any]) -> Any:
        """read(folder of the step), with `items` verified before it and unchanged after it.

        Raises CheckpointError if there is no such step, if it is not sound, or what `read` raises.
        """
        self._lead(lambda: self._require(step, items))
        found, failed = None, None
        try:
            found = read(self.folder / str(step))
        except CheckpointError as error:
            advice = "; without --trust an earlier sound step is used" if self._trust else ""
            failed = CheckpointError(f"{error}{advice}")
        try:
            self._agreement.meet(error=str(failed or ""))
        except PeerError as error:
            # What was damaged or removed while it was read explains more than what came of it.
            self._lead(lambda: self._require(step, items))
            raise failed or CheckpointError(str(error)) from error
        self._lead(lambda: self._require(step, items))
        return found

    def allow(self, step: int) -> str:
        """What a save does with whatever has the name of this step: 'remove', 'set aside' or ''.

        Only what is known to be a damaged step of this run, and not just to hold more files than it
        should, may be removed. Raises CheckpointError
        for a sound one. For the first process alone.
        """
        path = self.folder / str(step)
        if not path.exists():
            return ""
        wrong = self._wrong(step, None)
        if not wrong:
            raise CheckpointError(
                f"step {step} is already in {self.folder}: remove it to save it again"
            )
        foreign = manifest.verify(path, step=step, run=steps.run_id(self.folder), items=())
        whole = all(phrase.endswith(manifest.EXTRA) for phrase in wrong)
        return "set aside" if foreign or whole else "remove"

    def probe(self) -> None:
        """Raises CheckpointError on every process if one of them may not write to the folder."""
        words = ""
        try:
            steps.probe(self.folder, self._agreement.process)
        except OSError as error:
            words = cause(error)
        try:
            self._agreement.meet(error=words)
        except PeerError as error:
            told = f"{self.folder} cannot be written: {error}{fix(str(error))}"
            raise CheckpointError(told) from error

    def _is_finished(self, step: int) -> bool:
        path = self.folder / str(step)
        return steps.has_mark(path) if self._trust else (path / manifest.NAME).is_file()

    def _lead(self, work: Callable[[], Any]) -> Any:
        try:
            return self._agreement.lead(work, timeout=HASHING)
        except PeerError as error:
            raise CheckpointError(str(error)) from error

    def _wrong(self, step: int, items: Items) -> list[str]:
        """What is wrong with a step, in phrases."""
        path = self.folder / str(step)
        if self._trust and not steps.has_mark(path):
            return ["Orbax did not finish it"]
        run = steps.run_id(self.folder)
        if self._trust:
            # Whose step it is, and which, costs nothing to see.
            return manifest.verify(path, step=step, run=run, items=()) if _sealed(path) else []
        return manifest.verify(path, step=step, run=run, items=items, seen=self.seen)

    def _require(self, step: int, items: Items) -> None:
        if not (self.folder / str(step)).exists():
            listed = ", ".join(map(str, self.finished()))
            only = f"checkpoint of step {step} in {self.folder}, only {listed}"
            raise CheckpointError(
                f"no {only}" if listed else f"no finished checkpoint in {self.folder}"
            )
        if wrong := self._wrong(step, items):
            told = manifest.told(wrong)
            raise CheckpointError(f"step {step} in {self.folder} is not sound: {told}")

    def _latest(self, items: Items) -> int | None:
        wrong: dict[int, str] = {}
        for step in reversed(steps.numbers(self.folder)):
            phrases = self._wrong(step, items)
            if not (self.folder / str(step)).exists():
                return self._latest(items)  # it has just been removed, so there is a newer one
            if not phrases:
                self._tell(wrong)
                self.skipped.pop(step, None)
                return step
            wrong[step] = manifest.told(phrases)
        if wrong:
            told = "; ".join(_grouped(wrong))
            raise CheckpointError(
                f"no step in {self.folder} is sound ({told}); put back a copy of one, choose "
                "another --workdir, or open the newest unverified with --trust"
            )
        return None

    def _tell(self, wrong: dict[int, str]) -> None:
        for step, phrase in wrong.items():
            if self.skipped.get(step) != phrase:
                told = f"note: step {step} in {self.folder} is skipped: {phrase}"
                print(told, file=sys.stderr)
        self.skipped |= wrong


def _sealed(path: pathlib.Path) -> bool:
    try:
        manifest.read(path)
    except manifest.Unsound:
        return False
    return True


def _grouped(wrong: dict[int, str]) -> list[str]:
    """What is wrong, each once, with the steps of which it is so."""
    of: dict[str, list[int]] = {}
    for step, phrase in wrong.items():
        of.setdefault(phrase, []).append(step)
    return [
        f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}: {phrase}"
        for phrase, steps in of.items()
    ]
