"""Whatever happens to any file of a step, it is noticed and told, and the step before is used."""

import _pickle
import os
import pickle
import shutil

import numpy as np
import pytest

from tests.training.states import abstract, bits, make, save
from training import manifest
from training.checkpoint import CheckpointError, Checkpoints

OLDER, NEWER = make(3, seed=1), make(6, seed=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with steps 3 and 6."""
    workdir = tmp_path_factory.mktemp("run")
    save(workdir, OLDER, NEWER)
    return workdir


@pytest.fixture
def run(saved, tmp_path):
    """A copy of it that may be spoilt."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def flips(data, rng):
    """The data with one bit flipped, at two places; the last byte may hide behind a buffer."""
    for position in {len(data) - 1, int(rng.integers(len(data)))}:
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        yield bytes(flipped)


def note(workdir, step, phrase):
    return f"note: step {step} in {workdir / 'checkpoints'} is skipped: {phrase}\n"


def newest(workdir, capsys):
    """The newest sound step and what was told about the others."""
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.latest(), capsys.readouterr().err


def test_every_file_of_a_step(run, capsys):
    folder, rng = run / "checkpoints" / "6", np.random.default_rng(0)
    names = [*manifest.listing(folder), manifest.NAME]
    assert len(names) > 30
    for number, name in enumerate(names):
        path, data = folder / name, (folder / name).read_bytes()
        own = name == manifest.NAME
        damaged = f"{name} is damaged" + ("" if own else " (its sha256 is another)")
        cut = lambda length, own=own, name=name, data=data, damaged=damaged: (
            damaged if own else f"{name} has {length:,} bytes and not {len(data):,}"
        )
        for flipped in flips(data, rng):
            path.write_bytes(flipped)
            assert newest(run, capsys) == (3, note(run, 6, damaged))
        for length in {0, len(data) // 2}:
            path.write_bytes(data[:length])
            assert newest(run, capsys) == (3, note(run, 6, cut(length)))
        path.unlink()
        gone = "it has no manifest" if own else f"{name} is missing"
        with Checkpoints(run) as checkpoints:
            assert checkpoints.latest() == 3
            if number % 8 == 0:
                assert bits(checkpoints.restore(None, abstract(OLDER))[0]) == bits(OLDER)
        assert note(run, 6, gone)[:-1] in capsys.readouterr().err
        path.write_bytes(data)
        extra = path.parent / "extra"
        extra.write_bytes(b"")
        phrase = f"{extra.relative_to(folder)} does not belong to it"
        assert newest(run, capsys) == (3, note(run, 6, phrase))
        extra.unlink()
    assert newest(run, capsys) == (6, "")
    with Checkpoints(run) as checkpoints:
        assert bits(checkpoints.restore(None, abstract(NEWER))[0]) == bits(NEWER)


def test_a_step_of_another_run_or_number(run, tmp_path, capsys):
    other, folder = tmp_path / "other", run / "checkpoints"
    save(other, make(9))
    shutil.copytree(other / "checkpoints" / "9", folder / "9")
    runs = [manifest.read(folder / name).run for name in ("9", "6")]
    foreign = note(run, 9, f"it is of another run ({runs[0]} and not {runs[1]})")
    assert newest(run, capsys) == (6, foreign)
    (folder / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"several runs \(3, 6 of .*; 9 of .*move the others"):
        newest(run, capsys)
    shutil.rmtree(folder / "9")
    assert newest(run, capsys) == (6, "")  # where all agree, it need not be there
    os.rename(folder / "6", folder / "9")
    assert newest(run, capsys) == (3, note(run, 9, "it was saved as step 6"))


def test_of_parameters_only_what_is_opened_must_be_sound(run, capsys):
    folder = run / "checkpoints" / "6"
    shutil.rmtree(folder / "opt")
    checkpoints = Checkpoints(run)
    for aux, values in ((None, NEWER.params), ("ema", NEWER.aux["ema"])):
        assert bits(checkpoints.restore_params(None, aux=aux)[0]) == bits(values)
    assert checkpoints.latest() == 3
    path = next((folder / "rest").rglob("d/*"))
    path.write_bytes(path.read_bytes()[::-1])
    assert bits(checkpoints.restore_params(6)[0]) == bits(NEWER.params)
    with pytest.raises(CheckpointError, match=r"step 6 in .* is not sound: rest/\S+ is damaged"):
        checkpoints.restore_params(6, aux="ema")
    assert bits(checkpoints.restore_params(aux="ema")[0]) == bits(OLDER.aux["ema"])


def test_where_none_is_sound_nothing_begins_anew(run):
    os.truncate(run / "checkpoints" / "6" / "meta" / "metadata", 1)
    (run / "checkpoints" / "3" / manifest.NAME).unlink()
    with Checkpoints(run) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.latest()
    told = str(caught.value)
    assert told.startswith(
        f"no step in {run / 'checkpoints'} is sound (step 6: meta/metadata has 1"
    )
    assert "; step 3: it has no manifest" in told
    assert told.endswith("; put back a copy of one, choose another --workdir, or open the newest "
                         "unverified with --trust")  # fmt: skip
    with Checkpoints(run, trust=True) as checkpoints:
        assert checkpoints.latest() == 6
        with pytest.raises(CheckpointError, match="metadata cannot be read"):
            checkpoints.meta()
        assert bits(checkpoints.restore(3, abstract(OLDER))[0]) == bits(OLDER)
        (run / "checkpoints" / "6" / "commit_success.txt").unlink()
        assert checkpoints.latest() == 3


def test_an_older_format_opens_with_trust(run, capsys):
    for step in ("3", "6"):
        (run / "checkpoints" / step / manifest.NAME).unlink()
    with Checkpoints(run, trust=True) as checkpoints:
        assert (checkpoints.steps(), checkpoints.latest()) == ([3, 6], 6)
        assert bits(checkpoints.restore(None, abstract(NEWER))[0]) == bits(NEWER)
        checkpoints.save(make(7), {})
    assert Checkpoints(run).steps() == [7]
    assert capsys.readouterr().err == ""
    assert newest(run, capsys) == (7, "")


def test_trust_does_not_take_another_step_or_run_for_this_one(run, tmp_path, capsys):
    save(tmp_path / "other", make(9))
    shutil.copytree(tmp_path / "other" / "checkpoints" / "9", run / "checkpoints" / "9")
    (run / "checkpoints" / "6").rename(run / "checkpoints" / "8")
    with Checkpoints(run, trust=True) as checkpoints:
        assert checkpoints.latest() == 3
    told = capsys.readouterr().err
    assert "step 9 in " in told
    assert "is of another run" in told
    assert "is skipped: it was saved as step 6" in told


def test_steps_with_one_fault_are_told_together(run):
    for step in ("3", "6"):
        (run / "checkpoints" / step / manifest.NAME).unlink()
    with pytest.raises(CheckpointError, match=r"\(steps 6, 3: it has no manifest"):
        Checkpoints(run).latest()


def test_each_note_is_told_once(run, capsys):
    os.truncate(run / "checkpoints" / "6" / "commit_success.txt", 0)
    checkpoints = Checkpoints(run)
    for _ in range(3):
        assert checkpoints.latest() == 3
        assert checkpoints.meta()["shapes"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "is skipped: commit_success.txt has 0 bytes and not " in line
    (run / "checkpoints" / "6" / "extra").write_text("")
    assert checkpoints.latest() == 3
    assert "; extra does not belong to it" in capsys.readouterr().err


def test_files_are_hashed_once_and_again_when_they_change(run, monkeypatch):
    monkeypatch.setattr(manifest, "TICK", 0)
    hashed, real = [], manifest._hash
    spy = lambda path, **own: (hashed.append(path), real(path, **own))[1]
    monkeypatch.setattr(manifest, "_hash", spy)
    checkpoints = Checkpoints(run)
    assert checkpoints.latest() == 6
    assert sorted(hashed) == sorted(
        run / "checkpoints" / "6" / name for name in manifest.listing(run / "checkpoints" / "6")
    )
    first = len(hashed)
    checkpoints.meta()
    checkpoints.restore(None, abstract(NEWER))
    assert len(hashed) == first
    path = next(path for path in hashed if "params" in path.parts and path.parent.name == "d")
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])  # after it was verified, before it is opened
    with pytest.raises(CheckpointError, match=r"step 6 in .* is not sound: params/\S+ is damaged"):
        checkpoints.restore(6, abstract(NEWER))
    assert hashed[first:] == [path]


def test_what_changes_while_it_is_read_is_noticed(run, monkeypatch):
    from training import checkpoint

    def spoil(path):
        os.truncate(path / "rest" / spoilt, 5)
        return real(path)

    real, spoilt = checkpoint._meta, "_METADATA"
    monkeypatch.setattr(checkpoint, "_meta", spoil)
    checkpoints = Checkpoints(run)
    for call in (checkpoints.restore_params, checkpoints.meta):
        assert call(6)  # neither opens what changed
    with pytest.raises(CheckpointError, match=r"step 6 in .* is not sound: rest/_METADATA has 5"):
        Checkpoints(run).restore(6, abstract(NEWER))
    spoilt = "commit_success.txt"  # which Orbax does not mind
    with pytest.raises(CheckpointError, match=r"step 3 in .* is not sound: rest/commit_success"):
        Checkpoints(run).restore(3, abstract(OLDER))


def test_nothing_is_unpickled(run, monkeypatch):
    def refuse(*args, **own):
        raise AssertionError("something was unpickled")

    for module in (pickle, _pickle):
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(pickle, "_Unpickler", refuse)
    with Checkpoints(run) as checkpoints:
        assert bits(checkpoints.restore(None, abstract(NEWER))[0]) == bits(NEWER)
        assert bits(checkpoints.restore_params(aux="ema")[0]) == bits(NEWER.aux["ema"])
        checkpoints.save(make(7), {"a": 1})
    for path in (run / "checkpoints").rglob("*"):
        assert path.is_dir() or path.read_bytes()[:1] != pickle.PROTO
