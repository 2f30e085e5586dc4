"""What a folder that holds a run lets another one do."""

import dataclasses
import subprocess
import sys

import jax
import pytest

from data.batch import from_words
from tests import tiny
from training import loop, metrics
from training.checkpoint import CheckpointError
from training.resume import lock


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    built = tiny.setup(root)
    workdir = tmp_path_factory.mktemp("run")
    with jax.set_mesh(built.mesh):
        loop.run(tiny.run(built, workdir, steps=2))
    return built, workdir


def test_another_configuration_is_refused_even_if_the_run_is_finished(finished):
    built, workdir = finished
    with jax.set_mesh(built.mesh):
        job = tiny.run(built, workdir, steps=2)
        config = job.header["config"] | {"seed": 7, "train": {"log_every": 5}}
        job = dataclasses.replace(job, header=dict(job.header) | {"config": config})
        with pytest.raises(CheckpointError) as caught:
            loop.run(job)
    assert f"{workdir} holds a run of another configuration (seed 0 -> 7);" in str(caught.value)


def test_a_larger_batch_goes_on_where_the_smaller_one_stopped(finished, root, tmp_path):
    """Rows and tokens are counted on, not multiplied anew."""
    small = tiny.setup(root)
    large = tiny.setup(root, data__batch_size=2 * small.data.batch_size)
    B, L = small.data.batch_size, small.data.length
    rows = []
    with jax.set_mesh(small.mesh):
        loop.run(tiny.run(small, tmp_path, steps=2))
        job = tiny.run(large, tmp_path, steps=4)

        def step(state, batch):
            rows.extend(from_words(jax.device_get(batch.sample)).reshape(-1).tolist())
            return large.program.step(state, batch)

        program = dataclasses.replace(job.program, step=step)
        outcome = loop.run(dataclasses.replace(job, program=program))
    assert outcome.step == 4
    assert rows[: 4 * B] == list(range(2 * B, 6 * B))
    logged = metrics.read(tmp_path / "metrics.jsonl")[1]
    tokens = {row["step"]: row["tokens"] for row in logged}
    assert tokens == {1: B * L, 2: 2 * B * L, 3: 4 * B * L, 4: 6 * B * L}


def test_a_second_writer_is_refused(tmp_path):
    """From another process; a lock that its holder has left is free again."""
    code = (
        "import os, pathlib, sys; os.environ['JAX_PLATFORMS'] = 'cpu'\n"
        "from training.resume import lock\n"
        "with lock(pathlib.Path(sys.argv[1])): print('held')"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    with lock(tmp_path):
        found = subprocess.run(run, capture_output=True, text=True, check=False)
        assert found.returncode != 0
        assert f"another run is writing to {tmp_path}" in found.stderr
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "held\n"
