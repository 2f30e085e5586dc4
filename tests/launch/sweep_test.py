"""`sweep` from its command line: what it runs, how it is stopped, goes on, and reports."""

import fcntl
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from analysis import picture
from analysis.records import read
from launch import children, flags, study, sweep
from launch.files import ROOT
from tests import tiny
from tests.analysis import written

STUDY = '''"""A study of nothing.

RULE  {rule}
"""

from experiments import base

BASELINE = "old"
ARMS = {arms}
SEEDS = (0, 1)
METRIC = "validation/bits_per_byte"
MARGIN = {margin}
{more}

def get_config():
    config = base.get_config()
    config.steps = 5
    return config
'''
ONE = "SEEDS = (0,)"
CORES = sorted(os.sched_getaffinity(0))
ARMS = {
    "old": {"optim.lr": [0.5, 0.25]},
    "new": {"optim.name": "sgd", "model.pattern": ("attention",), "optim.lr": 0.125},
}
PAIR = {"old": {"optim.lr": 0.5}, "new": {"optim.lr": 0.25}}
NAMES = [f"old-lr={lr}-seed={seed}" for lr in ("0.5", "0.25") for seed in (0, 1)]
NAMES += ["new-seed=0", "new-seed=1"]


def sentence(arms, margin=0.01, **_):
    claims = {arm: "better" for arm in arms if arm != "old"}
    return study.Rule("old", "validation/bits_per_byte", margin, claims)


@pytest.fixture
def write(tmp_path):
    """write(**parts of STUDY): the path of a study."""

    def make(arms=None, margin=0.01, more="", rule=None):
        arms = ARMS if arms is None else arms
        text = STUDY.format(
            arms=arms, margin=margin, more=more, rule=rule or sentence(arms, margin)
        )
        path = tmp_path / "study.py"
        path.write_text(text)
        return str(path)

    return make


@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    """call(*argv): (exit status, stdout, stderr); runs are stand-ins in tmp_path / "runs".

    Pictures, which take half a second each, are left out; tests/analysis draws them.
    """
    monkeypatch.setattr(picture, "draw", lambda summary, out: None)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(children.Child, "MODULE", "tests.launch.stub")

    def run(*argv):
        status = 0
        try:
            own = {"--workdir": tmp_path / "runs", "--out": tmp_path / "out"}
            given = {argument.partition("=")[0] for argument in argv}
            sweep.main([*argv, *(f"{k}={x}" for k, x in own.items() if k not in given)])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def start(tmp_path):
    """start(module, *argv): a sweep as a process."""
    started = []

    def run(module, *argv, **environ):
        code = (
            f"import launch.children as c, launch.sweep as s; c.Child.MODULE = {module!r}; s.main()"
        )
        own = [f"--workdir={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
        command = [sys.executable, "-c", code, *argv, *own]
        pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        started.append(subprocess.Popen(command, **pipe, env=os.environ | environ))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.03)


def steps(folder):
    """Those logged so far."""
    record = read(folder)
    return [row["step"] for row in record.rows if "loss" in row] if record else []


def is_free(workdir):
    """Whether no process holds the study's lock."""
    with (workdir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_every_run_is_made_once_and_reported(call, write, tmp_path):
    status, out, err = call(write())
    assert status == 0, err
    runs = tmp_path / "runs"
    assert sorted(path.parent.name for path in runs.glob("*/final.json")) == sorted(NAMES)
    lines = out.splitlines()
    told = {line.split("  ")[0]: line.split("  ")[1] for line in lines[:6]}
    assert told["new-seed=1"] == "validation/bits_per_byte 0.1250"
    assert set(told) == set(NAMES)
    assert lines[6:] == [
        f"6 of 6 runs are finished in {runs}",
        "new is better than old: confirmed",
        f"report: {tmp_path / 'out'}/study.md",
    ]
    held = json.loads((tmp_path / "out" / "study.json").read_text())
    assert held["arms"]["old"]["chosen"] == "optim.lr=0.25"
    assert held["claims"][0]["verdict"] == "confirmed"
    assert f"uv run sweep {tmp_path}/study.py" in (tmp_path / "out" / "study.md").read_text()


def test_runs_that_go_on_wait_for_those_before(call, write, tmp_path):
    arms = {"old": {"optim.lr": 0.5}, "new": {"optim.lr": 0.25}, "last": {"optim.lr": 0.125}}
    claims = {"new": "better"}
    more = f"AFTER = {{'new': 'old', 'last': 'new'}}; CLAIMS = {claims}"
    argv = (write(arms, rule=sentence(PAIR), more=more), "--parallel=2")
    status, _, err = call(*argv, "--only=last*")
    assert status == 1
    assert "last-seed=0 did not begin: new-seed=0, from which it goes on, has not ended" in err
    status, out, err = call(*argv)
    assert status == 0, err
    order = [line.split("  ")[0] for line in out.splitlines()[:6]]
    runs = tmp_path / "runs"
    for seed in (0, 1):
        places = [order.index(f"{arm}-seed={seed}") for arm in arms]
        assert places == sorted(places)
        config = read(runs / f"last-seed={seed}").config
        assert config["start"] == str(runs / f"new-seed={seed}")
    # Tokens of the runs before are counted, so old and new are not compared.
    assert "new is better than old: no verdict" in out
    # What is of another place goes on there, and what is older than the run before it does not.
    moved = runs.rename(tmp_path / "elsewhere")
    (moved / "last-seed=1" / "final.json").unlink()
    assert call(*argv, f"--workdir={moved}")[0] == 0
    moved.rename(runs)
    shutil.rmtree(runs / "new-seed=0")
    status, out, err = call(*argv)
    assert (status, out) == (2, "")
    assert f"{runs / 'last-seed=0'} is older than new-seed=0, from which it goes on; delete" in err


def test_runs_do_not_begin_where_the_run_before_failed(call, write, tmp_path):
    arms = {"old": {"optim.lr": 7.0}, "new": {"optim.lr": 0.25}}
    more = f"AFTER = {{'new': 'old'}}; {ONE}"
    status, out, err = call(write(arms, rule=sentence(PAIR), more=more))
    assert status == 1
    assert "old-seed=0 failed: train: this run is at its end" in err
    assert "new-seed=0 did not begin: old-seed=0, from which it goes on, has not ended" in err
    assert "2 failed; the same command tries them again" in out


def test_finished_runs_are_skipped_and_the_report_is_the_same(call, write, tmp_path, monkeypatch):
    argv = (write(PAIR, more=ONE), "--config.steps=3")
    assert call(*argv)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.[mj]*")}
    monkeypatch.setattr(children.Child, "__init__", None)  # whatever starts now fails
    (tmp_path / "out" / "study.md").unlink()
    assert call(*argv)[0] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.[mj]*")} == before
    (tmp_path / "out" / "study.md").unlink()
    status, out, _ = call(*argv, "--report")
    assert (status, out.splitlines()[0]) == (0, "new is better than old: undecided")
    assert (tmp_path / "out" / "study.md").read_bytes() == before["study.md"]
    assert call(*argv, "--print")[1] == ""


def test_printed_commands_are_what_runs(call, write, monkeypatch, tmp_path):
    path, started = write(), []
    status, out, _ = call(path, "--print", "--config.steps=3")
    assert status == 0
    assert not (tmp_path / "runs").exists()
    lines = [shlex.split(line) for line in out.splitlines()]
    assert [line[:3] for line in lines] == [["uv", "run", "train"]] * 6
    parsed = [flags.parse(line[3:]) for line in lines]
    planned = study.read(path, {"steps": "3"}).runs
    assert [run.name for run in planned] == NAMES
    assert [p.config for p in parsed] == [run.config for run in planned]
    assert parsed[2].config["optim"]["lr"] == 0.25
    assert {p.config["steps"] for p in parsed} == {3}
    assert [p.config["seed"] for p in parsed] == [0, 1] * 3
    init = children.Child.__init__

    def spy(self, arguments, *rest):
        started.append(list(arguments))
        init(self, arguments, *rest)

    monkeypatch.setattr(children.Child, "__init__", spy)
    assert call(path, "--config.steps=3", "--only=*seed=1", "--parallel=2")[0] == 0
    assert started == [line[3:] for line in lines][1::2]


def test_a_failed_run_is_told_and_tried_again_while_others_go_on(call, write, tmp_path):
    arms = {"old": {"optim.lr": 0.5}, "bad": {"optim.lr": 7.0}, "new": {"optim.lr": 0.25}}
    path = write(arms, more=ONE)
    status, out, err = call(path)
    runs = tmp_path / "runs"
    assert status == 1
    (told,) = [line for line in err.replace("\r", "\n").splitlines() if " failed: " in line]
    log = runs / "bad-seed=0" / "log.txt"
    said = f"bad-seed=0 failed: train: this run is at its end; all it said is in {log}"
    assert told.strip() == said
    assert out.splitlines()[-2:] == [
        f"2 of 3 runs are finished in {runs}",
        "1 failed; the same command tries it again",
    ]
    assert not (tmp_path / "out").exists()
    status, out, err = call(path)
    assert (status, err.count(" failed: ")) == (1, 1)
    assert log.read_text().count("at its end") == 2


def test_a_run_that_diverged_is_a_result(call, write, tmp_path):
    status, _, err = call(
        write({"old": {"optim.lr": 0.5}, "new": {"optim.lr": [1e30, 0.25]}}, more=ONE)
    )
    assert (status, err.count(" failed: train: this run is at its end;")) == (1, 1)
    held = json.loads((tmp_path / "out" / "study.json").read_text())
    assert held["arms"]["new"]["chosen"] == "optim.lr=0.25"
    assert held["runs"]["new-lr=1e+30-seed=0"]["diverged"] == 1


def test_runs_have_cores_of_their_own(call, write, tmp_path):
    assert call(write(PAIR, more=ONE), "--parallel=2")[0] == 0
    used = [
        read(tmp_path / "runs" / name).headers[0]["cores"] for name in ("old-seed=0", "new-seed=0")
    ]
    expected = [CORES] if len(CORES) == 1 else children.shares(2)
    assert all(cores in expected for cores in used)
    assert sorted(os.sched_getaffinity(0)) == CORES


@pytest.mark.parametrize("cores", [1, 2, 5, 8])
@pytest.mark.parametrize("parallel", [1, 2, 3, 9])
def test_shares(monkeypatch, cores, parallel):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10, 10 + cores)))
    shares = children.shares(parallel)
    assert len(shares) == parallel
    assert all(shares)
    if parallel <= cores:
        assert list(itertools.chain(*shares)) == list(range(10, 10 + cores))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_sigterm_is_passed_on_and_the_same_command_goes_on(call, write, start, tmp_path):
    runs = tmp_path / "runs"
    argv = [write(PAIR), "--config.steps=400", "--parallel=2"]
    process = start("tests.launch.stub", *argv)
    first, second = runs / "old-seed=0", runs / "old-seed=1"
    wait(lambda: steps(first)[-1:] > [3] and steps(second)[-1:] > [3])
    status, out, err = call(*argv)
    assert (status, out) == (2, "")
    assert err.startswith(f"sweep: another sweep is at work in {runs}, or runs that it left are")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.splitlines()[0] == f"0 of 4 runs are finished in {runs}"
    assert out.splitlines()[1].startswith(
        f"stopped; to go on: uv run sweep {argv[0]} --config.steps"
    )
    assert "failed" not in err
    assert [path.name for path in sorted(runs.glob("*/"))] == ["old-seed=0", "old-seed=1"]
    saved = [int((folder / "saved").read_text()) for folder in (first, second)]
    assert all(3 < step < 400 for step in saved)

    assert call(*argv)[0] == 0
    assert [steps(folder) for folder in (first, second)] == [list(range(1, 401))] * 2
    assert [len(read(runs / name).attempts) for name in ("old-seed=0", "new-seed=0")] == [2, 1]
    assert (tmp_path / "out" / "study.md").exists()


def test_runs_that_a_killed_sweep_left_keep_another_one_out(call, write, start, tmp_path):
    runs = tmp_path / "runs"
    argv, folder = [write(PAIR), "--config.steps=400", "--only=old-seed=0"], runs / "old-seed=0"
    process = start("tests.launch.stub", *argv)
    wait(lambda: steps(folder)[-1:] > [3])
    (folder / "hold").touch()
    process.kill()
    process.wait()
    status, _, err = call(*argv)
    assert status == 2
    assert "runs that it left are still saving; wait for them" in err
    (folder / "hold").unlink()
    wait(lambda: is_free(runs))
    assert 3 < int((folder / "saved").read_text()) < 400
    assert call(*argv)[0] == 0
    assert steps(folder) == list(range(1, 401))


def test_two_real_runs_through_a_kill(call, write, start, tmp_path, monkeypatch):
    """The sweep is killed: its run saves and ends, and the next sweep goes on with it.

    The other arm computes the same without an interruption, and reaches the same value.
    """
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setattr(children.Child, "MODULE", "launch.train")
    path = write({"old": {}, "new": {"train.keep": 1}}, more="SEEDS = (3,)")
    own = tiny.flags(tiny.corpus(tmp_path / "corpus"), steps=100, train__eval_every=40)
    argv, runs = [path, *own, "--parallel=2"], tmp_path / "runs"
    folders = [runs / "old-seed=3", runs / "new-seed=3"]
    process = start("launch.train", *argv, "--only=old*")
    wait(lambda: steps(folders[0])[-1:] > [3])
    process.kill()
    wait(lambda: is_free(runs))
    saved = steps(folders[0])[-1]
    assert not (folders[0] / "final.json").exists()

    status, out, err = call(*argv)
    assert status == 0, err
    assert [steps(folder) for folder in folders] == [list(range(1, 101))] * 2
    assert read(folders[0]).attempts[1][0]["step"] == saved + 1
    assert f"2 of 2 runs are finished in {runs}" in out
    held = json.loads((tmp_path / "out" / "study.json").read_text())
    assert held["differing"] == []
    assert held["claims"][0]["verdict"] == "undecided"  # of one seed
    assert held["arms"]["new"]["paired"]["by_seed"] == {"3": 0.0}
    for folder in folders:
        record = read(folder)
        run = held["runs"][folder.name]
        assert run["value"] == record.last[written.METRIC]
        assert run["header"]["commit"] == record.headers[0]["commit"]
        assert [tokens for tokens, _ in run["curve"]] == [40 * 128, 80 * 128]


def test_a_folder_of_another_configuration(call, write):
    path = write()
    assert call(path, "--only=old-lr=0.5-seed=1")[0] == 0
    status, out, err = call(path, "--config.steps=4", "--config.optim.clip=none")
    assert (status, out) == (2, "")
    assert "runs/old-lr=0.5-seed=1 holds a run of another configuration" in err
    assert "(steps 5, now 4, optim.clip 1.0, now None)" in err
    assert "another configuration" in call(path, "--config.steps=4", "--report")[2]
    assert "choose another --workdir" in err


def test_a_rule_changed_after_the_first_run_is_reported(call, write, tmp_path):
    assert call(write(PAIR, more=ONE))[0] == 0
    status, _, _ = call(write(PAIR, margin=0.5, more=ONE), "--report")
    assert status == 0
    text = (tmp_path / "out" / "study.md").read_text()
    assert "It was changed after runs had begun, from:" in text
    held = json.loads((tmp_path / "out" / "study.json").read_text())
    assert held["earlier_rules"] == [str(sentence(PAIR))]
    assert held["rule"] == str(sentence(PAIR, 0.5))


def test_a_metric_that_runs_do_not_have_stops_the_sweep(call, write, tmp_path):
    rule = str(sentence(ARMS)).replace("bits_per_byte", "accuracy")
    path = write(rule=rule, more="METRIC = 'validation/accuracy'")
    status, out, err = call(path, "--parallel=1")
    assert (status, out) == (2, "")
    assert "old-lr=0.5-seed=0 has no validation/accuracy at its last step; METRIC may be" in err
    assert len(list((tmp_path / "runs").glob("*/metrics.jsonl"))) == 1


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["none.py"], "there is no configuration 'none.py'"),
        (["experiments/quickstart.py"], "is not a study: it needs BASELINE, a str"),
        (["--print"], "name a study first"),
        (["STUDY", "--only=nothing*"], "'nothing*' matches none of the 4 runs"),
        (["STUDY", "--parallel=0"], "--parallel 0 runs nothing"),
        (["STUDY", "--paralel=1"], "did you mean --parallel?"),
        (["STUDY", "--config.stepz=1"], "sweep: --config.stepz is not a key; did you mean steps?"),
        (["STUDY", "--config.optim.lr=1"], "--config.optim.lr is set by the study"),
        (["STUDY", "--config.seed=1"], "--config.seed is set by the study"),
        (["STUDY", "--report"], "where the runs would be; run them first"),
    ],
)
def test_mistakes_are_one_sentence(call, write, tmp_path, argv, part):
    path = write(PAIR)
    status, out, err = call(*(path if word == "STUDY" else word for word in argv))
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("sweep: ")
    assert part in err
    assert not (tmp_path / "runs").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        sweep.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: uv run sweep experiments/NAME.py")
    assert all(f"  --{name}" in out for name in sweep.OPTIONS)


def test_the_step_of_a_run_is_not_that_of_the_one_before_it(tmp_path):
    child = object.__new__(children.Child)
    child.folder = tmp_path
    assert child.step == 0
    (tmp_path / "metrics.jsonl").write_text('{"header": {"start": {"step": 300}}}\n')
    assert child.step == 0
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tokens": 3}\n{"step": 8, "tokens": 4}\n')
    assert child.step == 8
