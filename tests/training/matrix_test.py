"""The same run on one device and on every mesh of eight: losses, parameters, copies on devices.

Both models have packed rows, padding, accumulation with a micro-batch that has no target, remat and
a scan over two periods. The decoder has grouped queries, an untied head and a soft cap; the encoder
has dropout, a moving average, biases, learned positions and a tied head.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from launch.config import resolve
from parallel import mesh as meshes
from parallel.replicas import differences
from tests.models.built import packed, place, rows
from training import program
from training.state import TrainState

STEPS, A, B, L, V = 20, 2, 16, 12, 120
MASK = V - 1
MESHES = [
    dict(data=8),
    dict(fsdp=8),
    dict(tensor=8),
    dict(data=4, fsdp=2),
    dict(data=2, fsdp=4),
    dict(data=4, tensor=2),
    dict(data=2, tensor=4),
    dict(fsdp=4, tensor=2),
    dict(fsdp=2, tensor=4),
    dict(data=2, fsdp=2, tensor=2),
]
HYBRID = dict(replica=2, fsdp=2, tensor=2)
# Where the encoder's start is drawn too, and not only the decoder's: each costs a compilation.
DRAWN = [dict(fsdp=8), dict(tensor=8), dict(data=2, fsdp=2, tensor=2)]
SHARED = {
    "steps": STEPS,
    "seed": 3,
    "data.batch_size": B,
    "data.length": L,
    "data.micro_batches": A,
    "model.vocab": V,
    "model.d_model": 16,
    "model.layers": 2,
    "model.remat": "full",
    "optim.name": "adamw",
    "optim.lr": 0.01,
    "optim.weight_decay": 0.1,
    "loss.losses.cross_entropy.z": 1e-3,
}
DECODER = {
    "model.mixers.attention.heads": 16,
    "model.mixers.attention.kv_heads": 8,
    "model.mixers.attention.head_dim": 2,
    "model.ffns.swiglu.width": 16,
    "model.tied": False,
    "model.softcap": 20.0,
}
ENCODER = {
    "model.causal": False,
    "model.tied": True,
    "model.norm": "layernorm",
    "model.norm_position": "post",
    "model.positions": "learned",
    "model.dropout": 0.1,
    "model.mixers.attention.heads": 8,
    "model.mixers.attention.bias": True,
    "model.mixers.attention.rope": False,
    "model.ffn": "gelu",
    "model.ffns.gelu.width": 16,
    "ema": 0.8,
}
MODELS = {"decoder": DECODER, "encoder": ENCODER}
# Rows of the second micro-batch; the first holds none, or these and others in another order.
FULL = [(5, 7), (3, 3, 3), (11, 1), (2,), (), (4, 4, 4), (12,), (6, 2)]
EMPTY = [(), (), (), (12,), (5, 7), (), (1,), ()]


def _batch(model, number):
    """Documents that count on modulo V - 1. On even steps the first micro-batch has no target."""
    rng = np.random.default_rng(number)
    segments, positions = packed([*(FULL[::-1] if number % 2 else EMPTY), *FULL])
    starts = rng.integers(0, V - 1, (B, 5))
    tokens = (np.take_along_axis(starts, segments, 1) + positions) % (V - 1)
    inputs, targets, weights = tokens, (tokens + 1) % (V - 1), segments > 0
    if model == "encoder":
        masked = (rng.random((B, L)) < 0.5) & (segments > 0)
        inputs, targets, weights = np.where(masked, MASK, tokens), tokens, masked
    if number % 2 == 0:
        weights = weights & (np.arange(B) >= B // A)[:, None]
    return rows(
        number,
        A,
        segments,
        positions,
        inputs=inputs.astype(np.int32),
        targets=targets.astype(np.int32),
        weights=weights.astype(np.float32),
    )


@dataclasses.dataclass
class Run:
    """Of one model on one mesh; states are on the host.

    start: the initial state.  losses: of the shipped optimizer.  end: of the one that is warm.
    steps: how often the step was compiled.  apart: copies that differ after either.
    """

    start: TrainState
    losses: np.ndarray
    end: TrainState
    steps: int
    apart: list


def _run(model, start=None, **sizes) -> Run:
    """start: the state to begin with, drawn on the mesh when None."""
    mesh = meshes.make(**sizes) if sizes else meshes.make(jax.devices()[:1])
    own = SHARED | MODELS[model]
    with jax.set_mesh(mesh):
        built = program.build(resolve("base", {n: str(x) for n, x in own.items()}), mesh, V)
        state = built.init() if start is None else place(start, built.state)
        start = jax.device_get(state)
        batches = [place(_batch(model, number), built.batch) for number in range(STEPS)]
        _, losses, apart = _train(built, state, batches)
        end, _, again = _train(built, place(_warm(start), built.state), batches)
    return Run(start, losses, end, built.step._cache_size(), apart + again)


def _train(built, state, batches):
    losses = []
    for batch in batches:
        state, metrics = built.step(state, batch)
        losses.append(metrics["loss"])
    apart = differences({"state": state, "log": metrics})
    return jax.device_get(state), np.array(jax.device_get(losses)), apart


def _warm(state):
    """The state as if squared gradients had been 1e-4 for long, in place of an eps of 1e-3.

    With the shipped 1e-8 a gradient that is zero but for rounding is rounding divided by rounding,
    and moves its weight by a whole learning rate. Both prevent that; this needs no other step.
    """
    adam = lambda x: isinstance(x, optax.ScaleByAdamState)
    full = lambda x: np.full(x.shape, 1e-4, x.dtype)
    warm = lambda x: x._replace(nu=jax.tree.map(full, x.nu)) if adam(x) else x
    return state._replace(opt=jax.tree.map(warm, state.opt, is_leaf=adam))


@functools.cache
def _one(model) -> Run:
    return _run(model)


def _check(eight: Run, one: Run):
    assert eight.apart == []
    assert eight.steps == 1
    for a, e in zip(jax.tree.leaves(eight.start), jax.tree.leaves(one.start), strict=True):
        np.testing.assert_array_equal(a, e)
    # Float32 sums over some hundred targets in another order, by parameters that differ as below.
    np.testing.assert_allclose(eight.losses, one.losses, rtol=2e-6)
    averages = one.end.aux.get("ema", {})
    assert eight.end.aux.get("ema", {}).keys() == averages.keys()
    for path, value in one.end.params.items():
        start = one.start.params[path]
        # Relative to the leaf's largest value. A bias starts at 0 and is nothing but 20 updates, by
        # gradients that are sums with cancellation; others have a start of which no bit differs.
        size = (1e-6 if np.any(start) else 4e-6) * np.abs(value).max()
        assert np.abs(value - start).max() > 100 * size, path
        np.testing.assert_allclose(eight.end.params[path], value, rtol=0, atol=size, err_msg=path)
        if averages:
            average = eight.end.aux["ema"][path]
            np.testing.assert_allclose(average, averages[path], rtol=0, atol=size, err_msg=path)


def _name(sizes):
    return "-".join(f"{axis}{size}" for axis, size in sizes.items())


@pytest.mark.parametrize("sizes", [*MESHES, HYBRID], ids=_name)
def test_a_decoder_trains_on_eight_devices_as_on_one(sizes):
    _check(_run("decoder", **sizes), _one("decoder"))


@pytest.mark.parametrize("sizes", MESHES, ids=_name)
def test_an_encoder_trains_on_eight_devices_as_on_one(sizes):
    one = _one("encoder")
    _check(_run("encoder", None if sizes in DRAWN else one.start, **sizes), one)


def test_every_mesh_of_eight_is_there():
    """All products of data, fsdp and tensor."""
    powers = [(a, b, 8 // a // b) for a in (1, 2, 4, 8) for b in (1, 2, 4, 8) if a * b <= 8]
    named = {tuple(sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor")) for sizes in MESHES}
    assert named == set(powers)
    assert len(MESHES) == 10


@pytest.mark.parametrize("model", MODELS)
def test_the_run_is_worth_comparing(model):
    """It learns, each step has another batch, and a micro-batch really has no target."""
    run = _one(model)
    assert len(set(run.losses.tolist())) == STEPS
    assert run.losses[-4:].mean() < 0.98 * run.losses[:4].mean()
    empty, full = (_batch(model, number).weights.sum((1, 2)) for number in (0, 1))
    assert empty[0] == 0
    assert empty[1] > 0
    assert np.all(full > 0)
    segments = _batch(model, 1).segment_ids
    assert segments.max() >= 3
    assert np.any(np.all(segments == 0, -1))
