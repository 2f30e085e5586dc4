"""LARS against a float64 LARS of separate matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim.methods import lars
from tests.optim import layers
from tests.optim.layers import DECAYED, RATIO, TABLE, draws, pieces, start

QKV, DOWN, NORM = "blocks/0/mixer/qkv", "blocks/0/ffn/down", "blocks/0/norm/scale"


def norm(x):
    return np.sqrt((x**2).sum())


def oracle(w, grads, rates, wd, *, eta, momentum, nesterov=False, norm_of_sum=False):
    def step(path, index, x):
        buffer, decay = 0.0, wd * (path in DECAYED)
        for g, rate in zip(grads, rates, strict=True):
            g = g[path][index]
            below = norm(g + decay * x) if norm_of_sum else norm(g) + decay * norm(x)
            u = (g + decay * x) * (eta * norm(x) / below if path in RATIO else 1.0)
            buffer = momentum * buffer + u
            x = x - rate * (u + momentum * buffer if nesterov else buffer)
        return x

    return layers.oracle(w, step)


@pytest.mark.parametrize(
    "own",
    [
        {"eta": 1.0, "momentum": 0.9},
        {"eta": 0.1, "momentum": 0.5, "nesterov": True, "norm_of_sum": True},
        {"eta": 1.0, "momentum": 0.0},
    ],
)
def test_equals_lars_on_separate_layers(own):
    """The rate changes while the momentum goes on: it is outside of the momentum."""
    w, *grads = map(dict if own["momentum"] == 0.9 else layers.some, (start(), *draws(7)[1:]))
    rates = np.float32([0.01, 0.02, 0.03, 0.02, 0.01, 0.005])
    got = layers.run(lars.make(TABLE, weight_decay=0.3, **own), w, grads, rates)
    # float32 state and weights, six steps of a few roundings of 6e-8 each.
    layers.agree(got, oracle(w, grads, np.float64(rates), 0.3, **own), 2e-6)


def test_optax_agrees_with_the_norm_of_the_sum_and_a_constant_rate():
    """The library itself, of which every matrix is a leaf, and whose rate is in the momentum."""
    w, *grads = ({QKV: tree[QKV]} for tree in (start(), *draws(4)[1:]))
    apart = lambda tree: {
        str(i): np.float32(tree[QKV][index]) for i, index in enumerate(pieces(QKV))
    }
    theirs = optax.lars(0.01, weight_decay=0.3, trust_coefficient=1.0)
    negative = optax.chain(theirs, optax.scale(-1.0))
    want = layers.run(negative, apart(w), [apart(g) for g in grads], 1.0)
    ours = lars.make(TABLE, weight_decay=0.3, norm_of_sum=True)
    got = apart(layers.run(ours, w, grads, 0.01))
    for path in want:
        # float32 both, three steps.
        np.testing.assert_allclose(got[path], want[path], atol=1e-6 * np.abs(want[path]).max())


def test_a_step_without_momentum_is_lr_eta_of_the_norm():
    w, g = start(), draws(2)[1]
    tx = lars.make(TABLE, weight_decay=0.0, momentum=0.0, eta=0.5)
    got = layers.run(tx, w, [g], 0.02)
    for path in TABLE:
        for index in pieces(path):
            moved = np.float64(got[path])[index] - w[path][index]
            want = 0.01 * norm(w[path][index]) if path in RATIO else 0.02 * norm(g[path][index])
            # W - lr u is rounded to 6e-8 of W, hence 6e-6 of a step a hundred times smaller.
            assert norm(moved) == pytest.approx(want, rel=1e-5)


def test_norms_of_zero():
    """Without a gradient only the decay moves, by lr eta of the weight; a weight of norm 0 has
    ratio 1."""
    w, g = ({QKV: tree[QKV]} for tree in (start(), draws(2)[1]))
    w[QKV][0], g[QKV][1] = 0.0, 0.0
    for decay, factor in ((0.0, 1.0), (0.1, 0.99)):
        tx = lars.make(TABLE, weight_decay=decay)
        got = layers.run(tx, w, [g], 0.01)[QKV]
        np.testing.assert_allclose(got[0], -0.01 * g[QKV][0], rtol=1e-6)
        np.testing.assert_allclose(got[1], factor * w[QKV][1], rtol=1e-6)


def test_reports_one_ratio_a_matrix():
    w, g = start(), draws(2)[1]
    tx = lars.make(TABLE, weight_decay=0.3, eta=0.5)
    _, reports = layers.trace(tx, w, [g], 0.01)
    assert reports.keys() == {f"{path}/trust_ratio" for path in RATIO}
    for path in RATIO:
        sizes, index = layers.stack(path)
        got = reports[f"{path}/trust_ratio"]
        assert (got.shape, got.dtype) == ((1, *sizes), jnp.float32)
        for place in np.ndindex(sizes):
            x, y = norm(w[path][index(*place)]), norm(g[path][index(*place)])
            assert got[(0, *place)] == pytest.approx(0.5 * x / (y + 0.3 * x), rel=1e-5)


def test_width_and_the_share_of_the_decay():
    """At another width a step is the same sum of gradient and decay / SGD's multiplier."""
    wider = lambda path, i, o: dataclasses.replace(TABLE[path], wider=(i, o))
    assert all(lars.width(entry) == 1.0 for entry in TABLE.values())
    assert lars.width(wider(QKV, 4.0, 4.0)) == 1 / 2  # 1 / sqrt(i): a ratio
    assert lars.width(wider(DOWN, 4.0, 8.0)) == 2  # o / i: SGD
    assert lars.width(wider(NORM, 1.0, 4.0)) == 4
    for path, i, o in ((QKV, 4.0, 8.0), (DOWN, 4.0, 8.0)):
        w, g = (np.float32(draws(1 + k)[k][path]) for k in range(2))
        tx = lars.make({path: wider(path, i, o)}, weight_decay=0.3)
        u = jax.jit(lambda g, w, tx=tx: tx.update(g, tx.init(w), w)[0])({path: g}, {path: w})
        for index in pieces(path):
            x, want = np.float64(u[path])[index], (g + 0.3 / (o / i) * w)[index]
            np.testing.assert_allclose(x / norm(x), want / norm(want), atol=1e-6)  # float32


def test_a_parameter_without_a_declaration_is_named():
    tx, params = lars.make(TABLE, weight_decay=0.0), {"blocks/1/mixer/q": jnp.ones((2, 2))}
    with pytest.raises(KeyError, match="'blocks/1/mixer/q' is not in the table"):
        tx.update(params, tx.init(params), params)
