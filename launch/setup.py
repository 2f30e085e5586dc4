"""What every command builds from a configuration: devices, data, program."""

import contextlib
import dataclasses
import math
import os
import pathlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

import data.methods
import data.pipeline
from launch import provenance
from launch.failure import sentence
from parallel import mesh as meshes
from parallel.rules import ways
from parallel.weight import Entry, Table
from training import flops
from training import program as programs
from training.checkpoint import READING, Checkpoints
from training.loop import NotFiniteError
from training.start import tuples


@dataclasses.dataclass(frozen=True)
class Setup:
    config: Mapping
    mesh: jax.sharding.Mesh
    data: Any
    program: programs.Program


def build(
    config: Mapping,
    mesh: jax.sharding.Mesh | None = None,
    corpus: bool = True,
    connect: Callable[[Any], None] | None = None,
) -> Setup:
    """Mesh, data and program of a resolved config; the mesh becomes the current one.

    mesh: instead of the config's.  corpus: False opens none, and `data` has a tokenizer alone.
    connect(data): joins several processes, which only then may touch their devices.
    Raises ValueError in one sentence for whatever does not fit.
    """
    if mesh is None and connect is None:  # Told before a corpus is read that takes its time.
        mesh = meshes.make(**config["mesh"])
    whole = lambda: data.pipeline.build(seed=config["seed"], **config["data"])
    given = whole() if corpus else tokenizer_alone(config)
    if connect is not None:
        connect(given)
        mesh = meshes.make(**config["mesh"])
    program = programs.build(config, mesh, given.tokenizer.vocab_size)
    jax.set_mesh(mesh)
    return Setup(config, mesh, given, program)


def tokenizer_alone(config: Mapping) -> types.SimpleNamespace:
    """What stands for the data where no corpus is opened."""
    name = config["data"]["tokenizer"]
    own = config["data"]["tokenizers"].get(name, {})
    tokenizer = data.methods.make("tokenizers", "Tokenizer", name, own)
    return types.SimpleNamespace(tokenizer=tokenizer, vocab_size=tokenizer.vocab_size)


def reopen(
    workdir: str | None, corpus: bool = True, trust: bool = False
) -> tuple[Setup, dict, int]:
    """The setup, all parameters and the step of the newest sound checkpoint in a run's folder.

    A run of another number of devices is laid out over those that are here.  corpus: as for
    `build`; False for what writes text and reads none, which may have moved.  trust: the newest
    checkpoint, unverified. Raises ValueError where the folder holds no checkpoint or none that is
    sound, and for another tokenizer than the run's.
    """
    if workdir is None:
        raise ValueError("give --workdir FOLDER, the folder of a run")
    with Checkpoints(workdir, trust=trust) as checkpoints:
        # A training process may go on beside this one, and remove a step while it is read.
        return checkpoints.newest(lambda step: _reopen(checkpoints, step, corpus), READING)


def _reopen(checkpoints: Checkpoints, step: int, corpus: bool) -> tuple[Setup, dict, int]:
    header = checkpoints.meta(step)["header"]
    config = tuples(header["config"])
    mesh = _mesh_here(config["mesh"])
    devices = ways(mesh, "batch")
    rows = config["data"]["batch_size"] // config["data"]["micro_batches"]
    config["data"] |= {"batch_size": -(-rows // devices) * devices, "micro_batches": 1}
    setup = build(config, mesh, corpus)
    _same_tokenizer(header, setup)
    if corpus:
        _tell_others(header, setup.data.fingerprint)
    state = setup.program.state
    averaged = "ema" in state.aux
    params, _ = checkpoints.restore_params(step, state.params, aux="ema" if averaged else None)
    if "frozen" in state.aux:
        frozen, _ = checkpoints.restore_params(step, state.aux["frozen"], aux="frozen")
        params = frozen | params
    return setup, params, step


def _same_tokenizer(header: Mapping, setup: Setup) -> None:
    was, now = header.get("tokenizer"), setup.data.tokenizer.fingerprint()
    if was is not None and was != now:
        raise ValueError(
            f"the tokenizer is not the one the run was trained with: its fingerprint is {now} and "
            f"was {was}; restore it"
        )


def _tell_others(header: Mapping, fingerprint: str) -> None:
    corpora = [corpus["fingerprint"] for corpus in header.get("corpora", [header])]
    others = dict.fromkeys(c for c in corpora if c != fingerprint)
    if others:
        print(
            f"note: the corpus has fingerprint {fingerprint} and the run trained on "
            f"{', '.join(others)}, so held-out files may have been trained on",
            file=sys.stderr,
        )


def _mesh_here(sizes: Mapping) -> jax.sharding.Mesh:
    """The run's mesh where it fits the devices here, else all of them on the fsdp axis."""
    try:
        return meshes.make(**sizes)
    except ValueError:
        return meshes.make(fsdp=-1)


def header(setup: Setup) -> dict:
    """What metrics.jsonl and checkpoints say of a run: all that decides its numbers."""
    program, device = setup.program, setup.mesh.devices.flat[0]
    return {
        "config": _plain(setup.config),
        "parameters": parameter_counts(program.table, vocabulary(setup)),
        "flops_per_token": _flops(setup),
        "fingerprint": setup.data.fingerprint,
        "tokenizer": setup.data.tokenizer.fingerprint(),
        "seed": setup.config["seed"],
        "device": {"kind": device.device_kind, "count": setup.mesh.devices.size},
        "processor": provenance.processor(),
        "hosts": jax.process_count(),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }


def _flops(setup: Setup) -> dict:
    """FLOPs a token by name, or {'unknown': why}: what cannot be counted can still be trained."""
    try:
        work = flops_per_token(setup)
    except ValueError as error:
        return {"unknown": str(error)}
    both = {"visible": work.visible, "full_square": work.full_square}
    return dataclasses.asdict(work) | both


def flops_per_token(setup: Setup) -> flops.ModelFlops:
    """Of the model, forward and backward, recomputation left out (see training/flops.py)."""
    config = reference_kernels(setup.config)
    # Of one device, where nothing is computed twice and no room is kept for what others may send.
    names = setup.mesh.axis_names
    mesh = jax.make_mesh((1,) * len(names), names, devices=setup.mesh.devices.flat[:1])
    with jax.set_mesh(mesh):
        program = programs.build(config, mesh, setup.data.vocab_size)
        return _counted(program, mesh, config["model"]["causal"])


def _counted(program: programs.Program, mesh: jax.sharding.Mesh, causal: bool) -> flops.ModelFlops:
    params = program.state.aux.get("frozen", {}) | program.state.params
    b, L = program.batch.inputs.shape[1:]
    lay = lambda name: programs.batch_sharding(name, mesh, 0)
    row = lambda name, x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=lay(name))
    fields = program.batch._asdict()
    rows = program.batch._replace(**{name: row(name, x) for name, x in fields.items()})
    masked = program.model(params).masked_flops(L) if causal else 0.0
    return flops.model(program.evaluate, params, rows, tokens=b * L, masked=masked)


def reference_kernels(config: Mapping) -> Mapping:
    """The config with plain implementations, whose operations can be counted, and no remat."""

    def plain(methods: Mapping) -> Mapping:
        return {
            name: own | ({"implementation": "reference"} if "implementation" in own else {})
            for name, own in methods.items()
        }

    model = config["model"]
    changed = {name: plain(model[name]) for name in ("mixers", "blocks", "ffns")}
    return config | {"model": model | changed | {"remat": "none"}}


def vocabulary(setup: Setup) -> int:
    """Tokens that the model knows, before its embedding is padded."""
    return setup.config["model"]["vocab"] or setup.data.vocab_size


def parameter_counts(table: Table, vocab: int) -> dict[str, int]:
    """Numbers of parameters, state that no gradient trains left out: `total` and
    `without_embeddings`, without the padding of the vocabulary; `padded` is `total` with it."""
    table = {path: entry for path, entry in table.items() if entry.weight.group != "state"}
    sizes = {path: math.prod(entry.shape) for path, entry in table.items()}
    real = {path: _without_padding(entry, vocab) for path, entry in table.items()}
    embedded = sum(n for path, n in real.items() if table[path].weight.group == "embed")
    total = sum(real.values())
    padded = sum(sizes.values())
    return {"total": total, "without_embeddings": total - embedded, "padded": padded}


def _without_padding(entry: Entry, vocab: int) -> int:
    sized = zip(entry.shape, entry.axes, strict=True)
    return math.prod(vocab if axis == "vocab" else size for size, axis in sized)


def parameter_table(table: Table, vocab: int) -> str:
    """The table as text: path, shape (layers first), logical axes, start, group, decay; totals.

    With a base width also how many times larger fan-in and fan-out are than there.
    """
    based = any(entry.wider != (1.0, 1.0) for entry in table.values())
    names = ("path", "shape", "axes", "start", "group", "decay", "parameters")
    rows = [(*names, "wider") if based else names]
    for path, entry in table.items():
        weight = entry.weight
        start = " ".join(f"{x:.4g}" if isinstance(x, float) else x for x in weight.init)
        axes = " ".join(axis or "-" for axis in entry.axes)
        shape = " ".join(map(str, entry.shape))
        decay = "yes" if weight.decay else "no"
        size = f"{math.prod(entry.shape):,}"
        wider = ("{:g} x {:g}".format(*entry.wider),) if based else ()
        rows.append((path, shape, axes, start, weight.group, decay, size, *wider))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    counts = parameter_counts(table, vocab)
    total = f"{counts['total']:,} parameters, {counts['without_embeddings']:,} without embeddings"
    padded = f"{counts['padded']:,} with the vocabulary of {vocab:,} padded"
    return "\n".join([*lines, total, padded]) + "\n"


@contextlib.contextmanager
def one_sentence(command: str) -> Iterator[None]:
    """Turns errors that the user can mend into a sentence on stderr and exit status 2.

    A run that stopped by itself exits with 1. MESHWORK_TRACEBACK=1 shows where it came from.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        status, text = explain(command, error)
        if text is None:
            raise
        if text:
            print(text, file=sys.stderr)
        raise SystemExit(status) from None


def explain(command: str, error: BaseException) -> tuple[int, str | None]:
    """The exit status for an error and its sentence, empty if there is nothing to say.

    None where the user can do nothing, or asks by MESHWORK_TRACEBACK=1 where it came from.
    """
    if isinstance(error, KeyboardInterrupt):
        return 130, ""
    if os.environ.get("MESHWORK_TRACEBACK"):
        return 1, None
    if isinstance(error, (ValueError, OSError, ImportError, NotImplementedError)):
        return 1 if isinstance(error, NotFiniteError) else 2, sentence(command, error)
    what = str(error).partition("\n")[0]
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in what:
        fix = "lower data.length or data.batch_size, or raise data.micro_batches"
        return 2, f"{command}: the devices have too little memory ({what}); {fix}"
    return 1, None


def workdir(flags, config_path: str) -> pathlib.Path:
    """--workdir, or runs/<name of the config>. Raises ValueError if it is a file."""
    folder = pathlib.Path(flags.workdir or f"runs/{pathlib.Path(config_path).stem}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--workdir {folder} is a file; give a folder")
    return folder


def _plain(tree):
    """Tuples as lists, as JSON gives them back."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, (tuple, list)) else tree
