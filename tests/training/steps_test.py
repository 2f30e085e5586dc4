"""Names in the folder of checkpoints, whose run it is, and which steps retention removes."""

import itertools
import json
import os

import pytest

from training import manifest, steps
from training.steps import CheckpointError


def put(folder, step, run="abc"):
    (folder / str(step)).mkdir()
    manifest.write(folder / str(step), step=step, run=run)


def test_numbers(tmp_path):
    assert steps.numbers(tmp_path / "none") == []
    for name in ("10", "9", "0", "007", "٣", "9.saving", "-1", "x", "8.aside-0a"):
        (tmp_path / name).mkdir()
    (tmp_path / "12").write_text("")
    assert steps.numbers(tmp_path) == [0, 9, 10, 12]


@pytest.mark.parametrize("keep_every", [None, 1, 2, 5])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_surplus_against_its_definition(keep, keep_every):
    """Of every set of steps and every choice of damaged ones among them."""
    for ours in itertools.chain(*(itertools.combinations(range(1, 7), n) for n in range(5))):
        for sound in itertools.chain(*(itertools.combinations(ours, n) for n in range(5))):
            gone = steps.surplus(ours, sound, keep, keep_every)
            newer = lambda step, sound=sound: sum(other > step for other in sound)
            always = lambda step: keep_every is not None and step % keep_every == 0
            assert gone == [s for s in ours if newer(s) >= keep and not always(s)]
            assert len(set(sound) - set(gone)) >= min(keep, len(sound))


def test_whose_folder_it_is(tmp_path):
    assert steps.run_id(tmp_path) is None
    put(tmp_path, 3)
    put(tmp_path, 6)
    (tmp_path / "9").mkdir()  # without a manifest: nothing follows from it
    assert steps.run_id(tmp_path) == "abc"
    assert steps.name_run(tmp_path) == "abc"
    assert json.loads((tmp_path / "run.json").read_text()) == {"run": "abc"}
    put(tmp_path, 12, run="other")
    assert steps.run_id(tmp_path) == "abc"
    for damage in (lambda path: path.write_text('{"run"'), os.unlink):
        damage(tmp_path / "run.json")
        told = r"are of several runs \(3, 6 of abc; 12 of other\), and run.json, .* is missing"
        with pytest.raises(CheckpointError, match=told):
            steps.run_id(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    os.rename(tmp_path / "12", tmp_path.parent / "12")
    assert steps.name_run(tmp_path) == "abc"
    assert steps.run_id(tmp_path) == "abc"


def test_every_folder_has_a_name_of_its_own(tmp_path):
    names = set()
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        names.add(steps.name_run(tmp_path / str(number)))
    assert len(names) == 3


def test_a_name_is_taken_away_whole(tmp_path):
    put(tmp_path, 3)
    aside = steps.set_aside(tmp_path / "3")
    assert manifest.verify(aside, step=3, run="abc") == []
    assert (steps.numbers(tmp_path), aside.parent) == ([], tmp_path)
    assert steps.sweep(tmp_path) == []
    assert aside.exists()


def test_what_cannot_be_swept_is_told(tmp_path, monkeypatch):
    (tmp_path / "3.saving").mkdir()

    def busy(path):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(steps.shutil, "rmtree", busy)
    (error,) = steps.sweep(tmp_path)
    assert "busy" in str(error)
