"""Pictures among a step's metrics: when they are fetched, who draws them and where they go."""

import dataclasses
import struct
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import tiny
from training import loop, metrics
from training.checkpoint import Checkpoints
from training.hosts import Alone
from training.watch import Watch

STEPS = 6
NAMES = ("picture/blocks/0/ffn/co_activation", "picture/blocks/0/ffn/experts_by_domain")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    built = tiny.setup(tiny.corpus(tmp_path_factory.mktemp("corpus")))
    with jax.set_mesh(built.mesh):
        yield built


class Pictured:
    """A run's steps with two pictures each, and a `draw` that keeps what it was asked for.

    A step's values are its number times the same array.  fails: {step: how often it has yet to
    fail}.
    """

    def __init__(self, job, fails=()):
        self._step, self.fails, self.drawn = job.program.step, Counter(fails), []
        program = dataclasses.replace(job.program, step=self.step)
        self.job = dataclasses.replace(job, program=program, draw=self.draw)

    def step(self, state, batch):
        state, values = self._step(state, batch)
        number = int(state.step)
        if self.fails[number]:
            self.fails[number] -= 1
            raise RuntimeError("the machine is gone")
        return state, values | {name: jnp.float32(pattern(name) * number) for name in NAMES}

    def draw(self, name, values):
        step = int(values.flat[-1] / pattern(name).flat[-1])
        np.testing.assert_array_equal(values, np.float32(pattern(name) * step))
        self.drawn.append((step, name))
        return png(len(self.drawn))


def pattern(name):
    shape = (2, 4, 4) if name.endswith("co_activation") else (3, 4)
    return np.arange(1.0, 1 + np.prod(shape)).reshape(shape)


def png(number):
    """As much of a file as TensorBoard's events read of it."""
    return b"\x89PNG\r\n\x1a\n" + bytes(8) + struct.pack(">II", 30, 20) + bytes([number])


def images(workdir, name):
    """[(step, which drawing)] as TensorBoard shows them."""
    board = EventAccumulator(str(workdir / "tb")).Reload()
    assert name not in board.Tags()["scalars"]
    found = board.Images(name)
    assert all((image.width, image.height) == (30, 20) for image in found)
    return [(image.step, image.encoded_image_string[-1]) for image in found]


@pytest.mark.parametrize(("every", "steps"), [(4, [4, 6]), (2, [2, 4, 6]), (None, [6])])
def test_they_are_drawn_where_an_evaluation_is_and_at_the_end(built, tmp_path, every, steps):
    run = Pictured(tiny.run(built, tmp_path, eval_every=every, eval_rows=5))
    loop.run(run.job)
    assert run.drawn == [(step, name) for step in steps for name in NAMES]
    for place, name in enumerate(NAMES, 1):
        assert images(tmp_path, name) == [(step, place + 2 * i) for i, step in enumerate(steps)]
    rows = metrics.read(tmp_path / "metrics.jsonl")[1]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert not any("picture" in name for row in rows for name in row)


def test_a_run_that_takes_no_step_draws_nothing(built, tmp_path):
    run = Pictured(tiny.run(built, tmp_path, steps=2))
    loop.run(run.job)
    (tmp_path / loop.FINAL).unlink()  # so that it is scored again
    loop.run(run.job)
    assert run.drawn == [(2, name) for name in NAMES]
    assert images(tmp_path, NAMES[0]) == [(2, 1)]


@pytest.mark.parametrize(
    ("fails", "drawings"),
    [
        # Saved at 3; the picture of step 4 is cut away, and drawn anew as the third.
        ({5: 1}, {2: 1, 4: 5, 6: 7}),
        # Twice over.
        ({6: 2}, {2: 1, 4: 7, 6: 9}),
    ],
)
def test_a_resume_cuts_them_back(built, tmp_path, fails, drawings):
    run = Pictured(tiny.run(built, tmp_path, save_every=3, eval_every=2, eval_rows=5), fails)
    for _ in range(sum(fails.values())):
        with pytest.raises(RuntimeError, match="gone"):
            loop.run(run.job)
    loop.run(run.job)
    assert images(tmp_path, NAMES[0]) == list(drawings.items())


class Unseen:
    """Fails where it is fetched."""

    def __array__(self, *_, **__):
        raise AssertionError("it was fetched")


def test_they_are_fetched_only_where_they_are_drawn(built, tmp_path):
    """With a period of 3, not at the other steps; without `draw`, never."""
    run = Pictured(tiny.run(built, tmp_path / "some", eval_every=3, eval_rows=5))

    def step(state, batch):
        state, values = run.step(state, batch)
        due = int(state.step) % 3 == 0 and drawing
        return state, values if due else values | dict.fromkeys(NAMES, Unseen())

    drawing = True
    job = dataclasses.replace(run.job, program=dataclasses.replace(run.job.program, step=step))
    loop.run(job)
    assert [step for step, _ in run.drawn] == [3, 3, 6, 6]
    drawing = False
    loop.run(dataclasses.replace(job, draw=None, workdir=tmp_path / "none"))
    assert EventAccumulator(str(tmp_path / "none" / "tb")).Reload().Tags()["images"] == []


def test_what_nothing_can_draw_is_left_out(built, tmp_path):
    run = Pictured(tiny.run(built, tmp_path, steps=1))
    loop.run(dataclasses.replace(run.job, draw=lambda name, values: None))
    assert EventAccumulator(str(tmp_path / "tb")).Reload().Tags()["images"] == []


class Phases(Alone):
    """A process that keeps what it passes; one of several, unless it leads."""

    def __init__(self, leader):
        self.leader, self.passed = leader, []

    def at(self, phase):
        self.passed.append(phase)


def test_they_are_drawn_before_the_save_that_a_resume_goes_on_from(built, tmp_path):
    run, hosts = Pictured(tiny.run(built, tmp_path, steps=2, eval_every=1)), Phases(leader=True)
    loop.run(dataclasses.replace(run.job, hosts=hosts))
    ends = ["drawing", "saving", "evaluating", "saving", "saving"]
    assert hosts.passed == ["drawing", "evaluating", *ends]


def test_only_the_leader_fetches_and_draws(built, tmp_path):
    """The others pass the same points, by which the leader's watchdog knows that none hangs."""
    refuse, hosts = lambda name, values: pytest.fail("it was drawn"), Phases(leader=False)
    job = dataclasses.replace(tiny.run(built, tmp_path), hosts=hosts, draw=refuse)
    with Checkpoints(tmp_path) as checkpoints, Watch(job, built.program.init(), checkpoints) as it:
        it.pictures(2, {"loss": Unseen(), NAMES[0]: Unseen()})
        assert hosts.passed == ["drawing"]
        it.pictures(3, {"loss": Unseen()})
    assert hosts.passed == ["drawing"]
    assert not (tmp_path / "tb").exists()
