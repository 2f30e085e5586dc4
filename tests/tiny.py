"""Runs that take a second once compiled: a small corpus on disk, one layer of width 32."""

import pathlib

import jax

import data.pipeline
from launch.config import resolve
from launch.setup import Setup, header
from parallel import mesh as meshes
from training import loop
from training import program as programs

FUNCTION = "def function_{0}(x):\n    return x * {0} + {1}\n\n\n"
SIZES = {
    "steps": 6,
    "data.batch_size": 4,
    "data.length": 32,
    "data.prefetch": 0,
    "model.d_model": 32,
    "model.layers": 1,
    "model.ffns.swiglu.width": 48,
    "optim.schedule": "constant",
    "optim.warmup_fraction": 0.0,
    "train.eval_every": "none",
    "train.sample_tokens": 4,
    "mesh.data": 1,
}


def corpus(folder: pathlib.Path, files: int = 40) -> pathlib.Path:
    """Source files, of which a few are held out."""
    folder.mkdir(exist_ok=True)
    for i in range(files):
        text = "".join(FUNCTION.format(i, j) for j in range(3 + i % 4))
        (folder / f"file_{i}.py").write_text(text)
    return folder


def overrides(root: pathlib.Path, **changes) -> dict[str, str]:
    """{dotted key: text} of a tiny run on the corpus in `root`; `a__b=1` changes the key a.b."""
    own = {"data.sources.stdlib.root": root, "data.sources.stdlib.holdout": 0.1}
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: str(value) for name, value in (SIZES | own | named).items()}


def flags(root: pathlib.Path, **changes) -> list[str]:
    """The same as a command line."""
    return [f"--config.{name}={text}" for name, text in overrides(root, **changes).items()]


def setup(root: pathlib.Path, devices: int = 1, **changes) -> Setup:
    """A program on the first devices. Traces of it need `jax.set_mesh(setup.mesh)`."""
    config = resolve("base", overrides(root, **changes))
    mesh = meshes.make(jax.devices()[:devices], **config["mesh"])
    corpus = data.pipeline.build(seed=config["seed"], **config["data"])
    with jax.set_mesh(mesh):  # A program cannot be built under a current mesh of another size.
        return Setup(config, mesh, corpus, programs.build(config, mesh, corpus.vocab_size))


def run(built: Setup, workdir: pathlib.Path, *, steps: int | None = None, sample=None, **train):
    """A Run of a program that exists already; `train` are keys of config.train."""
    config = dict(built.config) | {"train": built.config["train"] | train}
    config["steps"] = steps or config["steps"]
    changed = Setup(config, built.mesh, built.data, built.program)
    return loop.Run(
        config=config,
        program=built.program,
        data=built.data,
        mesh=built.mesh,
        workdir=workdir,
        header=header(changed),
        flops=1e3,
        sample=sample,
    )
