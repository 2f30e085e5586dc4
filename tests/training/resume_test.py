"""What a folder that holds a run lets another one do."""

import copy
import dataclasses
import functools
import subprocess
import sys

import jax
import pytest

from data.batch import from_words
from tests import tiny
from training import loop, metrics
from training.changes import Kind, by_kind, kind, refusal
from training.checkpoint import CheckpointError, Checkpoints
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


def _other(job, **changes):
    """The job with other values under dotted keys, written `a__b`."""
    config = copy.deepcopy(job.header["config"])
    for name, value in changes.items():
        *above, last = name.split("__")
        functools.reduce(dict.__getitem__, above, config)[last] = value
    return dataclasses.replace(job, header=dict(job.header) | {"config": config})


def test_what_is_computed_changes_only_where_that_is_accepted(root, tmp_path, capsys):
    built = tiny.setup(root)
    with jax.set_mesh(built.mesh):
        loop.run(tiny.run(built, tmp_path, steps=1))
        job = _other(tiny.run(built, tmp_path, steps=2), optim__lr=1e-4, model__remat="full")
        with pytest.raises(CheckpointError) as caught:
            loop.run(job)
        sentence = str(caught.value)
        assert "(optim.lr 0.003 -> 0.0001); undo that" in sentence
        assert sentence.endswith("or go on with --accept_config")
        loop.run(dataclasses.replace(job, accept_config=True))
        err = capsys.readouterr().err
        keys = "steps 1 -> 2, model.remat 'none' -> 'full'"
        assert f"note: going on from step 1 with other keys ({keys})" in err
        assert "note: from step 1 on the configuration is another one (optim.lr" in err
        again = _other(tiny.run(built, tmp_path, steps=3), optim__lr=1e-4)
        loop.run(again)  # needs no flag any more, and the change stays on record
    with Checkpoints(tmp_path) as checkpoints:
        past = checkpoints.meta()["header"]["changes"]
    first = {"optim.lr": [0.003, 1e-4], "steps": [1, 2]}
    assert past == [
        {"from_step": 1, "changed": first},
        {"from_step": 2, "changed": {"steps": [2, 3]}},
    ]


def test_other_shapes_are_refused_whatever_is_accepted(root, tmp_path):
    built, wide = tiny.setup(root), tiny.setup(root, model__ffns__swiglu__width=64)
    with jax.set_mesh(built.mesh):
        loop.run(tiny.run(built, tmp_path, steps=1))
        job = dataclasses.replace(tiny.run(wide, tmp_path, steps=2), accept_config=True)
        with pytest.raises(CheckpointError) as caught:
            loop.run(job)
    wrong = "params: blocks/0/ffn/up is float32[1 32 2 48] but float32[1 32 2 64] is asked for"
    assert wrong in str(caught.value)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("steps", Kind.HARMLESS),
        ("stepsize", Kind.CONFIG),
        ("train.keep", Kind.HARMLESS),
        ("mesh.fsdp", Kind.HARMLESS),
        ("model.remat", Kind.HARMLESS),
        ("model.rematerialise", Kind.CONFIG),
        ("model.dtype", Kind.CONFIG),
        ("seed", Kind.CORPUS),
        ("optim.methods.adamw.b1", Kind.CONFIG),
        ("data.batch_size", Kind.HARMLESS),
        ("data.sources.text.path", Kind.HARMLESS),
        ("data.domains.web.path", Kind.HARMLESS),
        ("data.domains.web.weight", Kind.CORPUS),
        ("data.packing", Kind.CORPUS),
        ("data.length", Kind.FIXED),
        ("data.tokenizer", Kind.FIXED),
        ("data.tokenizers.hf.path", Kind.FIXED),
        ("train.eval_every", Kind.HARMLESS),
    ],
)
def test_who_may_change_what(key, expected):
    assert kind(key) is expected


def test_when_losses_are_taken_matters_where_the_mixture_follows_them():
    assert kind("train.eval_every", heard=True) is Kind.CORPUS
    assert kind("train.eval_rows", heard=True) is Kind.CORPUS
    assert kind("train.save_every", heard=True) is Kind.HARMLESS


def test_flags_are_asked_for_by_what_changed():
    of = lambda *keys, accepted=(): refusal(by_kind({k: [1, 2] for k in keys}), set(accepted))
    assert of("steps", "mesh.data") is None
    assert of("optim.lr", "data.packing").endswith("go on with --accept_config --accept_corpus")
    assert of("optim.lr", "data.length").endswith("; undo that or choose another --workdir")
    assert of("optim.lr", accepted=[Kind.CONFIG]) is None
    assert "--accept_config" in of("optim.lr", accepted=[Kind.CORPUS])
    assert " and 3 more)" in of(*(f"optim.k{i}" for i in range(11)))


def test_a_run_that_was_killed_before_its_end_was_noted_logs_it_once(root, tmp_path):
    built = tiny.setup(root)
    logged = []
    with jax.set_mesh(built.mesh):
        for _ in range(3):
            loop.run(tiny.run(built, tmp_path, steps=2))
            rows = metrics.read(tmp_path / "metrics.jsonl")[1]
            logged.append([(row["step"], row.get("validation/loss")) for row in rows])
            final = tmp_path / "final.json"
            final.write_text("{") if len(logged) == 1 else final.unlink()
    assert logged[0] == logged[1] == logged[2]


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
