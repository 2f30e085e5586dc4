"""The loop: it schedules work and reads metrics one step late. What a step does is elsewhere."""

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from training.checkpoint import CheckpointError, Checkpoints
from training.evaluate import Score, held_out
from training.feed import feed
from training.flops import mfu
from training.interrupt import Interrupt
from training.metrics import Clock, Log
from training.program import Program, parameters
from training.progress import bar
from training.state import TrainState, to_int

FINAL = "final.json"
PERIODS = ("save_every", "eval_every", "sample_every")
# Metrics that must be finite; the last one is of the parameters that the step leaves behind.
FINITE = ("loss", "gradient_norm", "parameter_norm")


class NotFiniteError(ValueError):
    """Loss, gradient or parameters of a step are not finite; one sentence with what is known."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a run is made of.

    header: first line of metrics.jsonl, kept in checkpoints too; its `fingerprint` is the corpus's.
    flops: floating-point operations of matrix products a token, forward and backward.
    sample(params) -> text of the model, or None.
    """

    config: Mapping
    program: Program
    data: Any
    mesh: jax.sharding.Mesh
    workdir: pathlib.Path
    header: Mapping
    flops: float
    sample: Callable[[dict], str] | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: at which step, and the score of the whole held-out split if it is the last.

    stepped: whether this call took any step.
    """

    state: TrainState
    step: int
    stepped: bool
    score: Score | None = None


def run(job: Run) -> Outcome:
    """Trains from the latest checkpoint in workdir, or from the start, to config['steps'].

    SIGTERM or the first Ctrl-C ends it after the step under way, with a checkpoint.

    Raises:
      NotFiniteError: a loss, gradient or update not finite; checkpoints made before it stay.
      CheckpointError: a checkpoint of another corpus or of other shapes.
    """
    config, program, every = job.config, job.program, job.config["train"]
    steps = config["steps"]
    with contextlib.ExitStack() as stack:
        # ------------------------------------------------------------ begin or go on
        keeping = dict(keep=every["keep"], keep_every=every["keep_every"])
        checkpoints = stack.enter_context(Checkpoints(job.workdir, **keeping))
        state, first = _begin(checkpoints, job)
        if first >= steps and (score := final(job.workdir, first)) is not None:
            return Outcome(state, first, stepped=False, score=score)
        interrupt = stack.enter_context(Interrupt())
        batches = stack.enter_context(feed(job.data, program.batch, to_int(state.position)))
        watch = stack.enter_context(_Watch(job, first, checkpoints))
        profile = stack.enter_context(_Profile(job.workdir, every))
        save = lambda: checkpoints.save(state, {"header": dict(job.header)})

        # ------------------------------------------------------------ steps
        step, pending = first, None
        for step in range(first + 1, steps + 1):
            profile.before(step, state)
            state, metrics = program.step(state, next(batches))
            if pending is not None:
                watch.read(*pending)
            pending = step, metrics
            stop = interrupt.requested
            due = {key: every[key] is not None and step % every[key] == 0 for key in PERIODS}
            if not (stop or step == steps or any(due.values())):
                continue

            # -------------------------------------------------------- between two steps
            watch.read(*pending)  # only a state known to be finite is saved
            pending = None
            with watch.clock.paused():
                if stop or step == steps:
                    save()
                if due["eval_every"] and step < steps:
                    watch.score(step, _score(job, state, every["eval_rows"]))
                if due["sample_every"] and step < steps:
                    watch.text(step, state)
                if due["save_every"] and not (stop or step == steps):
                    save()
            if stop:
                break

        # ------------------------------------------------------------ end
        if step < steps:
            return Outcome(state, step, stepped=True)
        watch.bar.set_description("held-out")
        score = _score(job, state, None)
        watch.score(step, score)
        watch.text(step, state)
        watch.log.hparams(dict(config), score.values())
        checkpoints.wait()
        (job.workdir / FINAL).write_text(json.dumps({"step": step} | dataclasses.asdict(score)))
        return Outcome(state, step, stepped=step > first, score=score)


def final(workdir: pathlib.Path, step: int) -> Score | None:
    """The final score of a run that ended at this step; None where it has none."""
    path = workdir / FINAL
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    return Score(**found) if found.pop("step") == step else None


def _begin(checkpoints: Checkpoints, job: Run) -> tuple[TrainState, int]:
    if checkpoints.latest() is None:
        return job.program.init(), 0
    header = checkpoints.meta()["header"]
    old, new = header["fingerprint"], job.header["fingerprint"]
    if old != new:
        raise CheckpointError(
            f"the corpus is not the one {job.workdir} was trained on: its fingerprint is {new} and "
            f"was {old}; restore the corpus or choose another --workdir"
        )
    state, _ = checkpoints.restore(None, job.program.state)
    return state, int(state.step)


def _score(job: Run, state: TrainState, limit: int | None) -> Score:
    rows = job.program.batch.inputs.shape[1]
    params = parameters(state)
    return held_out(job.program, params, job.data, job.mesh, rows=rows, limit=limit)


class _Watch:
    """What a person sees of the run: progress bar, metrics.jsonl, TensorBoard."""

    def __init__(self, job: Run, first: int, checkpoints: Checkpoints):
        self._job, self._first, self._checkpoints = job, first, checkpoints
        self._started = time.perf_counter()
        leader = jax.process_index() == 0
        self.log = Log(job.workdir, dict(job.header), first or None, enabled=leader)
        self.clock = Clock()
        self.bar = bar(total=job.config["steps"], initial=first, unit="step", disable=not leader)

    def __enter__(self) -> "_Watch":
        return self

    def __exit__(self, *exc) -> None:
        self.bar.close()
        self.log.close()

    def read(self, step: int, metrics: Mapping) -> None:
        """Fetches the metrics of a step, checks that they are finite, shows and logs them."""
        wanted = step % self._job.config["train"]["log_every"] == 0
        wanted = wanted or step == self._job.config["steps"] or step == self._first + 1
        keys = metrics if wanted else FINITE
        values = _scalars(jax.device_get({key: metrics[key] for key in keys}))
        finite = all(math.isfinite(values[key]) for key in FINITE)
        self.clock.tick(self._step_tokens)
        if wanted or not finite:
            self.log.write(step, step * self._step_tokens, values | self._speed(step))
        if not finite:
            raise NotFiniteError(self._diagnosis(step, values))
        rate = self.clock.tokens_per_second()
        shown = {"loss": f"{values['loss']:.4f}"} | ({"tokens/s": f"{rate:,.0f}"} if rate else {})
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def score(self, step: int, score: Score) -> None:
        values = score.values()
        logged = {f"validation/{name}": value for name, value in values.items()}
        self.log.write(step, step * self._step_tokens, logged)
        words = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
        self.bar.write(f"step {step:>6}  held-out {words}", file=sys.stderr)

    def text(self, step: int, state: TrainState) -> None:
        if self._job.sample is not None:
            text = self._job.sample(parameters(state))
            self.log.text(step, "sample", f"```\n{text}\n```")

    @property
    def _step_tokens(self) -> int:
        return self._job.config["data"]["batch_size"] * self._job.config["data"]["length"]

    def _speed(self, step: int) -> dict[str, float]:
        if step == self._first + 1:
            return {"seconds_to_first_step": time.perf_counter() - self._started}
        rate = self.clock.tokens_per_second()
        if rate is None:
            return {}
        devices = self._job.mesh.devices
        used = mfu(self._job.flops, rate, devices.flat[0].device_kind, devices.size)
        return {"tokens_per_second": rate} | ({} if used is None else {"mfu": used})

    def _diagnosis(self, step: int, values: Mapping) -> str:
        self._checkpoints.wait()
        kept = self._checkpoints.latest()
        size = self._job.config["data"]["batch_size"]
        names = self._job.data.names((step - 1) * size, step * size)
        some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        last = "no checkpoint was saved before it"
        last = last if kept is None else f"the last finite checkpoint is of step {kept}"
        return (
            f"step {step} has loss {values['loss']}, gradient norm {values['gradient_norm']} and "
            f"parameter norm {values['parameter_norm']}; {last}; its batch held {some}"
        )


class _Profile:
    """A profiler trace of the steps asked for, in <workdir>/profile (TensorBoard reads it)."""

    def __init__(self, workdir: pathlib.Path, options: Mapping):
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
            jax.profiler.stop_trace()
            self._running = False


def _scalars(metrics: Mapping) -> dict[str, float]:
    """Metrics as floats; a vector over layers becomes one value a layer."""

    def named() -> Iterator[tuple[str, float]]:
        for name, value in metrics.items():
            flat = np.asarray(value).reshape(-1)
            if np.ndim(value) == 0:
                yield name, float(flat[0])
            else:
                yield from ((f"{name}/{i}", float(v)) for i, v in enumerate(flat))

    return dict(named())
