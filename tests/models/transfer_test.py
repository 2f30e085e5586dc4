"""Weights of teacher and student, as pictures show them and as the loss compares them."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from models import param
from models.context import Context
from models.mixers.hedgehog import Mixer
from models.param import Dims, flatten, restore
from parallel import mesh as meshes
from parallel.rules import spec

B, L, D, H = 2, 12, 16, 4


def mixer(form, window):
    own = dict(heads=H, kv_heads=2, form=form, window=window)
    graph, state = nnx.split(Mixer(Dims(D, L, 1, D), rngs=nnx.Rngs(0), **own))
    rng = np.random.default_rng(0)
    draw = lambda x: np.float32(x + 0.3 * rng.normal(size=x.shape))
    return graph, state, {path: draw(x) for path, x in flatten(state).items()}


def context():
    """The first row is two documents, the second has padding at its end."""
    segments = np.int32([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])
    positions = np.int32([[*range(5), *range(7)], [*range(9), 0, 0, 0]])
    put = lambda x: jax.device_put(x, spec("batch", "length"))
    taps = ("attention_weights", "attention_transfer")
    return Context(positions=put(positions), segment_ids=put(segments), taps=taps)


@functools.cache
def reported(form, window, devices):
    sizes = dict(data=2, tensor=2) if devices == 4 else {}
    graph, state, params = mixer(form, window)
    table = param.table(state)
    with jax.set_mesh(meshes.make(jax.devices()[:devices], **sizes)):
        params = {p: jax.device_put(x, spec(*table[p].axes)) for p, x in params.items()}
        x = np.float32(np.random.default_rng(1).normal(size=(B, L, D)))
        x = jax.device_put(x, spec("batch", "length", None))
        run = lambda params, x, ctx: nnx.merge(graph, restore(state, params))(x, ctx)[1]
        return jax.device_get(jax.jit(run)(params, x, context()))


CASES = pytest.mark.parametrize(("form", "window"), [("lolcats", 4), ("fla", None)])


@CASES
def test_they_are_what_the_loss_compares(form, window):
    """-sum t log a over tokens, as a mean over heads, from the weights alone."""
    found = reported(form, window, 1)
    t, a = (np.float64(found[f"{name}_weights"]) for name in ("teacher", "student"))
    with jax.set_mesh(meshes.make(jax.devices()[:1])):
        segments = np.asarray(context().segment_ids)
    seen = (segments[:, :, None] == segments[:, None]) & np.tri(L, dtype=bool)
    for weights in (t, a):
        assert weights.shape == (B, H, L, L)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
        assert np.all((weights > 0) == seen[:, None])
    each = -np.sum(t * np.log(np.where(a > 0, a, 1)), -1).mean(1)
    entropy = -np.sum(t * np.log(np.where(t > 0, t, 1)), -1).mean(1)
    for name, value in (("attention_transfer", each), ("teacher_entropy", entropy)):
        # float32 logarithms of two dozen tokens' weights
        np.testing.assert_allclose(found[name], value[segments > 0].sum(), rtol=1e-5)


@CASES
def test_four_devices_report_the_same(form, window):
    one, four = reported(form, window, 1), reported(form, window, 4)
    for name, value in one.items():
        np.testing.assert_allclose(four[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
