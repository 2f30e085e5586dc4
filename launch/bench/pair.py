"""The two that `spine` compares, with the same data and parameters: Meshwork and bare JAX."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np

import data.pipeline
from launch.bench import bare, standin
from launch.schema import UsageError
from models.lm import padded
from parallel import mesh as meshes
from training.program import Program
from training.program import build as build_program

CHECKED = 4  # steps whose losses must agree
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}  # relative; the sums run in another order
# What of the quickstart another configuration may change; the peer has one spelling of the rest.
FREE = (
    *("seed", "steps", "data.", "mesh.", "train.", "model.d_model", "model.layers"),
    "model.vocab",
    *("model.mixers.attention.heads", "model.mixers.attention.kv_heads", "model.dtype"),
    *("model.mixers.attention.head_dim", "model.mixers.attention.rope_base", "model.norm_eps"),
    *("model.ffns.swiglu.width", "optim.lr", "optim.weight_decay", "optim.warmup_fraction"),
    *("optim.methods.adamw.", "optim.schedules.wsd.decay_fraction"),
)


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
class Pair:
    """ways: 'meshwork', 'bare', and where the vocabulary is padded, 'unpadded' without that."""

    config: Mapping
    mesh: jax.sharding.Mesh
    data: data.pipeline.Data
    program: Program
    ways: Mapping[str, Way]


def build(config: Mapping) -> Pair:
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
    return Pair(config, mesh, corpus, program, ways)


def _bare(config, flat, vocab, rows):
    model, tx = bare.of_config(config, vocab, rows), bare.optimizer(config)
    params = bare.from_flat(flat, model)
    jitted = bare.make_step(model, tx)

    def step(state, batch):
        params, opt, loss, norm = jitted(*state, batch)
        return (params, opt), {"loss": loss, "gradient_norm": norm}

    return step, (params, tx.init(params))


def check(pair: Pair, progress: Callable[[str], None]) -> None:
    """Raises AssertionError unless all ways have the same losses over a few steps."""
    losses = {}
    for name, way in pair.ways.items():
        progress(name)
        with way.scope():
            said = [way.take(batch)[1] for batch in range(CHECKED)]
        losses[name] = np.array([[s["loss"], s["gradient_norm"]] for s in jax.device_get(said)])
    tolerance = TOLERANCE[pair.config["model"]["dtype"]]
    for name, found in losses.items():
        np.testing.assert_allclose(
            *(found, losses["meshwork"]),
            rtol=tolerance,
            err_msg=f"{name} and meshwork disagree on (loss, norm of the gradient) a step",
        )
