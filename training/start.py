"""A run that begins with another run's parameters (config.start), whatever stood around them.

A parameter goes to its own path; one of a layer goes to the layer of the same number, so that a
layer may have moved between prefix, pattern and suffix, or into a stack of another period.

Where a layer's feed-forward network has weights of other shapes than that run's, its class here may
say how they are made of those:

    adopt(ffn: str, given: Shapes, own: Shapes) -> (make, what is made, in words)

ffn: the file of that run's network.  given, own: shapes of its weights and of the class's own, by
their names inside the network.  make(given, drawn) -> own weights, of which drawn are those that
begin as usual; what it leaves out begins so too. ValueError, one sentence, if it cannot.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from models import block
from models.layering import Layering
from parallel.rules import partition, ways
from parallel.weight import Entry, Table
from training.adapter import Adapter
from training.carry import NAMED, Adopt, Plan, Shapes, match, some
from training.checkpoint import READING, Checkpoints
from training.leaves import aux_keys
from training.program import described, parameters
from training.run import Run
from training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint of a run.  table: of the model's own parameters."""

    checkpoints: Checkpoints
    step: int
    config: Mapping
    table: Table
    adapter: Adapter

    @property
    def shapes(self) -> Shapes:
        return {path: entry.shape for path, entry in self.table.items()}

    def read(self, mesh: jax.sharding.Mesh) -> dict:
        """All parameters, those of the adapter too, laid out on this mesh; averages if there are.

        The model's own ones follow by `adapter.merged`.
        """
        table, saved = self.table | self.adapter.table, self.checkpoints.meta(self.step)["shapes"]
        like = {path: _laid_out(entry, mesh) for path, entry in table.items()}
        parts = {name: aux_keys(saved["rest"], name) for name in ("frozen", "ema")}
        parts = parts if parts["ema"] else parts | {None: saved["params"]}
        source = {}
        for aux, paths in parts.items():
            if paths:
                here = {path: like[path] for path in paths if path in like}
                source |= self.checkpoints.restore_params(self.step, here, aux=aux)[0]
        return source


def first(job: Run, *, quiet: bool = False) -> tuple[TrainState, dict]:
    """The state before the first step, and what the header is to say of a run that it begins from.

    Its parameters are the effective ones: averaged where it averages, adapters worked in.
    quiet: say nothing of it on stderr.

    Raises ValueError, one sentence naming the run: it has no sound checkpoint, another tokenizer,
    a parameter of another shape, or none that has a place here.
    """
    folder = job.config.get("start")
    if folder is None:
        return job.program.init(), {}
    begin = lambda source: _begin(job, folder, source, quiet or jax.process_index() != 0)
    return opened(folder, job.data.tokenizer, begin, trust=job.trust)


def _begin(job: Run, folder: str, source: Source, quiet: bool) -> tuple[TrainState, dict]:
    here = {path: entry.shape for path, entry in job.program.table.items()}
    _same_base(source.config["model"], job.config["model"])
    layers = [Layering.of(config["model"]) for config in (source.config, job.config)]
    plan = match(source.shapes, layers[0], here, layers[1], _adopting(job, source))
    merge = lambda read, drawn: plan.take(source.adapter.merged(read), drawn)
    state = job.program.init(source.read(job.mesh), merge)
    if not quiet:
        print("\n".join(_told(plan, folder, source.step)), file=sys.stderr)
    part = lambda names: {"count": len(names), "some": names[:NAMED]}
    told = {"missing": part(plan.missing), "unused": part(plan.unused)}
    if plan.made:
        notes = dict.fromkeys(network.note for network in plan.made.values())
        told["made"] = {"count": len(plan.made), "some": list(notes)[:NAMED]}
    return state, {"start": {"folder": folder, "step": source.step} | told}


def _same_base(there: Mapping, here: Mapping) -> None:
    """The same parameters give other logits and scores under another base width."""
    both = [m["d_model"] / (m.get("base_d_model") or m["d_model"]) for m in (there, here)]
    if both[0] != both[1]:
        base = there.get("base_d_model")
        raise ValueError(
            f"it has model.base_d_model={base or 'none'} and this run "
            f"{here.get('base_d_model') or 'none'}, with which its parameters mean another model; "
            f"set model.base_d_model={base or 'none'}"
        )


def _adopting(job: Run, source: Source) -> Callable[[int, str], Adopt | None]:
    """How the network of a layer, at a path here, takes the weights of that layer's there."""
    model = job.program.model(parameters(job.program.state, averaged=False))
    kinds = _kinds(source.config["model"])
    inside = lambda at, part: at[int(part)] if part.isdigit() else getattr(at, part)

    def adopting(layer: int, path: str) -> Adopt | None:
        network = functools.reduce(inside, path.split("/"), model)
        if not hasattr(network, "adopt"):
            return None

        def adopt(given: Shapes, own: Shapes):
            try:
                make, note = network.adopt(kinds[layer], given, own)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            return make, f"{kinds[layer]} became {note}"

        return adopt

    return adopting


def _kinds(model: Mapping) -> list[str]:
    """The file of each layer's feed-forward network."""
    layering, names = Layering.of(model), ("blocks", "mixers", "ffns", "ffn")
    entries = (*model["prefix"], *model["pattern"] * layering.periods, *model["suffix"])
    return [block.layer(entry, **{n: model[n] for n in names}).ffn for entry in entries]


def opened(folder: str, tokenizer, use: Callable[[Source], Any], *, trust: bool = False) -> Any:
    """use(source) of the newest sound checkpoint in a run's folder, whose corpus is not needed.

    tokenizer: here, which must be that run's.  trust: without verifying it.
    Raises ValueError, one sentence naming the run.
    """

    def read(step: int) -> Any:
        header = checkpoints.meta(step)["header"]
        _refuse_tokenizer(header, tokenizer.fingerprint())
        config = tuples(header["config"])
        own, adapter = described(config, tokenizer.vocab_size)
        return use(Source(checkpoints, step, config, own, adapter))

    try:
        with Checkpoints(folder, trust=trust) as checkpoints:
            return checkpoints.newest(read, READING)
    except ValueError as error:
        raise ValueError(f"start={folder}: {error}") from None


def _refuse_tokenizer(header: Mapping, now: str) -> None:
    was = header.get("tokenizer")
    if was is not None and was != now:
        raise ValueError(
            f"that run has another tokenizer, so its parameters know other ids (its fingerprint "
            f"is {was}, and {now} here); give the same data.tokenizer"
        )


def _laid_out(entry: Entry, mesh) -> jax.ShapeDtypeStruct:
    """As the rules say, but for dimensions that do not divide, which stay whole."""
    sized = zip(entry.shape, entry.axes, strict=True)
    axes = [None if size % ways(mesh, name) else name for size, name in sized]
    sharding = NamedSharding(mesh, partition(*axes))
    return jax.ShapeDtypeStruct(entry.shape, jnp.float32, sharding=sharding)


def _told(plan: Plan, folder: str, step: int) -> Iterator[str]:
    count = lambda names: f"{len(names)} parameter{'s' if len(names) > 1 else ''}"
    yield f"note: beginning with the parameters of {folder}, step {step}"
    for note in dict.fromkeys(network.note for network in plan.made.values()):
        layers = [str(layer) for layer, network in plan.made.items() if network.note == note]
        yield f"note: in layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}, {note}"
    if plan.missing:
        begin = "begins" if len(plan.missing) == 1 else "begin"
        lacking = f"{count(plan.missing)} {begin} as usual, which it does not have"
        yield f"note: {lacking} ({some(plan.missing)})"
    if plan.unused:
        have = "has" if len(plan.unused) == 1 else "have"
        yield f"note: {count(plan.unused)} of it {have} no place here ({some(plan.unused)})"


def tuples(tree):
    """A config as it was before it became JSON, which has no tuples."""
    if isinstance(tree, Mapping):
        return {key: tuples(value) for key, value in tree.items()}
    return tuple(tree) if isinstance(tree, list) else tree
