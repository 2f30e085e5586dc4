"""The benchmark of saving: a tiny run, and its arithmetic on blocks that are made up."""

import json
import os
import subprocess
import sys

import pytest

from launch.bench import __main__ as command
from launch.bench import checkpoint, measure
from launch.bench.checkpoint import ASYNC, NONE, SYNC, Block, Save
from launch.files import ROOT
from launch.schema import UsageError
from tests.launch.bench_test import BLOCKED, WITHOUT, tiny


def test_a_tiny_run_saves_and_is_recorded(tmp_path):
    out, saved = tmp_path / "checkpoint.json", tmp_path / "saved"
    saved.mkdir()
    flags = ["--every=6", "--short=2", "--repetitions=2", f"--folder={saved}", f"--out={out}"]
    command.main(["checkpoint", f"--config={tiny(tmp_path)}", *flags])
    assert list(saved.iterdir()) == []  # It tidies up.
    found = json.loads(out.read_text())
    rows = {row["what"].strip(): row for row in found["rows"]}
    assert all(value > 0 for row in rows.values() for value in row["ours"])
    assert all(len(row["ours"]) == 2 for row in rows.values())
    still = rows["step, asynchronous save every 6 steps"]["peer"]
    for how in (ASYNC, SYNC):
        for period in ("every 6 steps", "every step"):
            assert rows[f"step, {how} save {period}"]["peer"] == still
    assert rows["step, asynchronous save every 6 steps"]["most"] == 1.01
    # A save that is waited for is not finished before the loop goes on.
    waits, finished = (
        rows[name]["peer"] for name in ("a save keeps the loop", "until it is finished")
    )
    assert all(spent > until > 0 for spent, until in zip(waits, finished, strict=True))
    written = rows["written"]["peer"]
    sizes = [rate * spent for rate, spent in zip(written, finished, strict=True)]
    assert sizes[0] == pytest.approx(sizes[1])
    assert f"{sizes[0] / 1e3:.1f} MB in " in found["title"]
    assert any("6 steps with one asynchronous save" in note for note in found["notes"])


def turn(still, saving, waiting, late=0.0):
    """Seconds a step without saves, with asynchronous ones and with synchronous ones."""
    quick, slow = Save(0.01, 0.0), Save(0.3, 0.1)
    return {
        NONE: Block(still),
        f"{ASYNC}, seldom": Block(saving, (quick,), 0.5, late),
        f"{SYNC}, seldom": Block(waiting, (slow,), 0.2),
        f"{ASYNC}, always": Block(2 * saving, (quick, Save(0.1, 0.0), Save(0.3, 0.0)), 0.5, 0.4),
        f"{SYNC}, always": Block(2 * waiting, (slow,) * 3, 0.2),
    }


def test_rows_are_what_the_blocks_say():
    turns = [turn(0.010, 0.011, 0.012), turn(0.020, 0.020, 0.030)]
    rows = {row.what.strip(): row for row in checkpoint.rows(turns, every=100, size=4_000_000)}
    seldom = rows["step, asynchronous save every 100 steps"]
    assert seldom.ours == [11.0, 20.0]
    assert seldom.peer == [10.0, 20.0]
    assert seldom.ratios == [1.1, 1.0]
    assert rows["step, synchronous save every step"].ratios == pytest.approx([2.4, 3.0])
    assert rows["a save keeps the loop"].ours == pytest.approx([10.0, 10.0])
    assert rows["a save keeps the loop"].peer == pytest.approx([300.0, 300.0])
    assert rows["while the one before is written"].ours == pytest.approx([200.0, 200.0])
    assert rows["until it is finished"].ours == [500.0, 500.0]
    assert rows["written"].ours == pytest.approx([8.0, 8.0])  # 4 MB in half a second
    assert rows["written"].peer == pytest.approx([20.0, 20.0])
    assert rows["processor time, no step beside it"].ours == [100.0, 100.0]
    assert "ABOVE what is wanted, 1.01" in measure.table(measure.Report("", [seldom]))


def test_what_no_step_pays_for_is_said():
    turns = [
        turn(0.01, 0.01, 0.01),
        turn(0.01, 0.01, 0.01, late=0.05),
        turn(0.01, 0.01, 0.01, 0.15),
    ]
    _, seldom, always = checkpoint.notes(turns, every=100, short=10)
    assert seldom.startswith(
        "100 steps with one asynchronous save: the last save was under way at "
    )
    assert "2 of 3 blocks, and it took 100 ms more (median);" in seldom
    assert always.startswith("10 steps with an asynchronous save each: ")
    assert "3 of 3 blocks, and it took 400 ms more (median);" in always
    _, seldom, _ = checkpoint.notes(turns[:1], every=100, short=10)
    assert "0 of 1 blocks; no step pays" in seldom


def test_it_needs_orbax_and_says_so():
    script = WITHOUT.format(blocked=BLOCKED)
    done = subprocess.run(
        [sys.executable, "-c", script, "checkpoint"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("bench: orbax")
    assert "is not installed, and checkpoints are written by it" in done.stderr
    assert done.stderr.count("\n") == 1


def test_counts_that_make_no_block_are_refused():
    with pytest.raises(UsageError, match="--short must be at least 1, not 0"):
        checkpoint.bench(short=0)
