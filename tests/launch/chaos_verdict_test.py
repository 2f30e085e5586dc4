"""What a campaign of kills judges, when it kills, and what it reads from a folder."""

import math
import pathlib
import random

import numpy as np
import pytest

from launch.chaos import evidence, moments, verdict
from launch.chaos.evidence import Marks
from launch.chaos.verdict import Violation

ROWS = [{"step": k, "time": 1.0 * k, "loss": 1 / k, "tokens_per_second": 9.0} for k in (1, 2, 3)]


def changed(row, **values):
    return [*ROWS[:row], ROWS[row] | values, *ROWS[row + 1 :]]


def test_rows_are_compared_to_the_last_bit():
    assert verdict.rows(ROWS, ROWS, whole=True) == 3
    assert verdict.rows(ROWS[:2], ROWS) == 2
    assert verdict.rows(changed(1, time=7.0, tokens_per_second=1.0, mfu=0.1), ROWS) == 3
    nan = changed(1, loss=math.nan)
    assert verdict.rows(nan, nan) == 3


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (changed(1, loss=math.nextafter(0.5, 1)), r"step 2 has loss 0.50+1 \(0x1.0+1p-1\) and "),
        (changed(1, loss=math.nan), "step 2 has loss nan"),
        (changed(1, new=0.0), "step 2 has new 0.0 .* and the reference None"),
        (ROWS[:1] + ROWS[2:], "a row of step 3 where the reference has step 2"),
        (ROWS[:2] + ROWS[1:], "a row of step 2 where the reference has step 3"),
        (ROWS[:2], "2 of 3 rows; the first one that is missing is of step 3"),
        (
            ROWS + ROWS[2:],
            r"goes on with a row of step 3 \(loss, tokens_per_second\) where the ref",
        ),
    ],
)
def test_a_row_that_differs_is_named(rows, said):
    with pytest.raises(Violation, match=said):
        verdict.rows(rows, ROWS, whole=True)


def test_zero_has_a_sign():
    zero, minus = ([{"step": 1, "loss": value}] for value in (0.0, -0.0))
    with pytest.raises(Violation, match=r"has loss -0.0 \(-0x0.0p\+0\)"):
        verdict.rows(minus, zero)


def test_a_finished_checkpoint_goes_by_retention_alone():
    every = {"keep": 2, "keep_every": 100}
    verdict.kept((100, 160, 180), (100, 180, 200), every)
    verdict.kept((), (), every)
    for before, after, said in (
        ((100, 160, 180), (100, 160), "step 180 was saved and .* the newest checkpoint is 160"),
        ((20,), (), "step 20 was saved and .* the newest checkpoint is none"),
        ((160, 180), (200,), "of the checkpoints 160, 180 only 200 are left"),
        ((100, 160, 180), (160, 180, 200), "the checkpoint of step 100 is gone"),
    ):
        with pytest.raises(Violation, match=said):
            verdict.kept(before, after, every)


def test_a_restart_may_go_on_from_the_newest_checkpoint_and_no_earlier_one():
    verdict.resumed(40, 40)
    with pytest.raises(Violation, match="from step 20 although step 40"):
        verdict.resumed(20, 40)
    assert verdict.lost(79, 40, 20) == 39
    with pytest.raises(
        Violation, match="step 81 was logged and the newest checkpoint is of step 40"
    ):
        verdict.lost(81, 40, 20)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"a": np.array([1, -0.0], np.float32)}, "a of the last checkpoint differs in 1 of 2"),
        ({"a": np.array([1, 0], np.float64)}, "the type of a is "),
        ({"a": np.zeros(2, np.float32), "b": np.zeros(1)}, "the list of arrays"),
    ],
)
def test_arrays_are_compared_to_the_last_bit(other, said):
    mine = {"a": np.array([1, 0], np.float32)}
    assert verdict.same_arrays(mine, {"a": mine["a"].copy()}) == 1
    with pytest.raises(Violation, match=said):
        verdict.same_arrays(other, mine)


def test_moments_wait_for_what_they_are_aimed_at():
    marks, spans = (
        Marks(pathlib.Path("/nowhere"), 100),
        moments.Spans(10.0, [4.0], 5.0, 2.0, {"seal": 0.4}),
    )
    due = lambda aim, end=None: moments.due(
        moments.Moment(aim, 0.5, 2, end), marks, began=1000.0, spans=spans, fresh=False
    )
    assert (due("start"), due("life"), due("seal")) == (1002.0, math.inf, math.inf)
    marks.first_at, marks.seen["seal"] = 1004.0, {20: 1005.0}
    assert (due("life"), due("seal")) == (1006.5, math.inf)
    marks.seen["seal"][40] = 1006.0
    assert due("seal") == 1006.0 + 0.5 * moments.BEYOND * 0.4
    assert due("removal") == math.inf
    marks.last_at = 1009.0
    assert (due("life"), due("seal", 0.25)) == (math.inf, 1009.5)
    drawn = [moments.draw(random.Random(k), fresh=False) for k in range(300)]
    assert {moment.aim for moment in drawn} == set(moments.AIMS)
    assert drawn == [moments.draw(random.Random(k), fresh=False) for k in range(300)]


def test_stages_of_a_save_are_timed(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "20.saving").mkdir(parents=True)  # which another life has left
    marks = Marks(tmp_path, 100)
    renamed = [
        ("40.saving.orbax-checkpoint-tmp", 1.0),
        ("40.saving", 3.0),
        ("40", 4.0),
        ("40.removed-0f", 8.0),
        ("away", 8.5),
    ]
    path = folder / "20"
    path.mkdir()
    for name, now in renamed:
        path = path.rename(folder / name)
        marks.look(now)
        marks.look(now + 0.25)
    assert marks.seen == {"save": {40: 1.0}, "seal": {40: 3.0}, "removal": {40: 8.0}}
    assert marks.seconds == {"save": {40: 3.0}, "seal": {40: 1.0}, "removal": {40: 0.5}}


def test_phases_are_read_from_what_is_left(tmp_path):
    folder, config = (
        tmp_path / "checkpoints",
        {"train": {"keep": 1, "keep_every": None, "eval_every": 50}},
    )
    (folder / "20").mkdir(parents=True)
    (folder / "40.saving.orbax-checkpoint-tmp").mkdir()
    before = evidence.look(tmp_path)
    assert (before.steps, list(before.halves.values())) == ((20,), ["save, writing"])
    marks = Marks(tmp_path, 100)
    seen = lambda *rows: evidence.phases(marks, before, evidence.look(tmp_path), rows, config)
    assert seen() == ["start"]
    marks.resumed = 20
    assert seen() == ["first step"]
    marks.first_at = 1.0
    assert seen({"step": 21, "loss": 1.0}) == ["steps"]
    assert seen({"step": 50, "loss": 1.0}) == ["evaluation"]
    (folder / "60.saving").mkdir()
    assert seen() == ["save, writing"]
    (folder / "60.saving" / "commit_success.txt").touch()
    assert seen() == ["save, no manifest"]
    (folder / "60.saving" / "manifest.jsonl").touch()
    assert seen() == ["save, naming"]
    (folder / "60.saving").rename(folder / "60")
    assert seen() == ["save, retention"]
    (folder / "20").rename(folder / "20.removed-1a")
    assert seen() == ["save, retention"]
