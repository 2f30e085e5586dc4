"""What checkpoints say, and leave behind, when something is missing, wrong or killed."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.states import abstract, make
from training.checkpoint import CheckpointError, Checkpoints

NO_MANIFEST = (
    "it has no manifest, as a step of an older version or another program has none; --trust opens "
    "it unverified"
)


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        yield checkpoints


def test_what_does_not_fit_is_named_leaf_by_leaf(checkpoints):
    state = make()
    checkpoints.save(state, {})
    checkpoints.wait()
    wanted = abstract(make(rows=24))
    wanted.params["head/kernel"] = wanted.params.pop("blocks/0/mixer/q")
    wanted.aux["mask"] = jax.ShapeDtypeStruct((2,), jnp.int32)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(3, wanted)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for phrase in [
        f"{checkpoints.folder / '3'} does not fit: params: head/kernel is missing",
        "params: blocks/0/mixer/q is not asked for",
        "params: embed/tokens is float32[16 8] but float32[24 8] is asked for",
        "opt: [1].inner_state[0].mu['embed/tokens'] is float32[16 8] but float32[24 8]",
        "rest: ['aux']['mask'] is bool[2] but int32[2]",
    ]:
        assert phrase in sentence
    with pytest.raises(CheckpointError, match=r"params: embed/tokens is float32\[16 8\]"):
        checkpoints.restore_params(3, wanted.params)


def test_a_long_list_is_cut(checkpoints):
    state = make()._replace(params={f"w{i}": jnp.ones(1) for i in range(50)})
    checkpoints.save(state, {})
    checkpoints.wait()
    with pytest.raises(CheckpointError, match=r"w9 is not asked for.*; and 30 more$"):
        checkpoints.restore(3, abstract(state._replace(params={})))


def test_nothing_there(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.latest() is None
    assert checkpoints.steps() == []
    for call in (checkpoints.meta, checkpoints.restore_params):
        with pytest.raises(CheckpointError, match=f"no finished checkpoint in {tmp_path}"):
            call()
    checkpoints.close()
    assert not (tmp_path / "run").exists()


def test_only_finished_steps_are_listed(checkpoints, tmp_path, capsys):
    state = make()
    checkpoints.save(state, {})
    checkpoints.close()
    folder = tmp_path / "checkpoints"
    for left in ("9.orbax-checkpoint-tmp-123", "9.saving", "1.removed-0a", "notes"):
        (folder / left / "params").mkdir(parents=True)
    (folder / "7" / "meta").mkdir(parents=True)
    (folder / "7" / "meta" / "metadata").write_text("{}")
    reader = Checkpoints(tmp_path)
    assert (reader.steps(), reader.latest()) == ([3], 3)
    note, end = capsys.readouterr().err.split("\n")
    assert (note, end) == (f"note: step 7 in {folder} is skipped: {NO_MANIFEST}", "")
    with pytest.raises(CheckpointError, match=r"step 7 in .* is not sound: it has no manifest"):
        reader.restore(7, abstract(state))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 8 in .*, only 3"):
        reader.restore(8, abstract(state))
    assert (folder / "9.saving").exists()


def test_what_was_cut_off_is_swept_away_and_nothing_else(tmp_path):
    folder = tmp_path / "checkpoints"
    for left in ("1.removed-0a", "2.saving", "3.saving.orbax-checkpoint-tmp", "notes", "4.aside-1"):
        (folder / left / "params").mkdir(parents=True)
    for left in ("run.json.tmp", ".probe-3", "notes.tmp"):
        (folder / left).write_text("")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(make(2), {})
    assert sorted(os.listdir(folder)) == ["2", "4.aside-1", "notes", "notes.tmp", "run.json"]


def test_a_killed_save_leaves_the_last_one(tmp_path):
    """SIGKILL while Orbax writes the files."""
    code = (
        "import os, pathlib, signal, sys, numpy as np, jax.numpy as jnp\n"
        "from training.checkpoint import Checkpoints; from training.state import TrainState, pair\n"
        "checkpoints = Checkpoints(sys.argv[1])\n"
        "def save(step, size):\n"
        "    w = {'w': jnp.asarray(np.random.default_rng(step).normal(size=size), jnp.float32)}\n"
        "    zero = jnp.asarray(pair(0))\n"
        "    checkpoints.save(TrainState(jnp.int32(step), zero, zero, w, (), {}), {})\n"
        "save(1, 8); checkpoints.wait(); save(2, 8_000_000)\n"
        "while not list(pathlib.Path(sys.argv[1]).glob('checkpoints/2.saving*/params*')): pass\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    left = os.listdir(tmp_path / "checkpoints")
    assert any(name.startswith("2.saving") for name in left), left
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        params, _ = checkpoints.restore_params()
        np.testing.assert_array_equal(
            params["w"], np.random.default_rng(1).normal(size=8).astype(np.float32)
        )
        checkpoints.save(make(2), {})
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2", "run.json"]


def test_a_step_is_not_saved_twice(checkpoints):
    checkpoints.save(make(), {})
    with pytest.raises(CheckpointError, match="step 3 is already in"):
        checkpoints.save(make(), {})


def test_a_failed_save_is_one_sentence(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    checkpoints = Checkpoints(tmp_path)
    told = f"step 3 cannot be saved in {tmp_path / 'checkpoints'}: File exists"
    with pytest.raises(CheckpointError, match=told):
        checkpoints.save(make(), {})
    with pytest.raises(CheckpointError, match="checkpoints cannot be written: File exists"):
        checkpoints.probe()
    with pytest.raises(CheckpointError, match="must be JSON"):
        checkpoints.save(make(), {"function": print})
    with pytest.raises(CheckpointError, match="keep must be at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_a_save_that_fails_in_the_background(tmp_path):
    """A limit on files is one sentence at the next call; no thread prints anything."""
    code = (
        "import resource, sys, numpy as np, jax.numpy as jnp\n"
        "from training.checkpoint import CheckpointError, Checkpoints\n"
        "from training.state import TrainState, pair\n"
        "w = np.random.default_rng(0).normal(size=(40, 1 << 15))\n"
        "w = {f'w{i}': jnp.asarray(row, jnp.float32) for i, row in enumerate(w)}\n"
        "zero = jnp.asarray(pair(0))\n"
        "make = lambda step: TrainState(jnp.int32(step), zero, zero, w, (), {'x': zero})\n"
        "checkpoints = Checkpoints(sys.argv[1])\n"
        "checkpoints.save(make(1), {}); checkpoints.wait()\n"
        "limits = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))\n"
        "checkpoints.save(make(2), {})\n"
        "try: checkpoints.wait()\n"
        "except CheckpointError as error: print(error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, limits)\n"
        "print(checkpoints.steps())\n"
        "checkpoints.save(make(3), {}); checkpoints.close(); print(checkpoints.steps())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    )
    sentence, failed, saved = done.stdout.splitlines()
    assert sentence == (
        f"step 2 cannot be saved in {tmp_path / 'checkpoints'}: File too large; raise the limit on "
        "the size of a file (ulimit -f); step 1 is the last one saved"
    )
    assert (failed, saved, done.stderr) == ("[1]", "[1, 3]", "")


def _left(before: set) -> set:
    """Threads beyond those; the workers of a closed event loop end once it is collected."""
    deadline = time.monotonic() + 20
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    return left


def test_quiet_and_without_leftover_threads(tmp_path, capfd):
    from absl import logging

    before, verbosity = set(threading.enumerate()), logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    for _ in range(3):
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.save(make((checkpoints.latest() or 0) + 1), {})
            checkpoints.wait()
            checkpoints.restore(None, abstract(make()))
    logging.set_verbosity(verbosity)
    assert not _left(before)
    assert capfd.readouterr() == ("", "")
