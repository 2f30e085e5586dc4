"""What is read of a run's folder, whatever state it was left in."""

import json
import math

import pytest

from analysis.records import leaves, read
from tests.analysis import written


def test_a_run_that_has_ended(tmp_path):
    written.run(tmp_path, 2.5)
    record = read(tmp_path)
    assert record.ended
    assert record.diverged is None
    assert record.config["steps"] == 40
    assert record.last[written.METRIC] == 2.5
    assert record.last["loss"] == 3.0 + 1 / 40  # from another row of the same step
    assert len(record.attempts) == 1


def test_seconds_are_those_of_every_attempt_in_the_loop(tmp_path):
    first = written.rows(written.CONFIG, 2.0)[:10]
    second = [row | {"time": row["time"] + 1e6} for row in written.rows(written.CONFIG, 2.0)[10:]]
    second[0]["seconds_to_first_step"] = 7.0
    lines = [{"header": written.header()}, *first, {"resumed": 10, "header": written.header()}]
    written.write(tmp_path, lines + second)
    record = read(tmp_path)
    assert [len(rows) for rows in record.attempts] == [len(first), len(second)]
    lasted = (rows[-1]["time"] - rows[0]["time"] for rows in (first, second))
    assert record.seconds == pytest.approx(5.0 + 7.0 + sum(lasted))


def test_nothing_and_half_a_run(tmp_path):
    assert read(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text("")
    assert read(tmp_path) is None
    written.write(tmp_path, [{"header": written.header()}, *written.rows(written.CONFIG, 2.0)[:5]])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    record = read(tmp_path)
    assert [row["step"] for row in record.rows] == [1, 2, 3, 4, 5]
    assert not record.ended
    assert record.seconds == 5.0 + 4 * 2


def test_a_score_of_an_earlier_end_does_not_end_a_longer_run(tmp_path):
    written.run(tmp_path, 2.5)
    (tmp_path / "final.json").write_text(json.dumps({"step": 20}))
    assert not read(tmp_path).ended


@pytest.mark.parametrize("name", ["loss", "gradient_norm", "parameter_norm"])
@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_a_run_that_diverged(tmp_path, name, word):
    rows = written.rows(written.CONFIG, 2.0)[:4]
    rows[-1][name] = word
    written.write(tmp_path, [{"header": written.header()}, *rows])
    record = read(tmp_path)
    assert record.diverged == 4
    assert not math.isfinite(record.rows[-1][name])
    assert not record.ended


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"header": {}}\n{"step": 1\n{"step": 2}\n', "line 2 is not JSON; delete it to run anew"),
        ('{"step": 1}\n', "does not start with a header; delete it to run anew"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, text, sentence):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path)


def test_a_damaged_score(tmp_path):
    written.run(tmp_path, 2.5)
    (tmp_path / "final.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON; delete it and run again"):
        read(tmp_path)


def test_leaves():
    assert list(leaves({"a": {"b": 1, "c": {}}, "d": (2,)})) == [("a.b", 1), ("d", (2,))]
