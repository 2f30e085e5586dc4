"""The loop: it schedules work and reads metrics one step late. What a step does is elsewhere."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Mapping

import jax

from training.checkpoint import Checkpoints
from training.evaluate import Score, held_out
from training.feed import feed
from training.hearing import Hearing, check
from training.hosts import Alone, Hosts
from training.interrupt import Interrupt
from training.program import parameters
from training.resume import begin, lock
from training.run import Run
from training.state import TrainState, to_int
from training.watch import NotFiniteError, Watch

__all__ = ["FINAL", "NotFiniteError", "Outcome", "Run", "final", "run"]
FINAL = "final.json"
PERIODS = ("save_every", "eval_every", "sample_every")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: at which step, and the score of the whole held-out split if it is the last.

    stepped: whether this call took any step.  text: the model's at the end, where it can write.
    """

    state: TrainState
    step: int
    stepped: bool
    score: Score | None = None
    text: str | None = None


def run(job: Run) -> Outcome:
    """Trains from the latest checkpoint in workdir, or from the start, to config['steps'].

    SIGTERM or the first Ctrl-C ends it after the step under way, with a checkpoint; of several
    processes any may be told, and all end after the same step.

    Raises:
      NotFiniteError: a loss, gradient or update not finite; checkpoints made before it stay.
      CheckpointError: workdir holds a run of another configuration, corpus or shape, or another
        process is writing to it.
      ValueError: evaluation is asked for and nothing is held out, or the corpus ends too early.
    """
    config, program, every = job.config, job.program, job.config["train"]
    steps = config["steps"]
    with contextlib.ExitStack() as stack:
        # ------------------------------------------------------------ begin or go on
        # Entered first and so left last: a second signal must not end a save under way.
        interrupt = stack.enter_context(Interrupt())
        stack.enter_context(lock(job.workdir))
        keeping = dict(keep=every["keep"], keep_every=every["keep_every"], trust=job.trust)
        checkpoints = stack.enter_context(Checkpoints(job.workdir, **keeping))
        job.hosts.go_on_from(checkpoints.steps)
        if every["eval_every"] is not None and not job.data.holds_out():
            raise ValueError(
                "no document is held out to evaluate on; raise the holdout of the source, which of "
                "token shards is set when they are written, or set train.eval_every=none"
            )
        check(job)
        checkpoints.probe()  # before there is anything to lose
        state, first, header = begin(checkpoints, job)
        job = dataclasses.replace(job, header=header)
        if first >= steps and (score := final(job.workdir, first)) is not None:
            return Outcome(state, first, stepped=False, score=score)
        start, rows = to_int(state.position), config["data"]["batch_size"]
        batches = job.hosts.fed(stack.enter_context(feed(job.data, program.batch, start)))
        watch = stack.enter_context(Watch(job, state, checkpoints))
        profile = stack.enter_context(_Profile(job.workdir, every, job.hosts))
        # Left first: a process that fails waits for its save before it can say why.
        stack.callback(job.hosts.at, "saving")
        hearing = Hearing(job.data)
        after = lambda step: start + (step - first) * rows  # rows consumed by then

        def read(step: int, metrics: Mapping) -> None:
            hearing.step(after(step), watch.read(step, metrics, hearing.metrics))

        def evaluate() -> None:
            job.hosts.at("evaluating")
            score = _score(job, state, every["eval_rows"])
            if step < steps:
                watch.score(step, score)
            hearing.score(after(step), score)

        def save() -> None:
            job.hosts.at("saving")
            # What the data has heard decides rows to come, so it is kept with the state.
            heard = job.data.state(after(step))
            checkpoints.save(state, {"header": job.header} | ({"data": heard} if heard else {}))

        # ------------------------------------------------------------ steps
        step, pending = first, None
        for step in range(first + 1, steps + 1):
            profile.before(step, state)
            state, metrics = program.step(state, next(batches))
            if pending is not None:
                read(*pending)
            pending = step, metrics
            stop = job.hosts.stops(step, interrupt.requested)
            due = {key: every[key] is not None and step % every[key] == 0 for key in PERIODS}
            if not (stop or step == steps or any(due.values())):
                continue

            # -------------------------------------------------------- between two steps
            read(*pending)  # only a state known to be finite is saved
            pending, ends = None, stop or step == steps
            with watch.clock.paused():
                if due["eval_every"] or step == steps:
                    watch.pictures(step, metrics)  # before the save, or a resume might miss them
                if due["eval_every"] and hearing.scores:
                    evaluate()  # before the save, which keeps what was heard
                if ends:
                    save()
                if due["eval_every"] and step < steps and not hearing.scores:
                    evaluate()
                if due["sample_every"] and step < steps:
                    watch.text(step, state)
                if due["save_every"] and not ends:
                    save()
            if stop:
                break

        if steps == 0 and checkpoints.latest() is None:
            save()  # what it begins with, which others may read

        # ------------------------------------------------------------ end
        if step < steps:
            return Outcome(state, step, stepped=True)
        score, stepped = None, step > first
        if job.data.holds_out():
            job.hosts.at("evaluating")
            watch.bar.set_description("held-out")
            score = _score(job, state, None)
            watch.score(step, score)
            watch.log.hparams(dict(config), score.values())
        text = watch.text(step, state)
        job.hosts.at("saving")
        checkpoints.wait()
        if score is not None and job.hosts.leader:
            _write_final(job.workdir, step, score)
        return Outcome(state, step, stepped, score, text)


def _write_final(workdir: pathlib.Path, step: int, score: Score) -> None:
    half = workdir / f"{FINAL}.tmp"
    half.write_text(json.dumps({"step": step} | dataclasses.asdict(score)))
    half.replace(workdir / FINAL)


def final(workdir: pathlib.Path, step: int) -> Score | None:
    """The final score of a run that ended at this step; None where it has none."""
    path = workdir / FINAL
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        return Score(**found) if found.pop("step") == step else None
    except (ValueError, TypeError, AttributeError, KeyError):
        return None  # It is damaged; the run scores its last step again.


def _score(job: Run, state: TrainState, limit: int | None) -> Score:
    rows = job.program.batch.inputs.shape[1]
    params = parameters(state)
    return held_out(job.program, params, job.data, job.mesh, rows=rows, limit=limit)


class _Profile:
    """A profiler trace of the steps asked for, in <workdir>/profile (TensorBoard reads it)."""

    def __init__(self, workdir: pathlib.Path, options: Mapping, hosts: Alone | Hosts):
        self._hosts = hosts
        start, count = options["profile_start"], options["profile_steps"]
        self._folder = workdir / "profile"
        self._start, self._stop = (None, None) if start is None else (start, start + count)
        self._running = False

    def __enter__(self) -> "_Profile":
        return self

    def __exit__(self, *exc) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def before(self, step: int, state: TrainState) -> None:
        if step == self._start:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step == self._stop and self._running:
            jax.block_until_ready(state.step)
            self._hosts.at("profiling")
            jax.profiler.stop_trace()
            self._running = False
