"""A base width changes nothing at that width, and beyond it what "Tensor Programs V" says."""

import jax
import numpy as np
import pytest

from launch.config import resolve
from launch.schema import UsageError
from models.context import Context
from models.param import Dims
from optim import widths
from parallel import mesh as meshes
from training.adapter import Adapter
from training.program import _declared, build

VOCAB, BASE = 256, 32
OWN = {"model.layers": "2", "data.length": "16", "data.batch_size": "2"}
OWN |= {"optim.name": "sgd", "optim.clip": "none"}


def config(width, base, **own):
    sizes = {"model.d_model": str(width), "model.base_d_model": str(base).lower()}
    own = {key.replace("__", "."): value for key, value in own.items()}
    return resolve("experiments/quickstart.py", OWN | sizes | own)


def table(width, base, **own) -> dict:
    _, _, own, adapter = _declared(config(width, base, **own), VOCAB)
    assert isinstance(adapter, Adapter)
    return own | adapter.table


def started(width, base, **own):
    mesh = meshes.make(jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = build(config(width, base, **own), mesh, VOCAB)
        return program, jax.device_get(program.init().params)


@pytest.mark.parametrize("own", [{}, {"model__init_std": "0.02", "model__tied": "False"}])
def test_at_the_base_width_every_bit_is_that_of_a_model_without_one(own):
    (one, params), (other, same) = started(BASE, BASE, **own), started(BASE, None, **own)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert all(entry.wider == (1, 1) for entry in one.table.values())
    with jax.set_mesh(meshes.make(jax.devices()[:1])):
        texts = [str(p.step.trace(p.state, p.batch).jaxpr) for p in (one, other)]
    assert texts[0] == texts[1]


# fan-in and fan-out beside the base, by the end of the path; K of a head grows where D / H does.
WIDER = {
    "tokens": (1, 4),
    "head/kernel": (4, 1),
    "scale": (1, 4),
    "mixer/q": (4, 4),
    "mixer/kv": (4, 4),
    "mixer/out": (4, 4),
    "mixer/q_map": (4, 4),
    "mixer/k_map": (4, 4),
    "ffn/router": (4, 1),
    "ffn/up": (4, 4),
    "ffn/down": (4, 4),
    "ffn/bias": (1, 1),
}


@pytest.mark.parametrize("width", ["none", "48"])
def test_fans_of_every_weight(width):
    """A width that is given by number grows with the model's; experts and vocabulary do not."""
    own = dict(model__ffn="moe", model__tied="False", model__pattern="hedgehog")
    own["model__ffns__moe__width"] = width
    for path, entry in table(4 * BASE, BASE, **own).items():
        (expected,) = [fans for end, fans in WIDER.items() if path.endswith(end)]
        assert entry.wider == expected, path
    fixed = dict(own, model__mixers__hedgehog__head_dim="8")
    found = table(4 * BASE, BASE, **fixed)
    assert found["blocks/0/mixer/q_map"].wider == (1, 1)
    assert found["blocks/0/mixer/out"].wider == (4, 4)


def test_fans_of_an_adapter():
    found = table(4 * BASE, BASE, adapter__name="lora")
    assert found["blocks/0/mixer/q/lora_a"].wider == (4, 1)
    assert found["blocks/0/mixer/q/lora_b"].wider == (1, 4)


def test_starts_over_widths():
    """Table 3: variance 1 / fan-in of matrices, 1 / fan-in^2 of those to a few; table 8: an
    embedding and a head start as at the base width."""
    given, free = (Dims(128, 16, 2, 32, std, False) for std in (0.02, None))
    assert given.wider == 4
    assert given.normal(128) == ("normal", 0.02 / 2)
    assert given.normal(128, few=True) == ("normal", 0.02 / 4)
    assert given.head() == ("normal", 0.02)
    assert free.normal(128)[1] == pytest.approx(128**-0.5)
    assert free.normal(128, few=True)[1] == pytest.approx(32**-0.5 / 4)
    assert free.head()[1] == pytest.approx(32**-0.5)
    for tied in ("True", "False"):
        stds = [table(width, BASE, model__tied=tied)["tokens"].weight.init for width in (32, 128)]
        assert stds[0] == stds[1]


def test_logits_are_divided_by_the_width_and_scores_by_the_head_size():
    """The same parameters under two base widths, where only these two factors differ."""
    own = dict(model__init_std="0.3", model__mixers__attention__rope="False")
    batch = np.random.default_rng(0).integers(0, VOCAB, (1, 2, 16), dtype=np.int32)
    logits = {}
    for base in (64, 16):
        program, params = started(64, base, **own)
        wave = lambda x: np.float32(np.sin(np.arange(x.size)).reshape(x.shape))
        params = {path: wave(x) for path, x in params.items()}
        wider = (64 / base) ** 0.5
        # Queries that are larger by what their scores are divided by give the same scores.
        params |= {p: x * wider for p, x in params.items() if p.endswith("mixer/q")}
        logits[base] = _logits(program, params, batch[0]) * wider**2
    np.testing.assert_allclose(logits[16], logits[64], rtol=1e-4, atol=1e-4)


def _logits(program, params, inputs):
    rows = np.ones_like(inputs)
    positions = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    with jax.set_mesh(meshes.make(jax.devices()[:1])):
        ctx = Context(positions=jax.numpy.asarray(positions), segment_ids=jax.numpy.asarray(rows))
        run = jax.jit(lambda params, x: program.model(params)(x, ctx)[0][..., :VOCAB])
        return np.asarray(run(params, jax.numpy.asarray(inputs)))


def test_a_base_width_below_one_is_a_sentence():
    with pytest.raises(UsageError, match=r"model\.base_d_model is 0 and must be greater than 0"):
        table(32, 0)


def test_learning_rates_follow():
    """Table 3 with the output multiplier, and sqrt(width) for steps of the weight's own size."""
    found = table(4 * BASE, BASE, model__ffn="moe", model__tied="False")
    rates = lambda end: [
        rule(next(entry for path, entry in found.items() if path.endswith(end)))
        for rule in (widths.elementwise, widths.proportional, widths.relative)
    ]
    assert rates("mixer/q") == rates("ffn/up") == rates("ffn/down") == [1 / 4, 1, 1 / 2]
    assert rates("tokens") == rates("head/kernel") == rates("final_norm/scale") == [1, 4, 1]
    assert rates("ffn/router") == [1 / 4, 1 / 4, 1]
