"""Who may import whom, and what is not used anywhere, read from the sources."""

import ast
import pathlib
import re
import sys

import pytest

from launch.files import ROOT

ROOMS = {
    "launch": {
        "analysis", "data", "experiments", "inference", "models", "optim", "pallas_kernels",
        "parallel", "training",
    },
    "training": {"inference", "models", "optim", "data", "parallel"},
    "inference": {"models", "parallel"},
    "models": {"pallas_kernels", "parallel"},
    "optim": {"parallel"},
    "pallas_kernels": set(),
    "parallel": set(),
    "data": set(),
    "analysis": set(),
    "experiments": set(),
}  # fmt: skip
ARRAYS = {"jax", "numpy", "jaxtyping"}
LIBRARIES = {
    "training": ARRAYS | {"flax", "optax", "orbax", "tensorboardX", "tqdm"},
    "inference": ARRAYS,
    "models": ARRAYS | {"flax"},
    "optim": ARRAYS | {"optax"},
    "pallas_kernels": ARRAYS,
    "parallel": ARRAYS,
    "data": {
        "numpy", "grain", "tokenizers", "pyarrow", "datasets", "datasketch", "tqdm",
        "absl",  # flags that grain reads
    },
    "analysis": {"numpy", "scipy", "matplotlib"},
    "experiments": {"ml_collections"},
}  # fmt: skip
METHODS = (
    "models.mixers", "models.ffns", "models.heads", "optim.methods", "training.losses",
    "training.adapters", "data.sources", "data.transforms", "data.tokenizers", "data.mixings",
)  # fmt: skip
TRANSFORMS = {"jit", "grad", "value_and_grad", "scan", "vmap", "Optimizer"}
FLAX = re.compile(rf"flax\.linen.*|flax\.nnx\.({'|'.join(TRANSFORMS)})")
CALLED = {"__call__", "prefill", "decode", "init_cache"}
LINES = 300


def violations(path: str, source: str) -> list[str]:
    """What this file breaks; path is relative to the repository."""
    tree, room = ast.parse(source), path.split("/")[0]
    found = [] if len(source.splitlines()) <= LINES else [f"has more than {LINES} lines"]
    if path.endswith("/utils.py"):
        found.append("is called utils.py")
    for module in imported(tree):
        found += [f"imports {module}: {why}" for why in _refused(room, module)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("nnx", "flax.nnx"):
            found += [f"uses nnx.{node.attr}"] if node.attr in TRANSFORMS else []
        if isinstance(node, ast.FunctionDef) and node.name in CALLED:
            inside = (getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(node))
            found += [f"uses Rngs in {node.name}"] if "Rngs" in inside else []
    return found


def imported(tree: ast.Module) -> list[str]:
    """Dotted names of everything imported anywhere, also by importlib with a literal name.

    `from a import b` gives a.b, because b may be a module.
    """
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            names += [f"{start}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names += [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
    return names


def _refused(room: str, module: str):
    top = module.split(".")[0]
    if module.startswith("."):
        yield "it is relative"
    if top in ROOMS and top != room and top not in ROOMS[room]:
        yield f"{room} may not import {top}"
    library = top not in ROOMS and top not in sys.stdlib_module_names
    if library and top not in LIBRARIES.get(room, {top}):
        yield f"{room} may not import {top}"
    if FLAX.fullmatch(module):
        yield "jax.* is used for every transform, and nnx as a container"
    if room == top == "experiments" and module != "experiments.base":
        yield "an experiment imports the base only"
    for home in METHODS:
        name = module.removeprefix(f"{home}.").split(".")[0]
        if (
            module.startswith(f"{home}.")
            and (ROOT / home.replace(".", "/") / f"{name}.py").exists()
        ):
            yield "methods are found by name from the configuration"


def sources():
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix()


def test_every_folder_with_sources_is_a_room():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders - {"tests"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_room(room):
    found = {}
    for path in sources():
        if path.startswith(f"{room}/"):
            found[path] = violations(path, (ROOT / path).read_text(encoding="utf-8"))
    assert found
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("models/a.py", "import training.loop", "models may not import training"),
        ("models/a.py", "from training import loop", "models may not import training"),
        ("models/a.py", "def f():\n    import data.batch", "models may not import data"),
        ("models/a.py", "import optax", "models may not import optax"),
        ("inference/a.py", "from training.program import build", "may not import training"),
        ("parallel/a.py", "from models import lm", "parallel may not import models"),
        ("pallas_kernels/x/a.py", "from parallel.rules import spec", "may not import parallel"),
        ("pallas_kernels/a.py", "import flax", "pallas_kernels may not import flax"),
        ("data/a.py", "import jax.numpy as jnp", "data may not import jax"),
        ("analysis/a.py", "from training.metrics import read", "may not import training"),
        ("training/a.py", "from launch import setup", "training may not import launch"),
        ("optim/a.py", "from models.param import table", "optim may not import models"),
        ("experiments/a.py", "from experiments import quickstart", "imports the base only"),
        ("models/a.py", "from experiments import quickstart", "may not import experiments"),
        ("experiments/a.py", "from launch.files import ROOT", "may not import launch"),
        ("experiments/a.py", "import numpy", "experiments may not import numpy"),
        ("models/lm.py", "from models.mixers import attention", "found by name"),
        ("models/lm.py", "from models.mixers.attention import Mixer", "found by name"),
        ("launch/a.py", "import data.sources.stdlib", "found by name"),
        ("launch/a.py", "importlib.import_module('optim.methods.adamw')", "found by name"),
        ("models/a.py", "from . import lm", "relative"),
        ("models/a.py", "import flax.linen as nn", "nnx as a container"),
        ("models/a.py", "from flax import linen", "nnx as a container"),
        ("models/a.py", "from flax.nnx import jit", "nnx as a container"),
        ("training/a.py", "f = nnx.value_and_grad(g)", "uses nnx.value_and_grad"),
        ("training/a.py", "@nnx.jit\ndef f(): ...", "uses nnx.jit"),
        ("models/a.py", "class A:\n    def __call__(self, x):\n        nnx.Rngs(0)", "uses Rngs"),
        ("models/a.py", "x = 1\n" * 301, "more than 300 lines"),
        ("models/utils.py", "", "utils.py"),
    ],
)
def test_the_rule_can_fail(path, source, expected):
    assert any(expected in what for what in violations(path, source)), violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("launch/a.py", "import training.loop, data.pipeline, analysis.ngrams, ml_collections"),
        ("training/a.py", "from inference import sampling\nimport orbax.checkpoint as ocp"),
        ("models/a.py", "from parallel.rules import spec\nfrom flax import nnx\nnnx.split(x)"),
        ("experiments/a.py", "from experiments import base"),
        ("models/a.py", "importlib.import_module(f'models.mixers.{name}')"),
        ("models/a.py", "import models.mixers\nfrom models import mixers"),
        ("models/a.py", "class A:\n    def __init__(self, *, rngs: nnx.Rngs): ..."),
        ("data/a.py", "def f():\n    import grain"),
        ("models/a.py", "x = 1\n" * 300),
    ],
)
def test_the_rule_can_hold(path, source):
    assert violations(path, source) == []


def test_nothing_in_the_repository_is_called_utils():
    assert [path for path in sources() if pathlib.PurePath(path).stem in ("utils", "util")] == []
