"""Saving beside what is there: steps that stay, go or are set aside, and those who read."""

import os
import shutil
import threading

import jax.numpy as jnp
import optax
import pytest

from tests.training.states import abstract, bits, save
from tests.training.states import make as full
from training import checkpoint, manifest, steps
from training.checkpoint import CheckpointError, Checkpoints


def make(step):
    """Every step has other values and few files."""
    return full(step, seed=step, tx=optax.sgd(0.1))._replace(aux={})


def params(workdir, step=None):
    with Checkpoints(workdir) as checkpoints:
        return bits(checkpoints.restore_params(step)[0])


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names(workdir):
    return sorted(os.listdir(workdir / "checkpoints"))


def spoil(workdir, step):
    """A bit of a parameter flips, which no size shows."""
    path = next((workdir / "checkpoints" / str(step) / "params").glob("d/*"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("trust", [False, True])
def test_a_sound_step_is_never_replaced(tmp_path, trust):
    save(tmp_path, make(3))
    before = contents(tmp_path)
    with Checkpoints(tmp_path, trust=trust) as checkpoints:
        with pytest.raises(CheckpointError, match=r"step 3 is already in .*: remove it to save it"):
            checkpoints.save(make(3), {})
        assert contents(tmp_path) == before
        checkpoints.save(make(4), {})
    assert names(tmp_path) == ["3", "4", "run.json"]


def test_a_step_that_is_mended_while_another_is_saved_stays(tmp_path, monkeypatch):
    save(tmp_path, make(6))
    good = contents(tmp_path)
    spoil(tmp_path, 6)

    def mend(*args, **own):
        for name, data in good.items():
            (tmp_path / name).write_bytes(data)
        return real(*args, **own)

    real = manifest.digests
    monkeypatch.setattr(manifest, "digests", mend)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(6), {})
        with pytest.raises(CheckpointError, match="step 6 is already in"):
            checkpoints.wait()
    assert contents(tmp_path) == good


def foreign(folder):
    save(folder.parent / "other", make(6))
    shutil.copytree(folder.parent / "other" / "checkpoints" / "6", folder / "6")


def bare(folder):
    foreign(folder)
    (folder / "6" / manifest.NAME).unlink()


def torn(folder):
    foreign(folder)
    os.truncate(folder / "6" / manifest.NAME, 9)


def plain(folder):
    (folder / "6").write_text("a file")


@pytest.mark.parametrize("there", [foreign, bare, torn, plain])
def test_what_may_be_of_use_to_somebody_is_set_aside(tmp_path, capsys, there):
    run = tmp_path / "run"
    save(run, make(3))
    there(run / "checkpoints")
    held = contents(run / "checkpoints" / "6")
    with Checkpoints(run, keep=1) as checkpoints:
        assert checkpoints.latest() == 3
        checkpoints.save(make(6), {})
    assert params(run) == bits(make(6).params)
    six, aside, last = names(run)
    assert (six, aside.partition("-")[0], last) == ("6", "6.aside", "run.json")
    aside = run / "checkpoints" / aside
    assert contents(aside) == held
    skipped, told = capsys.readouterr().err.splitlines()
    assert skipped.startswith("note: step 6 in ")
    assert told == f"note: what was step 6 in {run / 'checkpoints'} is {aside} now"


def test_retention_counts_no_damaged_step(tmp_path, capsys):
    """Or the only sound one would go because a damaged one has a higher or a later number."""
    save(tmp_path, *map(make, (2, 3, 5, 6)))
    spoil(tmp_path, 6)
    os.truncate(tmp_path / "checkpoints" / "5" / "meta" / "metadata", 1)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 3
        checkpoints.save(make(4), {})
        checkpoints.wait()
        assert names(tmp_path) == ["3", "4", "5", "6", "run.json"]
        checkpoints.save(make(7), {})
        checkpoints.wait()
        assert names(tmp_path) == ["4", "5", "6", "7", "run.json"]
        checkpoints.save(make(8), {})
    assert names(tmp_path) == ["7", "8", "run.json"]
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_what_cannot_be_removed_ends_no_run(tmp_path, monkeypatch, capsys):
    real = shutil.rmtree

    def busy(path):
        if busy.times:
            busy.times -= 1
            raise OSError(16, "Device or resource busy", str(path))
        real(path)

    busy.times = 3
    monkeypatch.setattr(steps.shutil, "rmtree", busy)
    save(tmp_path, *map(make, (1, 2, 3)), keep=1)
    (note,) = capsys.readouterr().err.splitlines()
    folder = tmp_path / "checkpoints"
    assert note.startswith(f"note: {folder} is to be tidied up at the next save: [Errno 16]")
    save(tmp_path, make(4), keep=1)
    assert names(tmp_path) == ["4", "run.json"]


def test_a_reader_whose_step_goes_takes_the_next_one(tmp_path, monkeypatch):
    save(tmp_path, make(1))
    later, real = [make(2), make(3)], checkpoint._meta

    def overtake(path):
        if later:
            save(tmp_path, later.pop(0), keep=1)
            assert not path.exists()
        return real(path)

    monkeypatch.setattr(checkpoint, "_meta", overtake)
    with Checkpoints(tmp_path) as reader:
        found, _ = reader.restore(None, abstract(make(3)))
        assert bits(found) == bits(make(3))
        later.append(make(4))
        assert bits(reader.restore_params()[0]) == bits(make(4).params)
        later.append(make(5))
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 4 in .*, only 5"):
            reader.restore_params(4)


def test_readers_beside_a_run_that_keeps_one_step(tmp_path):
    """All that is ever read is one step, whole."""
    done, read = threading.Event(), []

    def train():
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            for step in range(2, 60):
                state = make(1)
                values = {k: jnp.full_like(v, step) for k, v in state.params.items()}
                checkpoints.save(state._replace(step=jnp.int32(step), params=values), {"is": step})
                if len(set(read)) > 3:
                    break
        done.set()

    save(tmp_path, make(1), meta={"is": 1})
    training = threading.Thread(target=train)
    training.start()
    while not done.is_set():
        with Checkpoints(tmp_path) as reader:
            found, meta = reader.restore_params()
        values = {float(v) for leaf in found.values() for v in leaf.ravel()}
        assert meta["is"] == 1 or values == {meta["is"]}
        read.append(meta["is"])
    training.join()
    assert read == sorted(read)
    assert len(set(read)) > 3
