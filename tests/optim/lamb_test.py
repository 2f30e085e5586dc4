"""LAMB against a float64 LAMB that knows nothing of stacks: one list of separate layer matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optim.methods import lamb
from parallel.weight import Entry, Weight

N, D, H, K, F, E, W = 3, 8, 2, 4, 16, 2, 10
NORMAL = ("normal", 0.1)
TABLE = {
    "embed/tokens": Entry(Weight(("vocab", "embed"), init=NORMAL, group="embed"), (W, D)),
    "blocks/0/mixer/qkv": Entry(
        Weight(("embed", None, "heads", "kv"), stack=(1,), init=NORMAL), (N, D, 3, H, K)
    ),
    "blocks/0/ffn/experts": Entry(
        Weight(("expert", "embed", "mlp"), stack=(0,), init=NORMAL), (N, E, D, F)
    ),
    "blocks/0/ffn/down": Entry(Weight(("mlp", "embed"), init=("zeros",)), (N, F, D)),
    "blocks/0/norm/scale": Entry(
        Weight(("embed",), init=("ones",), decay=False, group="norm"), (N, D)
    ),
    "blocks/0/mixer/k_norm": Entry(
        Weight(("heads", "kv"), init=("ones",), decay=False, group="norm"), (N, H, K)
    ),
    "head/bias": Entry(Weight(("vocab",), decay=False, group="bias"), (W,)),
}
RATIO = {"embed/tokens", "blocks/0/mixer/qkv", "blocks/0/ffn/experts"}
DECAYED = RATIO | {"blocks/0/ffn/down"}


def pieces(path):
    """Indices of the separate matrices, written out by hand for each leaf of TABLE."""
    if path == "blocks/0/mixer/qkv":
        return [(i, slice(None), j) for i in range(N) for j in range(3)]
    if path == "blocks/0/ffn/experts":
        return [(i, e) for i in range(N) for e in range(E)]
    return [(i,) for i in range(N)] if path.startswith("blocks") else [()]


def oracle(w, grads, lr, wd, eps=1e-6, debias=True, phi=lambda z: z):
    """Algorithm 2 of the paper on one matrix at a time. Returns the final weights."""
    w = {path: x.copy() for path, x in w.items()}
    for path in w:
        for index in pieces(path):
            x, m, v = w[path][index].copy(), 0.0, 0.0
            for t, g in enumerate(grads, 1):
                g = g[path][index]
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                c1, c2 = (1 - 0.9**t, 1 - 0.999**t) if debias else (1, 1)
                u = (m / c1) / (np.sqrt(v / c2) + eps) + wd * x * (path in DECAYED)
                a, b = np.sqrt((x**2).sum()), np.sqrt((u**2).sum())
                x = x - lr * u * (phi(a) / b if path in RATIO and a > 0 and b > 0 else 1.0)
            w[path][index] = x
    return w


def draws(count):
    rng = np.random.default_rng(1)
    # Layers of very different size: one ratio for the stack would be far off.
    scale = lambda e: 2.0 ** np.arange(N).reshape(N, *[1] * (len(e.shape) - 1)) if e.layers else 1
    one = lambda: {
        p: np.float64(np.float32(rng.normal(size=e.shape) * scale(e))) for p, e in TABLE.items()
    }
    return [one() for _ in range(count)]


def start():
    w = draws(1)[0]
    for path, entry in TABLE.items():
        if entry.weight.init[0] != "normal":
            w[path] = np.full(entry.shape, float(entry.weight.init[0] == "ones"))
    return w


def run(w, grads, lr, **own):
    tx = lamb.make(TABLE, **({"weight_decay": 0.0} | own))
    single = lambda *trees: jax.tree.map(lambda *x: np.float32(np.stack(x)), *trees)

    def step(carry, g):
        params, state = carry
        u, state = tx.update(g, state, params)
        return (jax.tree.map(lambda x, u: x - lr * u, params, u), state), None

    @jax.jit
    def steps(params, grads):
        return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]

    return steps(jax.tree.map(np.float32, w), single(*grads))


@pytest.mark.parametrize(("debias", "clipped"), [(True, False), (False, True)])
def test_equals_lamb_on_separate_layers(debias, clipped):
    w, grads = start(), draws(7)[1:]
    own = {"phi_min": 0.5, "phi_max": 3.0} if clipped else {}
    phi = (lambda z: min(max(z, 0.5), 3.0)) if clipped else (lambda z: z)
    got = run(w, grads, 0.01, weight_decay=0.1, debias=debias, **own)
    want = oracle(w, grads, 0.01, 0.1, debias=debias, phi=phi)
    for path in want:
        for index in pieces(path):
            a, b = np.float64(got[path])[index], want[path][index]
            # float32 state and weights, six steps of a few roundings of 6e-8 each.
            assert np.abs(a - b).max() < 1e-6 * np.abs(b).max(), path


def test_a_weight_of_norm_zero_has_ratio_one():
    w, g = start(), draws(2)[1]
    w["embed/tokens"][:] = 0.0
    g["blocks/0/mixer/qkv"][1] = 0.0
    got = run(w, [g], 0.01)
    np.testing.assert_allclose(got["embed/tokens"], -0.01 * np.sign(g["embed/tokens"]), rtol=1e-4)
    np.testing.assert_array_equal(got["blocks/0/mixer/qkv"][1], w["blocks/0/mixer/qkv"][1])


def test_the_scale_of_the_gradient_does_not_matter():
    w, grads = start(), draws(4)[1:]
    scaled = [{p: 1000 * x for p, x in g.items()} for g in grads]
    one, other = run(w, grads, 0.01, eps=1e-20), run(w, scaled, 0.01, eps=1e-20)
    for path in w:
        np.testing.assert_allclose(one[path], other[path], rtol=1e-5, atol=1e-6)  # float32


def test_each_matrix_moves_by_lr_of_its_norm():
    w, g = start(), draws(2)[1]
    got, lr = run(w, [g], 0.01), 0.01
    for path in RATIO:
        for index in pieces(path):
            moved = np.float64(got[path])[index] - w[path][index]
            # W - lr u is rounded to 6e-8 of W, hence 6e-6 of a step a hundred times smaller.
            share = np.linalg.norm(moved) / np.linalg.norm(w[path][index])
            assert share == pytest.approx(lr, rel=1e-5)


def test_a_zero_initialised_matrix_grows_like_adam():
    w = start()
    g = [draws(2)[1]] * 100
    got = run(w, g, 1e-3, eps=1e-20)["blocks/0/ffn/down"]
    # The same gradient again and again: Adam moves every element by lr a step.
    np.testing.assert_allclose(np.abs(got), 0.1, rtol=1e-3)


def test_a_parameter_without_a_declaration_is_named():
    tx = lamb.make(TABLE, weight_decay=0.0)
    params = {"blocks/1/mixer/q": jnp.ones((2, 2))}
    with pytest.raises(KeyError, match="'blocks/1/mixer/q' is not in the table"):
        tx.update(params, tx.init(params), params)
