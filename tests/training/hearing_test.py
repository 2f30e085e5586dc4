"""A mixture hears the losses of its domains in order, and resumes with the weights it had."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

import data.pipeline
from tests import tiny
from tests.training import mixed
from tests.training.mixed import DOMAINS, Mixed
from tests.training.states import bits
from training import loop, metrics
from training.checkpoint import Checkpoints
from training.hearing import Hearing

STEPS, ROWS = 6, 4
PERIODS = dict(eval_every=2, eval_rows=6)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tiny.corpus(tmp_path_factory.mktemp("corpus"))
    built = mixed.setup(root, data__micro_batches=2)
    with jax.set_mesh(built.mesh):
        yield built


def logged(workdir):
    """Rows of the log without what depends on the clock."""
    found = metrics.read(workdir / "metrics.jsonl")[1]
    clocks = ("time", "seconds_to_first_step", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in clocks} for row in found]


def stopped_after(job, count, act=lambda: os.kill(os.getpid(), signal.SIGTERM)):
    """The job, to which this happens during its step number `count`."""
    calls = iter(range(1, 10**6))

    def step(state, batch):
        if next(calls) == count:
            act()
        return job.program.step(state, batch)

    return dataclasses.replace(job, program=dataclasses.replace(job.program, step=step))


@pytest.fixture(scope="module")
def whole(built, tmp_path_factory):
    """{what is heard: (the data, outcome, workdir)} of uninterrupted runs."""
    runs = {}
    for hears in ("train", "validation", "nothing"):
        data, workdir = Mixed(built.data, hears), tmp_path_factory.mktemp(hears)
        runs[hears] = data, loop.run(mixed.run(built, workdir, data, **PERIODS)), workdir
    return runs


def test_every_step_is_heard_in_order_with_its_own_losses(whole):
    data, _, workdir = whole["train"]
    assert [row for row, _, _ in data.log] == [ROWS * n for n in range(1, STEPS + 1)]
    steps = [row for row in logged(workdir) if "loss" in row]
    for row, (position, losses, shares) in zip(steps, data.log, strict=True):
        assert position == row["step"] * ROWS
        assert sum(shares) == pytest.approx(1, abs=1e-6)
        assert np.dot(losses, shares) == pytest.approx(row["nll"], rel=1e-6)
        seen = {f"domain_loss/{n}": x for n, x, s in zip(DOMAINS, losses, shares, strict=True) if s}
        assert {k: v for k, v in row.items() if k.startswith("domain_loss/")} == seen
        assert [row[f"domain_share/{name}"] for name in DOMAINS] == shares
        drawn = data.weights(position - ROWS)
        assert {name: row[f"domain_weight/{name}"] for name in DOMAINS} == drawn
    assert data.weights(0) != data.weights((STEPS - 1) * ROWS)


def test_a_domain_that_a_batch_does_not_hold_has_no_loss(built, tmp_path):
    data = Mixed(built.data)
    data.domain = lambda row: 2 * (row % 2)
    loop.run(mixed.run(built, tmp_path, data, steps=2))
    assert all(shares[1] == 0 < min(shares[0], shares[2]) for _, _, shares in data.log)
    for row in logged(tmp_path)[:2]:
        losses = [name for name in row if name.startswith("domain_loss/")]
        assert losses == ["domain_loss/code", "domain_loss/tables"]
        assert row["domain_share/prose"] == 0


def test_held_out_losses_are_heard_at_every_period(whole):
    """At the last step too, whose own score is of all rows: a longer run would have heard it."""
    data, outcome, workdir = whole["validation"]
    assert [row for row, _, _ in data.log] == [2 * ROWS, 4 * ROWS, 6 * ROWS]
    scores = [row for row in logged(workdir) if "validation/loss" in row]
    assert [row["step"] for row in scores] == [2, 4, 6]
    for row, (_, losses, shares) in zip(scores[:2], data.log, strict=False):
        assert [row[f"validation/loss/{name}"] for name in DOMAINS] == losses
        assert np.dot(losses, shares) == pytest.approx(row["validation/loss"], rel=1e-6)
    assert scores[2]["validation/loss"] == outcome.score.loss
    assert set(outcome.score.domains) == set(DOMAINS)
    assert loop.final(workdir, STEPS) == outcome.score


def test_what_is_not_asked_for_is_not_heard_or_kept(built, whole):
    data, _, workdir = whole["nothing"]
    assert data.log == []
    with Checkpoints(workdir) as checkpoints:
        assert set(checkpoints.meta()) == {"header", "shapes"}
    assert "domain_loss/code" in {name for row in logged(workdir) for name in row}


@pytest.mark.parametrize("hears", ["train", "validation"])
@pytest.mark.parametrize("count", [1, 4])
def test_an_interrupted_run_ends_with_the_same_weights(built, whole, tmp_path, hears, count):
    """Step 4 is one after which held-out losses are heard."""
    job = mixed.run(built, tmp_path, Mixed(built.data, hears), **PERIODS)
    assert loop.run(stopped_after(job, count)).step == count
    same(built, tmp_path, whole[hears])


def same(built, workdir, whole):
    """The run in workdir goes on in a new process, and ends like the uninterrupted one."""
    expected, outcome, other = whole
    data = Mixed(built.data, expected.hears)
    found = loop.run(mixed.run(built, workdir, data, **PERIODS))
    assert bits(found.state) == bits(outcome.state)
    assert found.score == outcome.score
    assert data.log == expected.log[-len(data.log) :]
    assert data.weights(10**6) == expected.weights(10**6)
    assert logged(workdir) == logged(other)


MIXINGS = {"online": {}, "dynamic": {"data__mixings__dynamic__references": "code:1,words:2"}}


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_real_mixture_resumes_with_its_weights(tmp_path, mixing):
    """The shipped methods on two corpora, stopped after weights have changed."""
    own = {f"data__domains__{name}__source": "stdlib" for name in ("code", "words")}
    own |= {"data__domains__words__root": tiny.corpus(tmp_path / "b", 25)}
    own |= {f"data__mixings__{mixing}__delay": 2, "data__mixing": mixing, **MIXINGS[mixing]}
    made = tiny.setup(tiny.corpus(tmp_path / "a"), data__mixture="code,words", **own)
    fresh = lambda: data.pipeline.build(seed=made.config["seed"], **made.config["data"])
    job = lambda name: mixed.run(made, tmp_path / name, fresh(), **PERIODS)
    with jax.set_mesh(made.mesh):
        expected = loop.run(job("whole"))
        assert loop.run(stopped_after(job("parts"), 4)).step == 4
        found = loop.run(job("parts"))
    assert bits(found.state) == bits(expected.state)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    weights = [row["domain_weight/code"] for row in logged(tmp_path / "whole") if "loss" in row]
    assert weights[0] == 0.5
    assert len(set(weights[2:])) > 1


@pytest.mark.parametrize("hears", ["train", "validation"])
def test_a_killed_run_repeats_what_it_had_not_saved(built, whole, tmp_path, hears):
    def fail():
        raise RuntimeError("the machine is gone")

    job = mixed.run(built, tmp_path, Mixed(built.data, hears), save_every=2, **PERIODS)
    with pytest.raises(RuntimeError, match="gone"):
        loop.run(stopped_after(job, 4, fail))
    same(built, tmp_path, whole[hears])


@pytest.mark.parametrize("hears", ["train", "validation"])
def test_a_shorter_run_extended_equals_the_longer_one(built, whole, tmp_path, hears):
    expected, outcome, _ = whole[hears]
    loop.run(mixed.run(built, tmp_path, Mixed(built.data, hears), steps=4, **PERIODS))
    data = Mixed(built.data, hears)
    found = loop.run(mixed.run(built, tmp_path, data, **PERIODS))
    assert bits(found.state) == bits(outcome.state)
    assert data.weights(10**6) == expected.weights(10**6)


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_losses_are_heard_however_far_ahead_batches_are_built(built, tmp_path, depth):
    """And of every step, also where few are logged."""
    data = Mixed(built.data, "train", depth)
    loop.run(mixed.run(built, tmp_path, data, log_every=100))
    assert [row for row, _, _ in data.log] == [ROWS * n for n in range(1, STEPS + 1)]
    assert [row["step"] for row in logged(tmp_path) if "loss" in row] == [1, STEPS]


def test_a_loss_that_is_not_finite_is_not_heard(built, tmp_path):
    data = Mixed(built.data, "train")
    job = mixed.run(built, tmp_path, data)

    def step(state, batch):
        state, values = job.program.step(state, batch)
        bad = int(state.step) == 3
        return state, values | ({"loss": values["loss"] * np.nan} if bad else {})

    with pytest.raises(loop.NotFiniteError, match="step 3"):
        loop.run(dataclasses.replace(job, program=dataclasses.replace(job.program, step=step)))
    assert [row for row, _, _ in data.log] == [ROWS, 2 * ROWS]


@pytest.mark.parametrize(
    ("periods", "words"),
    [
        (dict(eval_every=None), "train.eval_every is none; set it"),
        (dict(eval_every=2, eval_rows=2), "train.eval_rows=2 scores nothing of"),
    ],
)
def test_held_out_losses_must_be_there_to_be_heard(built, tmp_path, periods, words):
    with pytest.raises(ValueError, match=words) as caught:
        loop.run(mixed.run(built, tmp_path, Mixed(built.data, "validation"), **periods))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("limit", [2, None])
def test_a_domain_without_held_out_rows_is_named(built, tmp_path, limit):
    data = Mixed(built.data, "validation")
    data.evaluation = built.data.evaluation  # all of the first domain
    with pytest.raises(ValueError, match="nothing is held out of prose, tables; raise the holdout"):
        loop.run(mixed.run(built, tmp_path, data, eval_every=2, eval_rows=limit))


@pytest.mark.parametrize("hears", ["train", "validation"])
def test_one_domain_hears_nothing(built, hears):
    """A mixture of one has nothing to decide, and its program reports no domains."""
    hearing = Hearing(Mixed(built.data, hears, domains=("code",)))
    assert (hearing.metrics, hearing.scores) == ((), False)
