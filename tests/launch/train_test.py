"""`train` as a process that is told to stop, and as one that must stop by itself."""

import functools
import os
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from launch import train
from launch.files import ROOT
from parallel import mesh as meshes
from tests import tiny
from training.checkpoint import Checkpoints
from training.metrics import read

STEPS = 60


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def start(root, tmp_path_factory):
    """start(workdir): the command as a process; compiled programs are kept between calls."""
    chosen = ("JAX_", "XLA_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(chosen)}
    environ["JAX_PLATFORMS"] = "cpu"
    environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    own = tiny.flags(root, steps=STEPS, ema=0.9, model__dropout=0.1, data__prefetch=2)
    command = [sys.executable, "-m", "launch.train", "--config", "base", *own, "--workdir"]

    def run(workdir):
        return subprocess.Popen(
            [*command, str(workdir)],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def ended(process):
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert not re.search("warning|error|traceback", err, re.IGNORECASE), err
    return out


def losses(workdir):
    _, rows = read(workdir / "metrics.jsonl")
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def wait_for_step(process, workdir, step):
    path, until = workdir / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_text().count('"loss"') < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)


def test_sigterm_saves_and_the_same_command_goes_on(start, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    stopped = start(parts)
    wait_for_step(stopped, parts, 3)
    stopped.send_signal(signal.SIGTERM)
    out = ended(stopped)
    step = int(re.match(rf"stopped at step (\d+) of {STEPS}, saved; to go on: uv run", out)[1])
    assert 3 <= step < STEPS
    assert losses(parts)[-1][0] == step
    with Checkpoints(parts) as checkpoints:
        assert checkpoints.steps() == [step]

    out = ended(start(parts))
    assert ended(start(whole)).split("train on:")[0] == out.split("train on:")[0]
    assert losses(parts) == losses(whole)
    assert [s for s, _ in losses(parts)] == list(range(1, STEPS + 1))
    assert (parts / "final.json").read_text() == (whole / "final.json").read_text()


def test_a_run_whose_loss_is_not_finite_exits_with_1(root, tmp_path, monkeypatch, capsys):
    """Three steps of plain gradient descent at a rate of 1e30 leave nothing finite."""
    own = dict(optim__name="sgd", optim__lr=1e30, optim__clip="none", optim__weight_decay=0)
    argv = tiny.flags(root, train__save_every=1, **own)
    monkeypatch.setattr(meshes, "make", functools.partial(meshes.make, jax.devices()[:1]))
    command = ["train", "--config", "base", "--workdir", str(tmp_path / "run"), *argv]
    monkeypatch.setattr(sys, "argv", command)
    with jax.set_mesh(None), pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("train: ")]
    step = int(re.match(r"train: step (\d) has loss ", line)[1])
    assert "its batch held file_" in line
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.steps() == list(range(1, step))
        last = checkpoints.latest()
    assert ("no checkpoint was saved" if last is None else f"is of step {last};") in line
