"""What a save does in the background, and what becomes of an error there."""

import os
import threading

import optax
import pytest
from orbax.checkpoint._src.metadata.checkpoint import _MetadataStoreImpl

from tests.training.states import bits, make, save
from training import manifest, saver, steps
from training.checkpoint import CheckpointError, Checkpoints

FIRST, SECOND, THIRD = (make(step, seed=step, tx=optax.sgd(0.1)) for step in (1, 2, 3))
# In Orbax, whose threads keep an error, and in each part of what comes after it.
POINTS = [
    (_MetadataStoreImpl, "write"),
    (saver.Saver, "_hash"),
    (manifest, "write"),
    (steps, "put"),
    (os, "fsync"),
]


def full(*args, **own):
    raise OSError(28, "No space left on device")


def test_saving_goes_on_in_the_background(tmp_path, monkeypatch):
    """Of the hash, the manifest, the name and retention nothing has happened when save returns."""
    hashing, real, done = threading.Event(), manifest.digests, []

    def wait(*args, **own):
        assert hashing.wait(60)
        done.append(threading.current_thread())
        return real(*args, **own)

    save(tmp_path, FIRST)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        monkeypatch.setattr(manifest, "digests", wait)
        checkpoints.save(SECOND, {})
        assert (checkpoints.steps(), checkpoints.latest(), done) == ([1], 1, [])
        hashing.set()
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.latest()) == ([2], 2)
    assert done != [threading.current_thread()]


@pytest.mark.parametrize(
    ("owner", "name"), POINTS, ids=[f"{owner.__name__}.{name}" for owner, name in POINTS]
)
def test_an_error_in_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch, owner, name):
    save(tmp_path, FIRST)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(SECOND, {})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            checkpoints.save(THIRD, {})
            with pytest.raises(CheckpointError) as caught:
                checkpoints.save(THIRD, {})
        assert str(caught.value) == (
            f"step 3 cannot be saved in {tmp_path / 'checkpoints'}: No space left on device; make "
            "room there, then run the same command again; step 2 is the last one saved"
        )
        assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2", "run.json"]
        checkpoints.save(THIRD, {})
    assert bits(Checkpoints(tmp_path).restore_params(None)[0]) == bits(THIRD.params)


def test_what_ended_the_run_comes_before_what_the_save_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(ZeroDivisionError):
        _end_while_saving(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: step 1 cannot be saved in {tmp_path / 'checkpoints'}: No space ")


def _end_while_saving(workdir):
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(FIRST, {})
        raise ZeroDivisionError


def test_a_folder_that_is_gone_is_still_an_error(tmp_path, monkeypatch):
    """What comes after the error looks at the folder too, and must not hide it."""
    save(tmp_path, FIRST)
    with Checkpoints(tmp_path) as checkpoints:
        for owner, name in ((saver.Saver, "_hash"), (steps, "numbers"), (steps, "sweep")):
            monkeypatch.setattr(owner, name, full)
        monkeypatch.setattr(saver.Saver, "_prepare", lambda self, step: None)
        checkpoints.save(SECOND, {})
        with pytest.raises(CheckpointError, match="step 2 cannot be saved"):
            checkpoints.wait()
        monkeypatch.undo()
