"""The campaign of kills: that it notices what goes wrong, and real training under a few kills."""

import json
import os
import pathlib
import sys

import pytest

from launch.chaos import __main__ as command
from launch.chaos import campaign, moments, report
from launch.chaos.verdict import Violation
from launch.chaos.victim import Victim
from tests import tiny

PRETENDER = pathlib.Path(__file__).with_name("pretender.py")
TRAIN = {"save_every": 10, "keep": 1, "keep_every": None, "eval_every": None, "log_every": 1}


def pretended(folder, fault, *, kills=12, steps=120, count=1, seed=0, **train):
    """A campaign against processes that only pretend to train."""
    config = {"steps": steps, "train": TRAIN | train}
    script = (sys.executable, "-S", "-E", str(PRETENDER), fault)
    victim = Victim(config, folder / "lives", count, command=script)
    return campaign.Campaign(victim, folder, kills, seed)


def test_an_honest_run_passes_and_every_kill_is_recorded(tmp_path):
    done = pretended(tmp_path, "none")
    done.run()
    kills = done.tally.kills
    assert len(kills) == 12
    assert done.tally.runs >= 1
    assert {kill.aim for kill in kills} <= set(moments.AIMS)
    assert set(done.tally.phases) <= set(report.MEANT)
    for kill in kills:
        assert kill.resumed in (None, kill.newest)
        assert kill.newest >= kill.before
        if kill.logged is not None:
            assert kill.lost == kill.logged - kill.newest <= 2 * TRAIN["save_every"]
    assert sum(kill.resumed is None for kill in kills) <= 1
    # Every life but those killed at their start logs rows; the runs alone log 120 each.
    assert done.tally.losses >= done.tally.runs * 120
    assert not (tmp_path / "run-1").exists()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("loss", r"run-\d-life-\d: step \d+ has loss .* and the reference "),
        ("lost", r"has a row of step \d+ where the reference has step \d+"),
        ("torn", r"metrics.jsonl line \d+ is not JSON"),
        (
            "early",
            r"the run went on from step \d+ although step \d+ had been saved before the kill",
        ),
        ("half", r"\d+ has no manifest to be read"),
        ("score", r"step 120 has validation/loss 1.5 .* and the reference 0.5 "),
    ],
)
def test_what_a_restart_changes_is_noticed(fault, said, tmp_path):
    done = pretended(tmp_path, fault, kills=40, keep=2)
    with pytest.raises(Violation, match=said) as noticed:
        done.run()
    assert str(noticed.value).startswith("run-")  # The reference was right.
    assert len(list(tmp_path.glob("run-?"))) == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("damage", r"metadata is not what its manifest says"),
        ("gone", r"metadata cannot be read"),
        ("broken", r"it ended with status 3: it is broken \(all of it in .*reference.0.txt\)"),
    ],
)
def test_a_wrong_reference_is_noticed(fault, said, tmp_path):
    with pytest.raises(Violation, match=said):
        pretended(tmp_path, fault).run()


def test_the_other_processes_of_a_run_end_by_themselves(tmp_path):
    done = pretended(tmp_path, "none", kills=6, count=2)
    done.run()
    assert len(done.tally.kills) == 6
    assert max(kill.others for kill in done.tally.kills) > 0


def test_a_process_that_outlives_the_others_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "ALONE", 0.5)
    said = "a process still ran 0 s after another one of its run had ended"
    with pytest.raises(Violation, match=said):
        pretended(tmp_path, "deaf", count=2, steps=20).run()


def test_a_process_that_crashes_after_the_kill_of_another_is_noticed(tmp_path):
    with pytest.raises(Violation, match=r"process [01] ended with status 1 after the kill: "):
        pretended(tmp_path, "crash", count=2, kills=20).run()


def test_a_campaign_that_was_stopped_says_so(tmp_path):
    done = pretended(tmp_path, "none", kills=2)
    done.run()
    about = {"command": "uv run chaos", "wanted": 9, "seed": 0, "processes": 1, "seconds": 60.0}
    about |= {"violation": None, "interrupted": True}
    found = report.record(done.tally, about, {"device": {"kind": "abacus", "count": 3}})
    assert json.loads(json.dumps(found)) == found
    text = report.page(found)
    assert text.startswith("# 2 kills, and then the campaign was stopped\n")
    assert "| kills | 2 of 9, seed 0 |" in text
    assert "3 x abacus" in text
    text = report.page(found | {"violation": "step 3 has loss 1"})
    assert text.startswith("# A kill changed training, after 2 kills\n")
    assert "| violations | step 3 has loss 1 |" in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--kills=0"], "--kills must be at least 1, not 0"),
        (["--kill=1"], "there is no flag --kill; did you mean --kills?"),
        (["--config.step=1"], "did you mean"),
        (["--out=/nowhere/x.md"], "there is no folder /nowhere"),
        (["--out=x.txt"], "--out x.txt must end in .md"),
        ([f"--workdir={pathlib.Path(__file__).parent}"], "must be a new or an empty folder"),
    ],
)
def test_what_is_not_understood_is_one_sentence(argv, said, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(SystemExit) as stopped:
        command.main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_training_survives_kills(tmp_path, monkeypatch, capsys):
    """Two kills of real training; `uv run chaos` does the same a hundred times."""
    for name in [name for name in os.environ if name.startswith(("JAX_", "XLA_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    root = tiny.corpus(tmp_path / "corpus")
    changes = {"steps": 60, "data.domains.code.root": root, "data.domains.code.holdout": 0.1}
    changes |= {
        "train.save_every": 10,
        "train.eval_every": 20,
        "data.domains.pairs.holdout_rows": 8,
    }
    out = tmp_path / "chaos.md"
    given = [f"--config.{name}={value}" for name, value in changes.items()]
    with pytest.raises(SystemExit) as ended:
        command.main([f"--workdir={tmp_path / 'runs'}", "--kills=2", f"--out={out}", *given])
    assert ended.value.code == 0, capsys.readouterr()
    found = json.loads(out.with_suffix(".json").read_text())
    assert len(found["kills"]) == 2
    assert found["compared"]["losses"] >= 60
    assert found["compared"]["arrays"] > 30
    assert out.read_text().startswith("# 2 kills lost and changed nothing\n")
