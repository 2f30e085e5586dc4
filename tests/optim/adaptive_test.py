"""Lion and Adafactor against float64 ones of separate matrices; what Adafactor keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optim import widths
from optim.methods import adafactor, lion
from tests.optim import layers
from tests.optim.layers import DECAYED, TABLE, D, E, F, H, K, N, W, draws, pieces, start

QKV, DOWN, EXPERTS = "blocks/0/mixer/qkv", "blocks/0/ffn/down", "blocks/0/ffn/experts"
# Rows and columns of each of the separate matrices that are factored if large enough.
FLAT = {
    "embed/tokens": (W, D),
    QKV: (D, H * K),
    "blocks/0/mixer/out": (H * K, D),
    "blocks/0/ffn/up": (D, F),
    EXPERTS: (D, F),
    DOWN: (F, D),
    "head/kernel": (D, W),
}


def rms(x):
    return np.sqrt((x**2).mean())


def test_lion_equals_numpy():
    def step(path, index, x):
        m = 0.0
        for g in grads:
            g = g[path][index]
            u = np.sign(0.9 * m + 0.1 * g)
            x = x - 0.01 * (u + 0.3 * x * (path in DECAYED))
            m = 0.99 * m + 0.01 * g
        return x

    w, grads = start(), draws(7)[1:]
    got = layers.run(lion.make(TABLE, weight_decay=0.3), w, grads, 0.01)
    layers.agree(got, layers.oracle(w, step), 1e-6)  # float32, six steps


def oracle(w, grads, lr, wd, *, least=1, relative=True, clip=1.0, momentum=0.0):
    """Algorithms 4 and 5 of the paper; with least 0 no matrix is factored."""

    def step(path, index, x):
        r, c, v, average = 0.0, 0.0, 0.0, 0.0
        rows, columns = FLAT.get(path, (0, 0))
        for t, g in enumerate(grads, 1):
            g, b = g[path][index], 1 - t**-0.8
            if least and min(rows, columns) >= least:
                square = g.reshape(rows, columns) ** 2 + 1e-30
                r = b * r + (1 - b) * square.mean(1)
                c = b * c + (1 - b) * square.mean(0)
                v = (np.outer(r, c) / r.mean()).reshape(x.shape)
            else:
                v = b * v + (1 - b) * (g**2 + 1e-30)
            u = g / np.sqrt(v)
            u = u / max(1, rms(u) / clip) if clip else u
            u = u * max(1e-3, rms(x)) if relative else u
            average = momentum * average + (1 - momentum) * u
            x = x - lr * (average + wd * x * (path in DECAYED))
        return x

    return layers.oracle(w, step)


@pytest.mark.parametrize(
    ("least", "own"),
    [
        (1, {}),
        (D + 1, {"relative": False, "momentum": 0.9}),
        (1, {"clip": None, "momentum": 0.5}),
        (W, {"clip": 0.5, "relative": False}),
    ],
)
def test_adafactor_equals_numpy_on_separate_layers(least, own):
    w, *grads = map(layers.some if own else dict, (start(), *draws(7)[1:]))
    tx = adafactor.make(TABLE, weight_decay=0.3, min_factored=least, **own)
    # float32 state and weights, six steps; t^-0.8 is right to 1e-6.
    layers.agree(
        layers.run(tx, w, grads, 0.01), oracle(w, grads, 0.01, 0.3, least=least, **own), 3e-6
    )


def test_optax_agrees_on_separate_matrices():
    """The library itself, of which every matrix is a leaf of two dimensions, every vector one."""
    paths = (QKV, DOWN, "head/bias")
    w, *grads = ({path: tree[path] for path in paths} for tree in (start(), *draws(4)[1:]))
    apart = lambda tree: {
        f"{p}{i}": np.float32(tree[p][index]).reshape(FLAT.get(p, -1))
        for p in paths
        for i, index in enumerate(pieces(p))
    }
    own = {"min_dim_size_to_factor": 1, "momentum": 0.5}
    theirs = optax.chain(optax.adafactor(None, **own), optax.scale(-1.0))
    want = layers.run(theirs, apart(w), [apart(g) for g in grads], 0.01)
    ours = adafactor.make(TABLE, weight_decay=0.0, min_factored=1, momentum=0.5)
    got = apart(layers.run(ours, w, grads, 0.01))
    for path in want:
        # float32 both, three steps.
        np.testing.assert_allclose(got[path], want[path], atol=1e-6 * np.abs(want[path]).max())


def test_adafactor_keeps_a_row_and_a_column_a_matrix():
    state = jax.eval_shape(adafactor.make(TABLE, weight_decay=0.0, min_factored=1).init, start())
    assert state.rows.keys() == state.columns.keys() == FLAT.keys()
    assert state.whole.keys() == TABLE.keys() - FLAT.keys()
    assert state.momentum == {}
    assert state.rows[QKV].shape == (N, D, 3, 1, 1)
    assert state.columns[QKV].shape == (N, 1, 3, H, K)
    assert state.rows[EXPERTS].shape == (N, E, D, 2, 1)
    assert state.columns[EXPERTS].shape == (N, E, 1, 2, F)


def test_adafactor_factors_large_matrices_only():
    state = jax.eval_shape(
        adafactor.make(TABLE, weight_decay=0.0, min_factored=D + 1).init, start()
    )
    assert state.rows == state.columns == {}
    assert state.whole.keys() == TABLE.keys()


def test_adafactor_sharded_equals_unsharded_where_it_is_factored():
    """Means over what devices hold apart; the state is split as what it is a mean of."""
    rules = {"vocab": "tensor", "embed": "fsdp", "mlp": "tensor", "heads": "tensor"}
    own = {path: TABLE[path] for path in (QKV, DOWN, "embed/tokens")}
    tx = adafactor.make(own, weight_decay=0.1, min_factored=1)
    w, *grads = ({p: np.float32(tree[p]) for p in own} for tree in (start(), *draws(4)[1:]))
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))

    def step(carry, g):
        u, state = tx.update(g, carry[1], carry[0])
        return (jax.tree.map(lambda x, u: x - 0.01 * u, carry[0], u), state), None

    steps = jax.jit(lambda w, grads: jax.lax.scan(step, (w, tx.init(w)), grads)[0])
    grads = jax.tree.map(lambda *g: np.stack(g), *grads)
    want, _ = steps(w, grads)
    with jax.set_mesh(mesh):
        axes = {path: [rules.get(axis) for axis in entry.axes] for path, entry in own.items()}
        over = lambda *first: {p: NamedSharding(mesh, P(*first, *a)) for p, a in axes.items()}
        got, state = steps(jax.device_put(w, over()), jax.device_put(grads, over(None)))
    for path in own:
        # Sums in another order, three steps.
        np.testing.assert_allclose(got[path], want[path], rtol=1e-6, atol=1e-6)
    parts = lambda x: x.sharding.shard_shape(x.shape)
    assert parts(state.rows[QKV]) == (N, D // 4, 3, 1, 1)
    assert parts(state.columns[QKV]) == (N, 1, 3, H // 2, K)


def wider(path, fan_in, fan_out):
    return dataclasses.replace(TABLE[path], wider=(fan_in, fan_out))


def test_widths():
    assert lion.width is widths.elementwise
    assert adafactor.width is widths.relative
    assert lion.width(wider(DOWN, 4.0, 4.0)) == 1 / 4
    assert adafactor.width(wider(DOWN, 4.0, 4.0)) == 1 / 2
    assert adafactor.width(wider("embed/tokens", 1.0, 4.0)) == 1


@pytest.mark.parametrize(("relative", "rate"), [(True, 1 / 2), (False, 1 / 4)])
def test_adafactor_of_an_absolute_rate_has_the_width_of_adam(relative, rate):
    """Whatever `width` supposes, direction times width is right, and the decay is left alone."""
    entry, w, g = wider(QKV, 4.0, 4.0), *(np.float32(draws(2)[i][QKV]) for i in range(2))
    step = {}
    for e in (entry, TABLE[QKV]):
        for decay, grad in ((0.0, g), (0.1, 0 * g)):
            tx = adafactor.make({QKV: e}, weight_decay=decay, relative=relative)
            update = jax.jit(lambda g, w, tx=tx: tx.update({QKV: g}, tx.init({QKV: w}), {QKV: w}))
            step[e.wider, decay] = adafactor.width(e) * update(grad, w)[0][QKV]
    np.testing.assert_allclose(step[(4.0, 4.0), 0.0], rate * step[(1.0, 1.0), 0.0], rtol=1e-6)
    np.testing.assert_allclose(step[(4.0, 4.0), 0.1], 0.1 * w, rtol=1e-6)


@pytest.mark.parametrize("method", [lion, adafactor])
def test_a_parameter_without_a_declaration_is_named(method):
    tx, params = method.make(TABLE, weight_decay=0.1), {"blocks/1/mixer/q": jnp.ones((2, 2))}
    with pytest.raises(KeyError, match="'blocks/1/mixer/q' is not in the table"):
        tx.update(params, tx.init(params), params)
