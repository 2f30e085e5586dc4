"""Checkpoints as the commands see them: damaged ones, disks that are full or fixed, two runs."""

import contextlib
import functools
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import jax
import pytest

from launch import evaluate, generate, setup, train
from launch.config import resolve
from launch.files import ROOT
from launch.setup import build, header
from parallel import mesh as meshes
from tests import tiny
from tests.mounts import private
from training.checkpoint import Checkpoints
from training.resume import lock

COMMANDS = {"train": train.main, "evaluate": evaluate.main, "generate": generate.main}
RUN = dict(train__save_every=1, train__sample_tokens=1)


def call(command, *argv):
    """(exit status, stdout, lines of stderr) of main() in this process with one device."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv = [command, *["--config=base"] * (command == "train"), *map(str, argv)]
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(None):
        patch.setattr(meshes, "make", functools.partial(meshes.make, jax.devices()[:1]))
        patch.setattr(sys, "argv", argv)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                COMMANDS[command]()
            except SystemExit as stop:
                status = stop.code
    return status, out.getvalue(), err.getvalue().splitlines()


def notes(lines):
    return [line for line in lines if line.startswith("note: ")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


def test_a_damaged_checkpoint_is_skipped_and_opens_with_trust(root, tmp_path, monkeypatch):
    with jax.set_mesh(None):
        built = build(resolve("base", tiny.overrides(root, **RUN)), meshes.make(jax.devices()[:1]))
        state = built.program.init()
        with Checkpoints(tmp_path) as checkpoints:
            for step in (1, 2, 3):
                numbered = state._replace(step=state.step + step)
                checkpoints.save(numbered, {"header": header(built)})
    folder, workdir = tmp_path / "checkpoints", ("--workdir", tmp_path)
    (folder / "3" / "manifest.jsonl").unlink()
    own = {"train": tiny.flags(root, steps=4, **RUN), "generate": ["--prompt=x", "--tokens=1"]}
    note = f"note: step 3 in {folder} is skipped: it has no manifest, "

    def opened(checkpoints, step, corpus):
        raise ValueError(f"opened step {step}")

    with monkeypatch.context() as patch:
        patch.setattr(setup, "_reopen", opened)
        for command in ("evaluate", "generate"):
            for trust, step in ([], 2), (["--trust"], 3):
                status, _, err = call(command, *workdir, *trust, *own.get(command, []))
                assert (status, err[-1]) == (2, f"{command}: opened step {step}")
                assert [line.startswith(note) for line in notes(err)] == [True] * (not trust)

    path = next((folder / "2" / "params").glob("d/*"))
    path.write_bytes(path.read_bytes()[:-1])
    (folder / "1" / "meta" / "metadata").unlink()
    for command in COMMANDS:
        status, out, err = call(command, *workdir, *own.get(command, []))
        assert (status, out) == (2, "")
        assert err[-1].startswith(f"{command}: no step in {folder} is sound (step 3: ")
        assert all(part in err[-1] for part in ("step 2: params/d/", "step 1: meta/metadata is "))
    status, _, err = call("train", *workdir, "--trust", *own["train"])
    assert status == 0, err
    assert not any("skipped" in line for line in err)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 4  # went on from the third


def small_disk(root, disk):
    """Runs where it may mount: on a disk that is full after a save, then larger, then fixed."""

    def mount(*options):
        options = ",".join(options)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=True)

    run = lambda *own: call("train", "--workdir", disk, *own, *tiny.flags(root, steps=4, **RUN))
    mount("size=900k")
    told = {"full": run()}
    told["saved"] = Checkpoints(disk).latest()
    mount("remount", "size=99m")
    told["larger"] = run()
    mount("remount", "ro")
    told["fixed"] = run()
    told["read"] = Checkpoints(disk).latest()
    print(json.dumps(told))


def test_a_disk_that_is_full_and_one_that_is_fixed(root, tmp_path):
    code = f"import sys, {__name__} as test; test.small_disk(*sys.argv[1:])"
    command = [*private(), sys.executable, "-c", code, str(root), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    told, folder = json.loads(done.stdout.splitlines()[-1]), tmp_path / "checkpoints"
    status, out, err = told["full"]
    saved = told["saved"]
    assert (status, out) == (2, "")
    assert saved in (1, 2, 3)
    assert err[-1] == (
        f"train: step {saved + 1} cannot be saved in {folder}: No space left on device; make room "
        f"there, then run the same command again; step {saved} is the last one saved"
    )
    assert told["larger"][0] == 0, told["larger"]
    assert notes(told["larger"][2]) == []
    status, out, err = told["fixed"]
    assert (status, out) == (2, "")
    (line,) = [line for line in err if line.startswith("train: ")]
    assert line.endswith("Read-only file system; choose a folder that can be written")
    assert told["read"] == 4


@contextlib.contextmanager
def unprivileged():
    """Rights to files are what they are for everybody, also where root runs the tests."""
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_that_may_not_be_written_is_told_before_the_first_step():
    """Also where only the folder of checkpoints is, of a run that could lock its own."""
    with tempfile.TemporaryDirectory() as place:  # pytest's are closed to others
        place = pathlib.Path(place)
        place.chmod(0o777)
        own = ["--workdir", place, *tiny.flags(tiny.corpus(place / "corpus"), steps=4, **RUN)]
        assert call("train", *own, "--print_params")[0] == 0  # all is imported while it can be
        (place / "checkpoints").mkdir(mode=0o555)
        with unprivileged():
            status, out, err = call("train", *own)
        assert (status, out) == (2, "")
        assert err[-1] == (
            f"train: {place / 'checkpoints'} cannot be written: Permission denied; choose a folder "
            "that can be written"
        )
        assert sorted(os.listdir(place)) == ["checkpoints", "corpus", "lock"]
        (place / "lock").unlink()
        place.chmod(0o555)
        with unprivileged():
            status, out, err = call("train", *own)
        assert (status, out) == (2, "")
        assert err[-1].startswith(f"train: {place / 'lock'}: Permission denied; ")
        place.chmod(0o777)


def test_a_second_run_is_refused_until_the_first_is_gone(root, tmp_path):
    """The first is another process, which is killed and leaves its lock."""
    own = ["--workdir", tmp_path, *tiny.flags(root, steps=2, **RUN)]
    long = [*map(str, own), "--config", "base"]
    long = [text.replace("steps=2", "steps=1000000") for text in long]
    flags = "--xla_backend_optimization_level=0"
    first = subprocess.Popen(
        [sys.executable, "-m", "launch.train", *long],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "lock").exists():
            assert first.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        status, out, err = call("train", *own)
        assert (status, out) == (2, "")
        assert err[-1] == (
            f"train: another run is writing to {tmp_path}; wait for it or choose another --workdir"
        )
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (tmp_path / "lock").exists()
    with lock(tmp_path):
        pass
