"""What Meshwork costs over bare JAX: speed of the quickstart's step, host time, time to a step.

The peer is launch/bench/bare.py: the same mathematics, batch and parameters, in the same process
and in turns with Meshwork. That both compute the same losses is asserted first. Wanted: at least
0.97 of the peer's tokens a second. The mesh has one device and all axes.
"""

import contextlib
import copy
import dataclasses
import importlib
import io
import itertools
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

import data.pipeline
from launch.bench import bare, measure, standin
from launch.bench.measure import Report, Row
from launch.schema import UsageError
from models.lm import padded
from parallel import mesh as meshes
from training.feed import feed
from training.program import Program
from training.program import build as build_program

LEAST = 0.97
CHECKED = 4  # steps whose losses must agree
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}  # relative; the sums run in another order
CALLS = 3  # calls a sample of what takes microseconds beside a step
PAUSE = 0.01  # seconds in which the data's thread builds what was taken
LOOP = 200  # steps of the loop in a sample
# What of the quickstart another configuration may change; the peer has one spelling of the rest.
FREE = (
    *("seed", "steps", "data.", "mesh.", "train.", "model.d_model", "model.layers"),
    *("model.mixers.attention.heads", "model.mixers.attention.kv_heads", "model.dtype"),
    *("model.mixers.attention.head_dim", "model.mixers.attention.rope_base", "model.norm_eps"),
    *("model.ffns.swiglu.width", "optim.lr", "optim.weight_decay", "optim.warmup_fraction"),
    *("optim.methods.adamw.", "optim.schedules.wsd.decay_fraction"),
)


def bench(
    *,
    config: str = "quickstart",  # a configuration that differs from the quickstart in sizes
    seconds: float = 1.0,  # of steps in a sample
    repetitions: int = 15,  # samples of each quantity
    processes: int = 3,  # samples of the time to the first step, 0 for none
) -> Report:
    """Every row of the report. Raises UsageError; AssertionError where the losses differ."""
    resolved = resolve(config)
    progress = measure.Progress("spine")
    with contextlib.closing(progress):
        progress("building")
        spine = build(resolved)
        check(spine, progress.within("checking the losses"))
        rows = speed(spine, seconds, repetitions, progress)
        rows += dispatch(spine, repetitions, progress)
        more, notes = _needing_the_loop(spine, config, repetitions, processes, progress)
    device = jax.devices()[0]
    sizes = "{batch_size} x {length} tokens a step".format_map(resolved["data"])
    title = f"{pathlib.Path(config).stem}, {sizes}, 1 x {device.device_kind}, jax {jax.__version__}"
    return Report(title, rows + more, notes, resolved)


def resolve(config: str) -> dict:
    """The configuration, if the peer can do it; on a machine without ml_collections too."""
    standin.provide()
    from launch.config import resolve
    from launch.files import leaves

    found, known = resolve(config), dict(leaves(resolve("quickstart")))
    for name, value in leaves(found):
        if not name.startswith(FREE) and known.get(name, value) != value:
            raise UsageError(
                f"{config} sets {name} to {value!r}, and the peer in bare JAX has only the "
                f"quickstart's {known[name]!r}"
            )
        if name not in known and not name.startswith(FREE):
            raise UsageError(f"{config} has {name}, which the peer in bare JAX does not know")
    if found["data"]["micro_batches"] != 1:
        raise UsageError(f"{config} has micro-batches, which the peer in bare JAX does not know")
    return found | {"mesh": dict.fromkeys(found["mesh"], 1)}


class Way:
    """One way to take steps. It holds its state, which every step replaces."""

    def __init__(self, step: Callable, state, batches: list, mesh=None):
        self.step, self.state, self.batches, self._mesh = step, state, batches, mesh

    def take(self, batch: int = 0):
        """A step; (state, what it reports), perhaps not computed yet."""
        self.state, said = self.step(self.state, self.batches[batch])
        return self.state, said

    def take_many(self, count: int):
        for _ in range(count):
            last = self.take()
        return last

    def scope(self):
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


@dataclasses.dataclass(frozen=True)
class Spine:
    """ways: 'meshwork', 'bare', and where the vocabulary is padded, 'unpadded' without that."""

    config: Mapping
    mesh: jax.sharding.Mesh
    data: data.pipeline.Data
    program: Program
    ways: Mapping[str, Way]


def build(config: Mapping) -> Spine:
    """Data, program and peers, all with the program's initial parameters."""
    corpus = data.pipeline.build(seed=config["seed"], **config["data"])
    mesh = meshes.make(jax.devices()[:1], **config["mesh"])
    program = build_program(config, mesh, corpus.vocab_size)
    homes = jax.tree.map(lambda like: like.sharding, program.batch)
    host = [corpus.batch(i * corpus.batch_size) for i in range(CHECKED)]
    with jax.set_mesh(mesh):
        state, batches = program.init(), [jax.device_put(batch, homes) for batch in host]
    flat, device = jax.device_get(state.params), mesh.devices.flat[0]
    ways = {"meshwork": Way(program.step, state, batches, mesh)}
    vocab = config["model"]["vocab"] or corpus.vocab_size
    batches = [jax.device_put(bare.fields(batch), device) for batch in host]
    for name, rows in {"bare": padded(vocab), "unpadded": vocab}.items():
        if name == "bare" or rows != padded(vocab):
            ways[name] = Way(*_bare(config, flat, vocab, rows), batches)
    return Spine(config, mesh, corpus, program, ways)


def _bare(config, flat, vocab, rows):
    model, tx = bare.of_config(config, vocab, rows), bare.optimizer(config)
    params = bare.from_flat(flat, model)
    jitted = bare.make_step(model, tx)

    def step(state, batch):
        params, opt, loss, norm = jitted(*state, batch)
        return (params, opt), {"loss": loss, "gradient_norm": norm}

    return step, (params, tx.init(params))


def check(spine: Spine, progress: Callable[[str], None]) -> None:
    """Raises AssertionError unless all ways have the same losses over a few steps."""
    losses = {}
    for name, way in spine.ways.items():
        progress(name)
        with way.scope():
            said = [way.take(batch)[1] for batch in range(CHECKED)]
        losses[name] = np.array([[s["loss"], s["gradient_norm"]] for s in jax.device_get(said)])
    tolerance = TOLERANCE[spine.config["model"]["dtype"]]
    for name, found in losses.items():
        np.testing.assert_allclose(
            *(found, losses["meshwork"]),
            rtol=tolerance,
            err_msg=f"{name} and meshwork disagree on (loss, norm of the gradient) a step",
        )


def speed(spine: Spine, seconds: float, repetitions: int, progress) -> list[Row]:
    """Tokens a second of steps that follow each other, the state donated."""
    once = 0.0
    for way in spine.ways.values():
        with way.scope():
            once = max(once, measure.seconds(way.take))
    count = measure.count_for(seconds, once)
    tokens = count * spine.data.batch_size * spine.data.length

    def sample(way: Way) -> float:
        with way.scope():
            return tokens / measure.seconds(lambda: way.take_many(count))

    ways = {name: lambda way=way: sample(way) for name, way in spine.ways.items()}
    found = measure.interleaved(ways, repetitions, progress.within(f"{count} steps"))
    rows = [Row("step", "tokens/s", found["meshwork"], found["bare"], LEAST)]
    if "unpadded" in found:
        what = "    peer without padded vocabulary"
        rows.append(Row(what, "tokens/s", found["meshwork"], found["unpadded"]))
    return rows


def dispatch(spine: Spine, repetitions: int, progress) -> list[Row]:
    """Microseconds of the host a step: until the step's call returns, and for its batch."""

    def call(way: Way) -> float:
        with way.scope():
            return 1e6 * statistics.median(measure.until_return(way.take) for _ in range(CALLS))

    calls = {name: lambda w=spine.ways[name]: call(w) for name in ("meshwork", "bare")}
    found = measure.interleaved(calls, repetitions, progress.within("dispatch"))
    rows = [Row("call of the step, device idle", "us", *found.values())]
    with contextlib.ExitStack() as stack:
        fed = stack.enter_context(feed(spine.data, spine.program.batch, 0))
        plain = stack.enter_context(contextlib.closing(spine.data.iterate(0)))
        nexts = {
            "meshwork": lambda: next(fed),
            "bare": lambda: jax.device_put(bare.fields(next(plain))),
        }
        takes = {name: lambda take=take: _paused(take) for name, take in nexts.items()}
        found = measure.interleaved(takes, repetitions, progress.within("batches"))
    return [*rows, Row("batch onto the device", "us", *found.values())]


def _paused(take: Callable) -> float:
    """Microseconds of `take`, each after a pause as long as a short step."""

    def once() -> float:
        time.sleep(PAUSE)
        return measure.until_return(take)

    return 1e6 * statistics.median(once() for _ in range(10 * CALLS))


def _needing_the_loop(spine, config, repetitions, processes, progress):
    """Rows that need the packages that training needs, or a note which of them is missing."""
    try:
        if "ml_collections" in sys.modules and not hasattr(
            sys.modules["ml_collections"], "__file__"
        ):
            raise ModuleNotFoundError(name="ml_collections")
        importlib.import_module("training.loop")
    except ModuleNotFoundError as error:
        note = f"the loop and the start of train were not measured: {error.name} is not installed"
        return [], [note]
    rows = loop_time(spine, min(repetitions, 5), progress.within("loop"))
    if processes:
        from launch.bench import start

        progress = progress.within("starting processes")
        rows += start.rows(config, spine.config, processes, progress)
    return rows, []


def loop_time(spine: Spine, repetitions: int, progress) -> list[Row]:
    """Microseconds a step of all that surrounds it: the step does nothing and batches lie ready.

    In Meshwork the whole of training/loop.py: batches onto the device, the call, metrics, log,
    TensorBoard, progress bar. In the peer the same without the last three: it writes its loss.
    """
    ways = {"meshwork": lambda: _whole_loop(spine), "bare": lambda: _bare_loop(spine)}
    found = measure.interleaved(ways, repetitions, progress)
    return [Row("loop around the step", "us", *found.values())]


def _whole_loop(spine: Spine) -> float:
    from training import loop

    program, stamps = spine.program, []
    with jax.set_mesh(spine.mesh):
        like = jax.eval_shape(program.step, program.state, program.batch)[1]
    ones = lambda: jax.tree.map(lambda leaf: jax.numpy.ones(leaf.shape, leaf.dtype), like)
    idle = jax.jit(lambda s, batch: (s._replace(step=s.step + 1), ones()), donate_argnums=0)

    def step(state, batch):
        stamps.append(time.perf_counter())
        return idle(state, batch)

    score = lambda params, batch: {"nll": np.float32(1), "weight": np.float32(1)}
    never = dict.fromkeys(("eval_every", "sample_every", "save_every"))
    config = dict(spine.config) | {"steps": LOOP, "train": spine.config["train"] | never}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        job = loop.Run(
            config=config,
            program=dataclasses.replace(program, step=step, evaluate=score),
            data=_still(spine.data),
            mesh=spine.mesh,
            workdir=pathlib.Path(folder),
            header={"fingerprint": ""},
            flops=0.0,
        )
        with jax.set_mesh(spine.mesh):
            loop.run(job)
    return _a_step(stamps)


def _bare_loop(spine: Spine) -> float:
    state, stamps, every = spine.ways["bare"].state, [], spine.config["train"]["log_every"]
    idle = jax.jit(lambda params, opt, batch: (params, opt, 1.0))
    with (
        tempfile.TemporaryFile("w") as log,
        contextlib.closing(_still(spine.data).iterate(0)) as it,
    ):
        for step in range(LOOP):
            stamps.append(time.perf_counter())
            batch = jax.device_put(bare.fields(next(it)))
            *state, loss = idle(*state, batch)
            if step % every == 0:
                print(step, float(loss), file=log, flush=True)
    return _a_step(stamps)


def _a_step(stamps: list[float]) -> float:
    """Microseconds between the calls of two steps, without the first tenth of them."""
    first = len(stamps) // 10
    return 1e6 * (stamps[-1] - stamps[first]) / (len(stamps) - 1 - first)


def _still(corpus: data.pipeline.Data) -> data.pipeline.Data:
    """The data, of which every batch is the first and lies ready."""
    still = copy.copy(corpus)

    def iterate(position, indices=None):
        batch = corpus.batch(0)
        yield from itertools.repeat(batch if indices is None else [batch] * len(indices))

    still.iterate = iterate
    still.evaluation = lambda rows, limit=None: corpus.evaluation(rows, 1)
    return still
