"""A method is a file: written, it trains under its name; deleted, nothing of it is left."""

import importlib
import sys

import jax
import pytest

import models.mixers
from inference.generate import generate
from launch.config import resolve
from launch.files import ROOT
from launch.flags import parse
from launch.schema import UsageError
from tests import tiny
from training import loop, metrics

NAME = "dropin_probe_shift"
PATH = ROOT / "models" / "mixers" / f"{NAME}.py"
SOURCE = '''
"""Adds a share of the token before, of the same document."""

import jax.numpy as jnp
from flax import nnx

from models.param import param
from parallel.rules import spec


class Mixer(nnx.Module):
    modes = frozenset({"causal"})
    context = "none"

    def __init__(self, dims, *, rngs: nnx.Rngs, strength: float = 0.5):
        self.strength = strength
        self.scale = param(rngs, (dims.d_model,), (None,), init=("ones",), group="norm")

    def __call__(self, x, ctx):
        same = (ctx.positions > 0) & ctx.valid
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return self._mix(x, jnp.where(same[:, :, None], before, 0)), {}

    def _mix(self, x, before):
        return (x + self.strength * before) * self.scale[...].astype(x.dtype)[None, None]

    def init_cache(self, B, length, dtype):
        shape, layout = (B, 1, self.scale.shape[-1]), spec("batch", None, None)
        return jnp.zeros(shape, dtype, out_sharding=layout)

    def prefill(self, x, ctx, cache):
        last = ctx.valid & ~jnp.pad(ctx.valid, ((0, 0), (0, 1)))[:, 1:]
        kept = jnp.sum(jnp.where(last[:, :, None], x, 0), 1, keepdims=True)
        return self(x, ctx)[0], kept.astype(cache.dtype)

    def decode(self, x, ctx, cache):
        return self._mix(x, cache), x
'''


def forget():
    """Removes the file and every trace of it in this process."""
    PATH.unlink(missing_ok=True)
    for path in (PATH.parent / "__pycache__").glob(f"{NAME}.*"):
        path.unlink()
    sys.modules.pop(f"models.mixers.{NAME}", None)
    vars(models.mixers).pop(NAME, None)
    importlib.invalidate_caches()


@pytest.fixture
def mixer(monkeypatch):
    """Its name, while the file is there."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    forget()
    try:
        PATH.write_text(SOURCE)
        yield NAME
    finally:
        forget()


def test_a_file_works_at_once_by_its_name(mixer, tmp_path, capsys):
    root = tiny.corpus(tmp_path / "corpus")
    own = {f"model__mixers__{mixer}__strength": 0.25, "model__pattern": mixer, "steps": 2}
    built = tiny.setup(root, **own)
    assert built.config["model"]["mixers"] == {mixer: {"strength": 0.25}}
    assert [path for path in built.program.table if "mixer" in path] == ["blocks/0/mixer/scale"]
    with jax.set_mesh(built.mesh):
        job = tiny.run(built, tmp_path / "run")
        outcome = loop.run(job)
        params, prompt = outcome.state.params, built.data.tokenizer.encode_prompt("def")
        own = dict(tokens=3, eos=-1, context={"dtype": "float32"})
        (text,) = generate(built.program.model, params, [prompt], **own)
    assert len(text) == 3
    first, last = [r for r in metrics.read(job.workdir / "metrics.jsonl")[1] if "loss" in r]
    assert last["loss"] < first["loss"]
    assert first["gradient_norm/blocks/0/mixer"] > 0
    with pytest.raises(SystemExit, match="0"):
        parse(["--config", "base", f"--config.model.pattern={mixer}", "--help"])
    assert f"model.mixers.{mixer}.strength = 0.5" in capsys.readouterr().out


def test_its_own_keys_are_checked_like_any_other(mixer):
    with pytest.raises(UsageError, match=rf"did you mean model\.mixers\.{mixer}\.strength\?"):
        resolve("base", {"model.pattern": mixer, f"model.mixers.{mixer}.strenth": "1"})
    with pytest.raises(UsageError, match="strength takes a number and got 'much'"):
        resolve("base", {"model.pattern": mixer, f"model.mixers.{mixer}.strength": "much"})


def test_after_deletion_nothing_is_left(mixer):
    resolve("base", {"model.pattern": mixer})
    importlib.import_module(f"models.mixers.{mixer}")
    forget()
    with pytest.raises(UsageError, match=f"names '{mixer}', and models/mixers has no {mixer}.py"):
        resolve("base", {"model.pattern": mixer})
    with pytest.raises(UsageError, match=r"did you mean 'attention'\?"):
        resolve("base", {"model.pattern": "atention"})
    with pytest.raises(UsageError, match="is not a key"):
        resolve("base", {f"model.mixers.{mixer}.strength": "1"})
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"models.mixers.{mixer}")
    assert not list(PATH.parent.rglob(f"{mixer}*"))
