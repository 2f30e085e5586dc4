"""What a person sees of a run while it goes on."""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np

from training.checkpoint import CheckpointError, Checkpoints
from training.evaluate import Score
from training.flops import mfu
from training.metrics import PICTURE, Clock, Log
from training.program import parameters
from training.progress import bar
from training.run import Run
from training.state import TrainState, to_int

# Metrics that must be finite; the last one is of the parameters that the step leaves behind.
FINITE = ("loss", "gradient_norm", "parameter_norm")


class NotFiniteError(ValueError):
    """Loss, gradient or parameters of a step are not finite; one sentence with what is known."""


class Watch:
    """What a person sees of the run: progress bar, metrics.jsonl, TensorBoard."""

    def __init__(self, job: Run, state: TrainState, checkpoints: Checkpoints):
        self._job, self._checkpoints = job, checkpoints
        self._first = first = int(state.step)
        # Earlier steps may have had batches of another size.
        self._tokens, self._position = to_int(state.tokens), to_int(state.position)
        self._started = time.perf_counter()
        leader = job.hosts.leader
        ended = first >= job.config["steps"]
        own = dict(scored_again=ended, enabled=leader)
        self.log = Log(job.workdir, dict(job.header), first or None, **own)
        self.clock = Clock()
        self.bar = bar(total=job.config["steps"], initial=first, unit="step", disable=not leader)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *exc) -> None:
        self.bar.close()
        self.log.close()

    def read(self, step: int, metrics: Mapping, also: Iterable[str] = ()) -> dict:
        """Fetches the metrics of a step, checks that they are finite, shows and logs them.

        also: names of metrics that are fetched of every step.  Returns what was fetched, which
        holds no pictures.
        """
        wanted = step % self._job.config["train"]["log_every"] == 0
        wanted = wanted or step == self._job.config["steps"] or step == self._first + 1
        keys = _numbers(metrics) if wanted else (*FINITE, *also)
        fetched = jax.device_get({key: metrics[key] for key in keys})
        values = _scalars(fetched, self._job.data.domains)
        finite = all(math.isfinite(values[key]) for key in FINITE)
        self.clock.tick(self._step_tokens)
        if wanted or not finite:
            logged = values | self._weights(step) | self._speed(step) | self._job.hosts.times()
            self.log.write(step, self._seen(step), logged)
        if not finite:
            raise NotFiniteError(self._diagnosis(step, values))
        rate = self.clock.tokens_per_second()
        shown = {"loss": f"{values['loss']:.4f}"} | ({"tokens/s": f"{rate:,.0f}"} if rate else {})
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        return fetched

    def score(self, step: int, score: Score) -> None:
        logged = {f"validation/{name}": value for name, value in score.values().items()}
        self.log.write(step, self._seen(step), logged)
        if not self._job.hosts.leader:
            return
        shown = score.summary().items()
        words = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in shown)
        self.bar.write(f"step {step:>6}  held-out {words}", file=sys.stderr)

    def text(self, step: int, state: TrainState) -> str | None:
        if self._job.sample is None:
            return None
        self._job.hosts.at("sampling")
        text = self._job.sample(parameters(state))
        self.log.text(step, "sample", f"```\n{text}\n```")
        return text

    def pictures(self, step: int, metrics: Mapping) -> None:
        """Draws those metrics of a step that are pictures; the leader alone fetches them."""
        names = metrics.keys() - _numbers(metrics)
        if self._job.draw is None or not names:
            return
        self._job.hosts.at("drawing")
        if not self._job.hosts.leader:
            return
        for name, values in jax.device_get({name: metrics[name] for name in sorted(names)}).items():
            png = self._job.draw(name, values)
            if png is not None:
                self.log.image(step, name, png)

    @property
    def _step_tokens(self) -> int:
        return self._job.config["data"]["batch_size"] * self._job.config["data"]["length"]

    def _seen(self, step: int) -> int:
        """Tokens of the run up to and with this step."""
        return self._tokens + (step - self._first) * self._step_tokens

    def _row(self, step: int) -> int:
        """Where the batch of this step begins."""
        return self._position + (step - 1 - self._first) * self._job.config["data"]["batch_size"]

    def _weights(self, step: int) -> dict[str, float]:
        """With which the mixture drew the first row of this step."""
        if len(self._job.data.domains) == 1:
            return {}
        weights = self._job.data.weights(self._row(step))
        return {f"domain_weight/{name}": weight for name, weight in weights.items()}

    def _speed(self, step: int) -> dict[str, float]:
        if step == self._first + 1:
            return {"seconds_to_first_step": time.perf_counter() - self._started}
        rate = self.clock.tokens_per_second()
        if rate is None:
            return {}
        work, devices = self._job.flops, self._job.mesh.devices
        used = work and mfu(work, rate, devices.flat[0].device_kind, devices.size)
        return {"tokens_per_second": rate} | ({} if used is None else {"mfu": used})

    def _diagnosis(self, step: int, values: Mapping) -> str:
        try:
            self._checkpoints.wait()
            kept = self._checkpoints.latest()
            last = f"the last finite checkpoint is of step {kept}"
            last = "no checkpoint was saved before it" if kept is None else last
        except CheckpointError as error:
            last = str(error)
        names = self._job.data.names(self._row(step), self._row(step + 1))
        some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return (
            f"step {step} has loss {values['loss']}, gradient norm {values['gradient_norm']} and "
            f"parameter norm {values['parameter_norm']}; {last}; its batch held {some}"
        )


def _numbers(metrics: Mapping) -> list[str]:
    """Names of the metrics that are no pictures."""
    return [name for name in metrics if not name.startswith(PICTURE)]


def _scalars(metrics: Mapping, domains: Sequence[str]) -> dict[str, float]:
    """Metrics as floats; a vector over layers becomes one value a layer.

    A vector over domains has their names, and no loss of a domain that the batch did not hold.
    """

    def named() -> Iterator[tuple[str, float]]:
        for name, value in metrics.items():
            flat = np.asarray(value).reshape(-1).tolist()
            if np.ndim(value) == 0:
                yield name, flat[0]
            elif name == "domain_loss":
                seen = np.asarray(metrics["domain_share"]) > 0
                yield from ((f"{name}/{domains[k]}", flat[k]) for k in np.flatnonzero(seen))
            else:
                parts = domains if name == "domain_share" else range(len(flat))
                yield from ((f"{name}/{part}", v) for part, v in zip(parts, flat, strict=True))

    return dict(named())
