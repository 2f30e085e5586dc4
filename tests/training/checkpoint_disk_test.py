"""A full disk and one that cannot be written: one sentence, and what was saved stays as it was."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np

from tests.mounts import private
from tests.training.states import abstract, bits
from training.checkpoint import CheckpointError, Checkpoints
from training.state import TrainState, pair

SIZE = 2 << 20
# Bytes left on the disk: for nothing, a file or two, a part of the arrays, all but their end.
ROOM = (0, 8 << 10, 64 << 10, 300 << 10, 560 << 10)
FIX = "No space left on device; make room there, then run the same command again"


def make(step):
    """About 600 kB that cannot be compressed, in several files."""
    values = np.random.default_rng(step).integers(2**32, size=(4, 37500), dtype=np.uint32)
    params = {f"w{i}": jnp.asarray(row).view(jnp.float32) for i, row in enumerate(values)}
    zero = jnp.asarray(pair(0))
    return TrainState(jnp.int32(step), zero, zero, params, (), {})


def mount(disk, *options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "none", disk], check=True)


def fill(disk, room):
    """Leaves at most about `room` bytes; the last save's writes may not have ended."""
    free = os.statvfs(disk)
    with contextlib.suppress(OSError), (disk / "filler").open("wb") as file:
        file.write(b"\0" * max(0, free.f_bavail * free.f_bsize - room))


def fails(call):
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return "it did not fail"


def main(disk):
    """Runs where it may mount; prints what happened."""
    mount(disk, f"size={SIZE}")
    told = {"full": []}
    with Checkpoints(disk) as checkpoints:
        checkpoints.save(make(1), {})
        checkpoints.wait()
        for room in ROOM:
            fill(disk, room)
            told["full"].append(fails(lambda: (checkpoints.save(make(2), {}), checkpoints.wait())))
            (disk / "filler").unlink()
            found, _ = Checkpoints(disk).restore(None, abstract(make(1)))
            assert bits(found) == bits(make(1))
        checkpoints.save(make(2), {})
        checkpoints.wait()
        told["left"] = sorted(os.listdir(checkpoints.folder))
        assert checkpoints.latest() == 2
        mount(disk, "remount", "ro")
        reader = Checkpoints(disk)
        assert bits(reader.restore(None, abstract(make(2)))[0]) == bits(make(2))
        told["probe"] = fails(checkpoints.probe)
        told["read-only"] = fails(lambda: checkpoints.save(make(3), {}))
    print(json.dumps(told))


def test_full_and_read_only(tmp_path):
    code = f"import pathlib, {__name__} as test; test.main(pathlib.Path({str(tmp_path)!r}))"
    command = [*private(), sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    told, folder = json.loads(done.stdout), tmp_path / "checkpoints"
    sentence = f"step 2 cannot be saved in {folder}: {FIX}; step 1 is the last one saved"
    assert told["full"] == [sentence] * len(ROOM)
    assert told["left"] == ["1", "2", "run.json"]
    writable = "Read-only file system; choose a folder that can be written"
    assert told["probe"] == f"{folder} cannot be written: {writable}"
    assert told["read-only"] == (
        f"step 3 cannot be saved in {folder}: {writable}; step 2 is the last one saved"
    )
    assert not any(pathlib.Path(tmp_path).iterdir())  # nobody else has seen the disk
