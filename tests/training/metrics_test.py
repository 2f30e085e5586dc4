"""The log against what TensorBoard itself reads, and the clock against made-up time."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from training import events
from training.metrics import Clock, Log, MetricsError, read

# As much of a picture's file as events read: it is 30 wide and 20 high.
_PNG = b"\x89PNG\r\n\x1a\n" + bytes(8) + struct.pack(">II", 30, 20)
EARLY, LATE = _PNG + b"early", _PNG + b"late"
HEADER = {"config": {"steps": 9, "optim": {"lr": 1e-3}}, "parameters": 12}


def write(log, steps):
    for step in steps:
        log.write(step, 100 * step, {"loss": np.float32(step), "lr": 0.5})


def board(workdir):
    """{tag: [(step, value)]} as TensorBoard shows it."""
    accumulator = EventAccumulator(str(workdir / "tb")).Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_header_and_rows(tmp_path):
    with Log(tmp_path / "run", HEADER) as log:
        write(log, [1, 2])
    header, rows = read(tmp_path / "run" / "metrics.jsonl")
    assert header == HEADER
    assert [row.pop("time") > 1.6e9 for row in rows] == [True, True]
    assert rows[1] == {"step": 2, "tokens": 200, "loss": 2.0, "lr": 0.5}
    assert board(tmp_path / "run")["loss"] == [(1, 1.0), (2, 2.0)]


def test_not_finite_is_valid_json(tmp_path):
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e300}
    with Log(tmp_path, {"limit": math.inf}) as log:
        log.write(1, 2, values)

    def refuse(constant):
        raise AssertionError(constant)

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    _, (row,) = read(tmp_path / "metrics.jsonl")
    np.testing.assert_equal({key: row[key] for key in values}, values)
    shown = {tag: value for tag, [(_, value)] in board(tmp_path).items()}
    np.testing.assert_equal(shown, values | {"d": math.inf, "tokens": 2})


def test_a_metric_cannot_take_an_own_name(tmp_path):
    with Log(tmp_path, {}) as log, pytest.raises(MetricsError, match="cannot be called tokens"):
        log.write(1, 2, {"tokens": 3})


@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "tok', b"\xff\xfe{"])
def test_resume_cuts_both_back(tmp_path, torn):
    with Log(tmp_path, HEADER) as log:
        write(log, range(1, 6))
        for step, text, png in ((2, "early", EARLY), (5, "late", LATE)):
            log.text(step, "sample", text)
            log.image(step, "picture/a", png)
        log.scalars(5, {"only/late": 1.0})
        log.hparams({}, {"loss": 5.0})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    (path,) = (tmp_path / "tb").iterdir()
    with open(path, "ab") as file:
        file.write(b"\x09\0\0\0")  # a torn record
    with Log(tmp_path, HEADER | {"resumed on": "another machine"}, 3) as log:
        _, rows = read(tmp_path / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert board(tmp_path)["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
        write(log, [4, 5])
        log.hparams({}, {"loss": 6.0})
    header, rows = read(tmp_path / "metrics.jsonl")
    assert header == HEADER
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[4]["resumed"] == 3
    assert lines[4]["header"]["resumed on"] == "another machine"
    shown = board(tmp_path)
    assert shown["loss"] == [(step, float(step)) for step in range(1, 6)]
    assert shown["final/loss"] == [(5, 6.0)]
    assert "only/late" not in shown
    accumulator = EventAccumulator(str(tmp_path / "tb")).Reload()
    texts = accumulator.Tensors("sample/text_summary")
    assert [(text.step, text.tensor_proto.string_val) for text in texts] == [(2, [b"early"])]
    files = [path.read_bytes() for path in (tmp_path / "tb").iterdir()]
    assert [EARLY in b"".join(files), LATE in b"".join(files)] == [True, False]
    (image,) = accumulator.Images("picture/a")
    assert (image.step, image.encoded_image_string) == (2, EARLY)
    assert (image.width, image.height) == (30, 20)


def test_resume_twice_and_further_back(tmp_path):
    for restored, steps in [(None, range(1, 9)), (6, range(7, 9)), (4, range(5, 7)), (4, [5])]:
        with Log(tmp_path, HEADER, restored) as log:
            write(log, steps)
    _, rows = read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert board(tmp_path)["loss"] == [(step, float(step)) for step in range(1, 6)]


def test_a_last_step_that_is_scored_again_is_scored_once(tmp_path):
    with Log(tmp_path, HEADER) as log:
        write(log, [1, 2])
        log.write(1, 10, {"validation/loss": 3.0})
        log.write(2, 20, {"validation/loss": 2.0})
    Log(tmp_path, HEADER, 2).close()
    assert len(read(tmp_path / "metrics.jsonl")[1]) == 4
    Log(tmp_path, HEADER, 2, scored_again=True).close()
    rows = read(tmp_path / "metrics.jsonl")[1]
    scored = [row["step"] for row in rows if "validation/loss" in row]
    assert (scored, [row["step"] for row in rows if "loss" in row]) == ([1], [1, 2])


def test_a_board_that_is_running_forgets_too(tmp_path):
    with Log(tmp_path, HEADER) as log:
        write(log, range(1, 6))
        running = EventAccumulator(str(tmp_path / "tb")).Reload()
    with Log(tmp_path, HEADER, 3) as log:
        write(log, [4])
        running.Reload()
    assert [event.step for event in running.Scalars("loss")] == [1, 2, 3, 4]


def test_starting_over_replaces(tmp_path):
    for steps in (range(1, 6), [1]):
        with Log(tmp_path, HEADER) as log:
            write(log, steps)
    assert len(read(tmp_path / "metrics.jsonl")[1]) == 1
    assert board(tmp_path)["loss"] == [(1, 1.0)]


def test_resume_without_a_log_starts_one(tmp_path):
    with Log(tmp_path, HEADER, 3) as log:
        write(log, [4])
    header, (row,) = read(tmp_path / "metrics.jsonl")
    assert (header, row["step"]) == (HEADER, 4)


def test_a_killed_process_loses_nothing(tmp_path):
    """Rows and events are with the operating system when `write` returns."""
    code = (
        "import os, signal, sys; from training.metrics import Log\n"
        "log = Log(sys.argv[1], {})\n"
        "for step in range(50): log.write(step, step, {'loss': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(read(tmp_path / "metrics.jsonl")[1]) == len(board(tmp_path)["loss"]) == 50


def test_hparams(tmp_path):
    config = {"optim": {"lr": 1e-3, "clip": None}, "pattern": ("a", "b"), "tied": True}
    with Log(tmp_path, HEADER) as log:
        write(log, [1, 7])
        log.hparams(config, {"eval/loss": np.float32(2.5)})
    assert board(tmp_path)["final/eval/loss"] == [(7, 2.5)]
    multiplexer = EventMultiplexer().AddRun(str(tmp_path / "tb"), "run").Reload()
    content = multiplexer.SummaryMetadata("run", "_hparams_/session_start_info")
    assert b"optim.lr" in content.plugin_data.content
    assert b"('a', 'b')" in content.plugin_data.content


def test_disabled_writes_nothing(tmp_path):
    with Log(tmp_path / "run", HEADER, enabled=False) as log:
        write(log, [1])
        log.text(1, "a", "b")
        log.image(1, "a", EARLY)
        log.hparams({}, {})
    assert not (tmp_path / "run").exists()


def test_no_threads(tmp_path):
    before = threading.active_count()
    with Log(tmp_path, HEADER) as log:
        write(log, [1])
        assert threading.active_count() == before


def test_read_errors(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(MetricsError, match="no metrics file"):
        read(path)
    path.write_text("")
    with pytest.raises(MetricsError, match="does not start with a header"):
        read(path)
    for line in ('{"step": 1', "3", "null"):
        path.write_text('{"header": {}}\n' + line + '\n{"step": 2}\n')
        with pytest.raises(MetricsError, match=r"line 2 is not JSON of a row, but .* remove that"):
            read(path)


def test_two_files_in_one_second(tmp_path):
    for start in range(3):
        events.EventFile(tmp_path, start).close()
    assert len(os.listdir(tmp_path)) == 3


class Time:
    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


def test_clock_leaves_out_compilation_and_pauses():
    time = Time()
    clock = Clock(window=3, now=time)
    time.seconds += 60  # compilation
    clock.tick(10)
    assert clock.tokens_per_second() is clock.seconds_per_step() is clock.seconds_left(5) is None
    for _ in range(2):
        time.seconds += 2
        clock.tick(10)
    assert clock.tokens_per_second() == 5
    assert clock.seconds_left(100) == 20
    with clock.paused():
        time.seconds += 1
        with clock.paused():
            time.seconds += 3
    time.seconds += 2
    clock.tick(10)
    assert clock.tokens_per_second() == 5
    assert clock.seconds_per_step() == 2
    # 10 seconds since the first step, 6 of them in steps.
    assert clock.seconds_left(90) == pytest.approx(18 * 10 / 6)


def test_clock_forgets_what_is_beyond_the_window():
    time = Time()
    clock = Clock(window=2, now=time)
    for seconds, tokens in [(9, 1), (5, 10), (1, 10), (1, 30)]:
        time.seconds += seconds
        clock.tick(tokens)
    assert clock.tokens_per_second() == 20
