"""One compilation in a process of its own: what to compile is a JSON object on standard input.

The result is a JSON object on standard output: {"kernels": {name: facts}, "executions": {name:
runs of each heavy piece} or null, "seconds": of the compilation} or {"error": a sentence}.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from launch.files import ROOT
from launch.kernels import targets, tpu
from launch.kernels.program import Program
from launch.schema import UsageError

OWN = ("JAX_", "XLA_", "TPU_", "LIBTPU_", "MOSAIC_")  # variables that could change what is compiled


@dataclasses.dataclass(frozen=True)
class Job:
    """What to compile: an op on a spec by an implementation (or a peer) for a target.

    spec: fields of the op's Spec.  config: fields of the implementation's Config, or None.
    """

    op: str
    spec: Mapping[str, Any]
    target: str
    implementation: str
    config: Mapping[str, Any] | None = None
    dtype: str = "bfloat16"


def run(job: Job, timeout: float = 900.0) -> dict:
    """The result of `python -m launch.kernels.child` on this job; errors are its `error`."""
    target = targets.target(job.target)
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(OWN)}
        environ |= {"JAX_PLATFORMS": "cpu", "KERNELS_FOLDER": folder}
        if target.platform == "tpu":
            environ |= tpu.environment(target, folder)
        try:
            done = subprocess.run(
                [sys.executable, "-m", "launch.kernels.child"],
                cwd=ROOT,
                env=environ,
                input=json.dumps(dataclasses.asdict(job)),
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"compiling took more than {timeout:.0f} s"}
    with contextlib.suppress(ValueError, IndexError):
        return json.loads(done.stdout.splitlines()[-1])
    said = done.stderr.strip().splitlines() or ["nothing on stderr"]
    return {"error": f"the compiler's process ended with {done.returncode}: {said[-1][:400]}"}


def main() -> None:
    """Compiles the job on standard input."""
    job = Job(**json.load(sys.stdin))
    said = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        try:
            result = _compile(job, os.environ["KERNELS_FOLDER"])
        except (UsageError, tpu.llo.DumpError, NotImplementedError, ValueError, TypeError) as error:
            result = {"error": f"{error}"}
        except Exception as error:  # a compiler's refusal, which has many types
            result = {"error": f"{type(error).__name__}: {_sentence(str(error))}"}
    print(json.dumps(result), file=said)


def _sentence(text: str) -> str:
    """A compiler's message in one line, without the program that it is about."""
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line for line in lines if line)[:400]


def _compile(job: Job, folder: str) -> dict:
    target = targets.target(job.target)
    spec = importlib.import_module(f"pallas_kernels.{job.op}.specs").Spec(**job.spec)
    home = module(job)
    config = home.Config(**job.config) if job.config is not None else None
    where = importlib.import_module(f"launch.kernels.{target.platform}")
    with mesh(target):
        peer = home.__name__.startswith("launch.")  # and brings its own call
        call = home.call(spec, config) if peer else spec.call(job.implementation, config)
        both = differentiated(call, spec.abstract(job.dtype), spec.differentiable)
    start = time.monotonic()
    with choices() as chosen:
        found = where.compile(*both, target, folder)
    seconds = time.monotonic() - start
    with mesh(target):
        runs = executions(home, spec, config, found)
    return {"kernels": found, "seconds": seconds, "executions": runs, "choices": chosen}


def executions(home, spec, config, found: Mapping[str, dict]) -> dict | None:
    """The implementation's own account of its runs, or a peer's of these programs, or None."""
    if hasattr(home, "executions"):
        return home.executions(spec, config)
    if not hasattr(home, "runs"):
        return None
    programs = {name: Program.from_plain(facts["program"]) for name, facts in found.items()}
    return {n: home.runs(spec, config, n, p, found[n]["grid"]) for n, p in programs.items()}


@contextlib.contextmanager
def choices() -> Iterator[list[dict]]:
    """Collects what `tuning.choose` was asked and answered: implementation, key and config."""
    from pallas_kernels import tuning

    kept, heard = tuning.choose, []

    def choose(op, implementation, key, explicit, heuristic):
        config = kept(op, implementation, key, explicit, heuristic)
        fields = dataclasses.asdict(config)
        entry = {"implementation": implementation, "key": dict(key), "config": fields}
        heard.extend([] if entry in heard else [entry])
        return config

    tuning.choose = choose
    try:
        yield heard
    finally:
        tuning.choose = kept


def chosen(job: Job) -> Any:
    """The Config that the implementation would choose by itself, which takes a trace.

    Raises UsageError: it does not choose one, or declines the spec.
    """
    import jax

    target, home = targets.target(job.target), module(job)
    if home.__name__.startswith("launch."):
        with mesh(target):
            return home.best()
    spec = importlib.import_module(f"pallas_kernels.{job.op}.specs").Spec(**job.spec)
    arrays = {n: jax.ShapeDtypeStruct(*x) for n, x in spec.abstract(job.dtype).items()}
    call = spec.call(job.implementation)
    try:
        with mesh(target), choices() as heard:
            jax.eval_shape(lambda arrays: call(**arrays), arrays)
    except NotImplementedError as refusal:
        raise UsageError(str(refusal)) from None
    own = [entry["config"] for entry in heard if entry["implementation"] == job.implementation]
    if not own:
        raise UsageError(f"{job.implementation} of {job.op} takes no config")
    return home.Config(**own[0])


def module(job: Job):
    """The implementation's module in the op's folder, or the peer's. Raises UsageError."""
    ours = importlib.import_module(f"pallas_kernels.{job.op}").IMPLEMENTATIONS
    others = peers(job.op)
    if job.implementation not in (*ours, *others):
        raise UsageError(
            f"{job.op} has no implementation {job.implementation!r}; there are: "
            f"{', '.join([*ours, *others])}"
        )
    own = job.implementation in ours
    home = f"pallas_kernels.{job.op}" if own else f"launch.kernels.peers.{job.op}"
    return importlib.import_module(f"{home}.{job.implementation}")


def peers(op: str) -> dict[str, pathlib.Path]:
    """{name: file} of the kernels of others that an op has."""
    found = (ROOT / "launch/kernels/peers" / op).glob("[!_]*.py")
    return {path.stem: path for path in sorted(found)}


def fits(job: Job) -> None:
    """Raises UsageError: there is no such implementation, or it is for another platform."""
    home, platform = module(job), targets.target(job.target).platform
    own = importlib.import_module(f"pallas_kernels.{job.op}").IMPLEMENTATIONS
    on = own.get(job.implementation, getattr(home, "PLATFORM", None))  # peers have the latter
    if on not in (None, platform):
        raise UsageError(
            f"{job.implementation} is for a {on.upper()}, and {job.target} is a {platform.upper()}"
        )


def mesh(target: targets.Target):
    """A context in which what is traced is for one device of the target."""
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

    device = AbstractDevice(
        device_kind=target.device_kind, num_cores=target.cores, platform=target.platform
    )
    axes = (1,), ("device",), (AxisType.Auto,)
    return use_abstract_mesh(AbstractMesh(*axes, abstract_device=device))


def differentiated(call: Callable, abstract: Mapping, names: Sequence[str]) -> tuple:
    """(a function of arrays and cotangents that gives results and gradients, its arguments).

    Args:
      call: a function of arrays by name.  abstract: {name: (shape, dtype)} of the arrays.
      names: those to differentiate by.
    """
    import jax

    arrays = {name: jax.ShapeDtypeStruct(*array) for name, array in abstract.items()}

    def both(arrays, cotangents):
        rest = {name: x for name, x in arrays.items() if name not in names}
        own = {name: arrays[name] for name in names}
        out, pull = jax.vjp(lambda own: call(**own, **rest), own)
        return out, pull(cotangents)

    return both, (arrays, jax.eval_shape(lambda arrays: call(**arrays), arrays))


if __name__ == "__main__":
    main()
