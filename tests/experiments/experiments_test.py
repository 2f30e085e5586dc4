"""Every file in experiments/ resolves, says what it is, and has the published size."""

import ast
import functools
import importlib
import inspect
import math
import pathlib

import jax
import pytest
from flax import nnx

from experiments import base
from launch import study
from launch.config import resolve, shared_keys
from launch.files import ROOT, leaves
from launch.schema import documented
from models.lm import LM, padded

FILES = sorted((ROOT / "experiments").glob("[!_]*.py"))
NAMES = [path.stem for path in FILES]
STUDIES = [x for x in NAMES if hasattr(importlib.import_module(f"experiments.{x}"), "ARMS")]
NOT_OF_LM = ("vocab", "causal", "dtype", "taps")


def test_base_documents_every_key_once():
    source = pathlib.Path(base.__file__).read_text()
    comments = documented(source)
    assert source.count("\n    config.") == len(comments)
    assert [name for name, comment in comments.items() if not comment] == []
    assert {name for name, _ in leaves(base.get_config())} == set(shared_keys())


def test_base_names_its_special_keys_rightly():
    keys = shared_keys()
    assert set(base.OPTIONAL) | set(base.CHOICES) <= set(keys)
    for name in base.OPTIONAL:
        assert keys[name].default is not None, f"{name} is a placeholder already"
    for key in keys.values():
        assert key.conform(key.default) == key.default


@pytest.mark.parametrize("name", NAMES)
def test_file_resolves(name):
    config = resolve(name, {})
    assert config == resolve(f"experiments/{name}.py", {})
    assert {"steps", "data", "model", "loss", "optim", "mesh", "train"} <= set(config)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_file_imports_only_what_it_may(path):
    allowed = {"ml_collections", "ml_collections.config_dict", "experiments"}
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Import)
        if isinstance(node, ast.ImportFrom):
            assert node.module in allowed
            if node.module == "experiments":
                assert [alias.name for alias in node.names] == ["base"]


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_how_to_run_it_and_what_came_out(name):
    text = inspect.getdoc(importlib.import_module(f"experiments.{name}"))
    command = "sweep" if name in STUDIES else "train --config"
    assert f"uv run {command} experiments/{name}.py" in text
    if name != "base":
        assert "\nCOST " in text
        assert "\nEXPECTED " in text


@pytest.mark.parametrize("name", STUDIES)
def test_study_resolves_and_states_its_rule(name):
    """`read` resolves every run, and refuses two of one name and a docstring without the rule."""
    found = study.read(f"experiments/{name}.py", {})
    text = inspect.getdoc(importlib.import_module(f"experiments.{name}"))
    assert all(f"\n{word} " in text for word in ("RULE", "COMMAND", "COST", "FULL", "EXPECTED"))
    assert len(found.seeds) >= 3
    # Settings may differ in what an arm does not read.
    made = {(run.arm.partition("@")[2], run.after, str(run.config)) for run in found.runs}
    assert len(made) == len(found.runs)


def test_baseline_of_the_optimizers_is_the_quickstart():
    own, other = (dict(leaves(resolve(name))) for name in ("optimizers", "quickstart"))
    changed = {key for key in own | other if own.get(key) != other.get(key)}
    assert {key for key in changed if not key.startswith("train.")} == {"steps"}


# Counted by hand from the papers' shapes; a padded vocabulary is not counted.
SIZES = {
    "quickstart": 258 * 128 + 4 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 192 + 2 * 128) + 128,
    "gpt2_124m": 124_439_808,
    "llama_1b": 1_235_814_400,
    "llama_7b": 6_738_415_616,
    "bert_base": 23_440_896 + 393_216 + 1_536 + 1_536 + 12 * 7_087_872 + 590_592 + 1_536 + 30_522,
}


@pytest.mark.parametrize("name", SIZES)
def test_number_of_parameters(name):
    config = resolve(name, {})
    vocab = config["model"]["vocab"] or 258
    own = {key: value for key, value in config["model"].items() if key not in NOT_OF_LM}
    length = config["data"]["length"]
    make = functools.partial(LM, vocab=vocab, length=length, **own)
    weights = jax.tree.leaves(jax.eval_shape(lambda: nnx.state(make(rngs=nnx.Rngs(0)))))
    total = sum(math.prod(weight.shape) for weight in weights)
    held = [w for w in weights if padded(vocab) in w.shape]
    unused = sum(math.prod(w.shape) // padded(vocab) for w in held) * (padded(vocab) - vocab)
    assert total - unused == SIZES[name]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_keeps_its_tokens_a_step(name):
    published = {"gpt2_124m": 491_520, "llama_1b": 2_097_152, "llama_7b": 4_194_304,
                 "bert_base": 131_072}  # fmt: skip
    data = resolve(name, {})["data"]
    assert data["batch_size"] * data["length"] == published.get(
        name, data["batch_size"] * data["length"]
    )
