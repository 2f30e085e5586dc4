"""`train` as several real processes on this machine: what they compute, save, agree on and say.

Gradients are summed over devices in another order by one process than by several, and in the same
by any number of several: with two devices there is but one order, so everything is equal to the
last bit, and with four it is not (ROUNDING).
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from launch.files import ROOT
from tests import tiny
from tests.launch.several import Processes, computed, free
from training.checkpoint import Checkpoints
from training.metrics import read

MINUTE = 60.0  # within which a lost process is named and the others are gone
LOST = 3
STALL = {"MESHWORK_STALL_SECONDS": "6"}
# float32 sums of a thousand numbers in another order, through a few steps of AdamW.
ROUNDING = dict(rtol=1e-4, atol=1e-6)
RUN = ("-m", "launch.train")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def start(root, tmp_path_factory):
    """start(workdir, count, devices, ..): processes of a run with so many devices each.

    run: what Python runs.  each: further flags by index.  environ: more of it.
    """
    cache, started = str(tmp_path_factory.mktemp("cache")), []
    common = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "XDG_CACHE_HOME": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(workdir, count, devices, *, run=RUN, each=None, environ=None, where=None, **changes):
        own = tiny.flags(root, **({"mesh__data": -1, "steps": 100_000} | changes))
        at = f"--coordinator=127.0.0.1:{free()}"
        here = common | {"JAX_NUM_CPU_DEVICES": str(devices)} | (environ or {})
        processes = Processes([], workdir)
        for index in range(count):
            place = [at, f"--processes={count}", f"--process={index}"] if count > 1 else []
            argv = [sys.executable, *run, "--config=base", *own, f"--workdir={workdir}", *place]
            processes.each.append(
                subprocess.Popen(
                    [*argv, *(each or {}).get(index, [])],
                    cwd=ROOT,
                    env=here,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        started.extend(processes.each)
        return processes

    yield run
    for process in started:
        process.kill()
        process.communicate()


def alone(start, workdir, devices, steps, **changes):
    ((status, out, err),), _ = start(workdir, 1, devices, steps=steps, **changes).ends()
    assert status == 0, err
    return out


@pytest.fixture(scope="module")
def stopped(start, tmp_path_factory):
    """(workdir, step) of a run of two processes, of which one that does not lead got SIGTERM."""
    workdir = tmp_path_factory.mktemp("stopped")
    two = start(workdir, 2, 1)
    two.wait_for_step(4)
    two[1].send_signal(signal.SIGTERM)
    (leader, follower), seconds = two.ends()
    assert (leader[0], follower[:2]) == (0, (0, "")), (leader, follower)
    assert seconds < MINUTE
    step = int(re.match(r"stopped at step (\d+) of 100000, saved; to go on: ", leader[1])[1])
    assert " --processes=2 --process=I " in leader[1]
    assert step >= 4
    return workdir, step


@pytest.fixture(scope="module")
def whole(start, stopped, tmp_path_factory):
    """(workdir, last step, stdout) of the same run as one process that nobody stops."""
    workdir, last = tmp_path_factory.mktemp("whole"), stopped[1] + 4
    said = alone(start, workdir, 2, last, train__save_every=last - 3)
    return workdir, last, said


def resumable(whole, workdir):
    """A copy that has yet to take its last three steps."""
    shutil.copytree(whole[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / str(whole[1]))
    (workdir / "final.json").unlink()
    return workdir


def test_two_stop_at_one_step_and_one_goes_on(start, stopped, whole, tmp_path):
    workdir, last = tmp_path / "one", whole[1]
    shutil.copytree(stopped[0], workdir)
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.steps() == [stopped[1]]
    assert max(computed(workdir)) == stopped[1]
    alone(start, workdir, 2, last)
    assert computed(workdir) == computed(whole[0])
    assert (workdir / "final.json").read_text() == (whole[0] / "final.json").read_text()


def test_two_end_as_one_does(start, whole, tmp_path):
    """From a checkpoint of one: scores, the model's text and what is printed are the same."""
    workdir = resumable(whole, tmp_path / "two")
    (leader, follower), _ = start(workdir, 2, 1, steps=whole[1]).ends()
    assert (leader[0], follower[:2]) == (0, (0, "")), (leader, follower)
    assert computed(workdir) == computed(whole[0])
    assert (workdir / "final.json").read_text() == (whole[0] / "final.json").read_text()
    assert leader[1].partition("train on:")[0] == whole[2].partition("train on:")[0]
    assert "\nsample\n" in leader[1]


def test_the_death_of_the_first_is_named(start, whole, tmp_path):
    workdir, last = resumable(whole, tmp_path / "two"), whole[1]
    two = start(workdir, 2, 1, train__save_every=last + 5)
    two.wait_for_step(last + 6)
    two[0].kill()
    ((status, out, said),), seconds = two.ends(0)
    assert (status, out) == (LOST, "")
    match = re.fullmatch(
        rf"train: host 0 \({socket.gethostname()}, process {two[0].pid}\) died after step (\d+); "
        rf"start again with the same command to go on from step ({last - 3}|{last + 5})",
        said,
    )
    assert match, said
    assert int(match[1]) > last
    assert seconds < MINUTE
    rows = computed(workdir)
    assert {step: rows[step] for step in computed(whole[0])} == computed(whole[0])
    names = {name for name in read(workdir / "metrics.jsonl")[1][-1] if name.startswith("host_")}
    assert names == {f"host_{part}_seconds/{i}" for part in ("step", "input") for i in (0, 1)}


def test_four_save_together_and_the_death_of_another_is_named(start, tmp_path):
    silent = {"data__sources__stdlib__holdout": 0}  # No evaluation is compiled.
    processes = start(tmp_path, 4, 1, train__save_every=4, **silent)
    processes.wait_for_step(6)
    processes.wait_for(lambda: Checkpoints(tmp_path).steps())
    processes[2].kill()
    found, seconds = processes.ends(2)
    assert seconds < MINUTE
    with Checkpoints(tmp_path) as checkpoints:
        saved = checkpoints.steps()
    who = rf"host 2 \({socket.gethostname()}, process {processes[2].pid}\)"
    for status, _, said in found:
        assert status == LOST
        assert re.match(rf"train: {who} died after step \d+; start again with the same ", said)
        assert re.search(rf"to go on from step ({'|'.join(map(str, saved))})$", said)
    before = computed(tmp_path)
    for step in saved[1:]:
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    alone(start, tmp_path, 4, 6, **silent)
    after = computed(tmp_path)
    assert list(after) == [1, 2, 3, 4, 5, 6]
    for step, row in after.items():
        assert row.keys() == before[step].keys()
        for name, value in row.items():
            np.testing.assert_allclose(before[step][name], value, err_msg=name, **ROUNDING)


def test_one_that_is_stopped_is_named(start, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    two = start(tmp_path / "run", 2, 1, environ=STALL)
    two.wait_for_step(whole[1] + 1)
    two[1].send_signal(signal.SIGSTOP)
    ((status, _, said),), seconds = two.ends(1)
    assert status == LOST
    assert re.search(rf"host 1 \(.*, process {two[1].pid}\) has given no sign of life for", said)
    assert "; end it there, then start again with the same command to go on from step " in said
    assert seconds < MINUTE
    two[1].send_signal(signal.SIGCONT)
    ((status, _, its),), _ = two.ends(0)
    assert (status, its) == (LOST, said)


HANGS = """
import json, sys, time
from data.rows import Data

numbered, index = Data._numbered, int(sys.argv[-1].rpartition("=")[2])
workdir = next(a.partition("=")[2] for a in sys.argv if a.startswith("--workdir="))

def build(self, numbers):
    with open(f"{workdir}/built.{index}", "a") as file:
        print(json.dumps(numbers.tolist()), file=file)
    if index == 0 and numbers[0] >= 40:
        time.sleep(1000)
    return numbered(self, numbers)

Data._numbered = build
from launch import train
train.main()
"""


def test_each_builds_its_own_rows_and_one_that_hangs_is_named(start, tmp_path):
    """Its main thread waits for a file system, say, while its watchdog lives."""
    two = start(tmp_path, 2, 1, run=("-c", HANGS), environ=STALL)
    two.wait_for_step(5)
    found, seconds = two.ends()
    for status, _, said in found:
        assert status == LOST
        assert re.search(
            rf"host 0 \(.*, process {two[0].pid}\) has kept the others waiting for \d+ seconds "
            "while waiting for its batch after step 1[01]; ",
            said,
        ), said
    assert seconds < MINUTE
    for index in range(2):
        lines = (tmp_path / f"built.{index}").read_text().splitlines()
        built = [json.loads(line) for line in lines]
        assert built == [[4 * i + 2 * index, 4 * i + 2 * index + 1] for i in range(len(built))]
        assert len(built) >= 10


def test_another_configuration_is_refused_before_anything_starts(start, tmp_path):
    own = {1: ["--config.seed=7", "--accept_corpus"]}
    found, _ = start(tmp_path / "run", 2, 1, each=own).ends()
    assert [status for status, *_ in found] == [2, 2]
    (said,) = {said for *_, said in found}
    assert " differ in seed (0 and 7), --accept_corpus (False and True); start every" in said
    assert not (tmp_path / "run").exists()


def test_another_corpus_is_refused_before_jax_starts(root, start, tmp_path):
    """The same path, which leads each process to files of its own."""
    other = shutil.copytree(root, tmp_path / "other")
    with (other / "file_1.py").open("a") as file:
        file.write("x = 1\n")
    places = [tmp_path / "a", tmp_path / "b"]
    for place, target in zip(places, (root, other), strict=True):
        place.mkdir()
        (place / "corpus").symlink_to(target)
    code = (
        f"import os; os.chdir({str(tmp_path)!r} + '/' + 'ab'[int(__import__('sys').argv[-1][-1])]);"
    )
    code += (
        f"__import__('sys').path.insert(0, {str(ROOT)!r}); from launch import train; train.main()"
    )
    changed = {"data__sources__stdlib__root": "corpus"}
    found, _ = start(tmp_path / "run", 2, 1, run=("-c", code), **changed).ends()
    assert [status for status, *_ in found] == [2, 2]
    (said,) = {said for *_, said in found}
    assert re.search(r" differ in the corpus's fingerprint \('\w+' and '\w+'\); give every", said)
