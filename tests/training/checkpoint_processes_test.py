"""One checkpoint of two processes: saved together, restored by one and by two, failing as one."""

import functools
import json
import os
import pathlib
import resource
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from tests.training.states import abstract, bits, first, make, save
from training import manifest
from training.checkpoint import CheckpointError, Checkpoints

STEPS = (1, 2)
FULL = "No space left on device"


def main(process, port, folder):
    """Of each process; prints what happened in a line of JSON."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    told, mesh = {}, jax.make_mesh((4,), ("a",))
    # A collective of the devices from a thread would interleave with those of the step.
    for name in ("sync_global_devices", "broadcast_one_to_all", "process_allgather"):
        setattr(multihost_utils, name, None)
    with Checkpoints(folder / "one") as checkpoints:
        told["from one process"] = _restored(checkpoints, mesh, 3)
    with Checkpoints(folder / "two", keep=1) as checkpoints:
        told["at first"] = checkpoints.latest()
        checkpoints.probe()
        for step in STEPS:
            checkpoints.save(_placed(_state(step), mesh), {"process": process})
        checkpoints.wait()
        told["own"] = _restored(checkpoints, mesh, STEPS[-1])
        for name, (owner, thing, where) in {
            "hash": (manifest, "digests", 1),
            "seal": (manifest, "write", 0),
        }.items():
            told[name] = _fails(checkpoints, mesh, owner, thing, process == where)
        told["write"] = _fails_to_write(checkpoints, mesh, process == 1)
        checkpoints.save(_placed(_state(7), mesh), {})
        checkpoints.wait()
        told["again"] = _error(lambda: checkpoints.save(_placed(_state(7), mesh), {}))
    if process == 0:
        path = next((folder / "two" / "checkpoints" / "7" / "opt").rglob("ocdbt.process_1/d/*"))
        path.write_bytes(path.read_bytes()[:-1])
    with Checkpoints(folder / "two") as checkpoints:
        told["none is sound"] = _error(checkpoints.latest)
    with Checkpoints(folder / "two", trust=True) as checkpoints:
        told["trusted"] = checkpoints.latest()
    print(json.dumps(told))


@functools.cache
def _values():
    return make(seed=5)


def _state(step):
    return _values()._replace(step=jnp.int32(step))


def _placed(state, mesh):
    """The same values in every process, each of which holds its part."""
    place = first(mesh)

    def put(leaf):
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, place(leaf), lambda index: values[index])

    return jax.tree.map(put, state)


def _restored(checkpoints, mesh, step):
    """Whether every part of every leaf is what was saved to the last bit; the parts compared."""
    wanted = _state(step)
    found, _ = checkpoints.restore(None, abstract(wanted, first(mesh)))
    compared = 0
    for leaf, values in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == np.asarray(values[shard.index]).tobytes()
            compared += 1
    return compared


def _error(call):
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return None


def _fails(checkpoints, mesh, owner, thing, here):
    def full(*args, **own):
        raise OSError(28, FULL)

    with pytest.MonkeyPatch.context() as patch:
        if here:
            patch.setattr(owner, thing, full)
        checkpoints.save(_placed(_state(7), mesh), {})
        return _error(checkpoints.wait)


def _fails_to_write(checkpoints, mesh, here):
    """The arrays of one process are too large for its limit on files, those of the other not."""
    state, limits = _state(7), resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(2**32, size=(4, 1 << 16), dtype=np.uint32)
    state = state._replace(aux={"noise": jnp.asarray(noise)})
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, limits[1]))
    try:
        checkpoints.save(_placed(state, mesh), {})
        return _error(checkpoints.wait)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder, and of both processes what they told and what they printed as errors."""
    folder = tmp_path_factory.mktemp("runs")
    mesh, state = jax.make_mesh((8,), ("a",)), _state(3)
    save(folder / "one", jax.device_put(state, jax.tree.map(first(mesh), state)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    code = "import pathlib, sys, {} as test; test.main({}, {}, pathlib.Path(sys.argv[1]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(__name__, process, port), str(folder)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    return folder, [json.loads(out.splitlines()[-1]) for out, _ in said], [err for _, err in said]


def test_both_come_to_the_same(run):
    _, (told, other), _ = run
    assert told == other
    assert told["at first"] is None
    leaves = len(jax.tree.leaves(_state(3)))
    assert told["from one process"] == told["own"] == 2 * leaves  # two devices a process


@pytest.mark.parametrize(
    ("where", "cause"),
    [
        ("hash", f"{FULL} (process 1); make room there, then run the same command again"),
        ("seal", f"{FULL}; make room there, then run the same command again"),
        ("write", "File too large (process 1); raise the limit on the size of a file (ulimit -f)"),
    ],
)
def test_the_error_of_one_is_raised_by_both(run, where, cause):
    folder, (told, _), _ = run
    last = "step 2 is the last one saved"
    assert told[where] == (
        f"step 7 cannot be saved in {folder / 'two' / 'checkpoints'}: {cause}; {last}"
    )


def test_after_it_the_next_save_is_whole(run):
    folder, (told, _), _ = run
    assert told["again"].endswith("remove it to save it again")
    assert sorted(os.listdir(folder / "two" / "checkpoints")) == ["7", "run.json"]
    files = manifest.read(folder / "two" / "checkpoints" / "7").files
    for process in (0, 1):
        assert any(f"ocdbt.process_{process}/d/" in path for path in files)
    assert "step 7: opt/ocdbt.process_1/d/" in told["none is sound"]
    assert told["trusted"] == 7


def test_one_process_goes_on_from_two(run):
    folder, _, _ = run
    mesh, wanted = jax.make_mesh((8,), ("a",)), _state(7)
    with Checkpoints(folder / "two", trust=True) as checkpoints:
        for place in (first(mesh), None):
            found = checkpoints.restore_params(7, abstract(wanted.params, place))[0]
            assert bits(found) == bits(wanted.params)


def test_only_the_first_one_tells(run):
    """gloo's own lines aside."""
    _, _, errors = run
    told = [[line for line in text.splitlines() if "Gloo" not in line] for text in errors]
    assert told == [[], []]
    assert pathlib.Path(run[0]).exists()
