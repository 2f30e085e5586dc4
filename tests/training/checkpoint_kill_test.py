"""A save that is killed anywhere leaves what was there, or what it saved, and nothing between.

A kill leaves the files as they are. So a copy of the folder is taken before every change that the
process makes to it, and each copy is what a kill at that moment would have left.
"""

import os
import pathlib
import shutil
import sys
import threading

import optax
import pytest

from tests.training.states import abstract, bits, make, save
from training import manifest
from training.checkpoint import Checkpoints

OLDER, NEWER, NEXT = (make(step, seed=step, tx=optax.sgd(0.1)) for step in (3, 6, 9))
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open")
_watching: list = []


def _hook(event, arguments):
    if event in CHANGES and _watching:
        _watching[0](event, arguments)


@pytest.fixture(scope="module")
def hook():
    sys.addaudithook(_hook)  # for good, so that it must cost nothing while nobody watches


class Copies:
    """A copy of `folder` before every change below it."""

    def __init__(self, folder: pathlib.Path, into: pathlib.Path):
        self.folder, self.into, self.made, self._seen = folder, into, [], 0
        self._inside, self._lock = threading.local(), threading.Lock()

    def __call__(self, event, arguments):
        if getattr(self._inside, "copying", False) or not self._counts(event, arguments):
            return
        self._inside.copying = True
        try:
            with self._lock:
                self._copy(self.into / str(len(self.made)))
        finally:
            self._inside.copying = False

    def _counts(self, event, arguments):
        name = arguments[0]
        if event == "open" and (not isinstance(name, str) or arguments[2] & os.O_ACCMODE == 0):
            return False
        inside = not os.path.isabs(os.fspath(name)) or str(self.folder) in os.fspath(name)
        self._seen += inside
        # Trees go file by file, of which some will do.
        return inside and (event not in ("os.remove", "os.rmdir") or self._seen % 6 == 0)

    def _copy(self, into):
        for parent, _, names in os.walk(self.folder):
            target = into / os.path.relpath(parent, self.folder)
            target.mkdir(parents=True)
            for name in names:
                try:
                    shutil.copy(os.path.join(parent, name), target)
                except FileNotFoundError:
                    continue  # Orbax's threads go on meanwhile
        self.made.append(into)


def places(copy):
    """What a kill left, in words, so that the test shows which moments it has seen."""
    names = os.listdir(copy / "checkpoints")
    yield from (name.partition("-")[0] for name in names if "." in name)
    for path in (copy / "checkpoints").glob("*.saving"):
        yield "sealed" if (path / manifest.NAME).exists() else "committed"


def check(copy, capsys, damaged):
    """The step that a new process finds; the next one can be saved, and then it stands alone."""
    with Checkpoints(copy, keep=1) as checkpoints:
        step = checkpoints.latest()
        notes = capsys.readouterr().err.splitlines()
        assert len(notes) == (step == 3 and damaged and (copy / "checkpoints" / "6").exists())
        yield step
        state = {3: OLDER, 6: NEWER}[step]
        assert bits(checkpoints.restore(step, abstract(state))[0]) == bits(state)
        checkpoints.save(NEWER if step == 3 else NEXT, {})
    assert sorted(os.listdir(copy / "checkpoints")) == sorted([str(step + 3), "run.json"])


@pytest.mark.parametrize("damaged", [False, True])
def test_killed_before_any_change(tmp_path, hook, capsys, damaged):
    """The save of step 6, in whose place a damaged one may be, and retention of step 3 after it."""
    run, copies = tmp_path / "run", Copies(tmp_path / "run", tmp_path / "copies")
    save(run, OLDER, *[NEWER] * damaged)
    if damaged:
        os.truncate(run / "checkpoints" / "6" / "meta" / "metadata", 3)
    with Checkpoints(run, keep=1) as checkpoints:
        assert checkpoints.latest() == 3
        assert len(capsys.readouterr().err.splitlines()) == damaged
        _watching.append(copies)
        try:
            checkpoints.save(NEWER, {})
            checkpoints.wait()
        finally:
            _watching.clear()
    seen, last = {}, 3
    for copy in copies.made:
        moment = tuple(sorted(set(places(copy))))
        checked = check(copy, capsys, damaged)
        step = next(checked)
        assert step >= last  # what is once saved is never lost
        if (moment, step) not in seen:
            assert list(checked) == []
        seen[moment, step] = last = step
    assert last == 6
    moments = {name for moment, _ in seen for name in moment}
    assert moments >= {"3.removed", "6.saving", "6.saving.orbax", "committed", "sealed"}
    assert ("6.removed" in moments) == damaged
