"""LAMB against a float64 LAMB that knows nothing of stacks: one list of separate layer matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim import widths
from optim.methods import lamb
from tests.optim import layers
from tests.optim.layers import DECAYED, RATIO, TABLE, draws, pieces, start

NORM_10 = {"exclude": "none", "debias": False, "phi_max": 10.0}
VARIANTS = {
    "paper": {},
    "optax": {"exclude": "none"},
    "tensorflow_addons": {"exclude": "undecayed"},
    "cybertronai": NORM_10,
    "nvidia": NORM_10 | {"ratio_eps": 1e-6},
    "deepspeed": {
        "exclude": "none",
        "fold_debias": True,
        "ratio_min": 0.01,
        "ratio_max": 10.0,
        "eps": 1e-8,
    },
}
# Layers in a ratio of 8: norms from 0 to above 10, ratios from below 0.01 to above 10.
SPREAD = 8.0


def run(w, grads, lr, **own):
    return layers.run(lamb.make(TABLE, **({"weight_decay": 0.0} | own)), w, grads, lr)


def norm(x):
    return np.sqrt((x**2).sum())


def published(variant, path, x, m, v, t, wd):
    """The step of one matrix as each of them writes it, of a learning rate of 1."""
    c1, c2, decay = 1 - 0.9**t, 1 - 0.999**t, wd * x * (path in DECAYED)
    quotient = lambda a, u: a / norm(u) if a > 0 and norm(u) > 0 else 1.0
    if variant == "cybertronai":
        u = m / (np.sqrt(v) + 1e-6) + decay
        return quotient(min(norm(x), 10), u) * u
    if variant == "nvidia":
        u = m / (np.sqrt(v) + 1e-6) + decay
        return (min(norm(x), 10) / (norm(u) + 1e-6) if norm(x) > 0 and norm(u) > 0 else 1.0) * u
    if variant == "deepspeed":
        u = m / (np.sqrt(v) + 1e-8) + decay
        both = norm(x) > 0 and norm(u) > 0
        ratio = min(max(norm(x) / norm(u), 0.01), 10) if both else 1.0
        return np.sqrt(c2) / c1 * ratio * u
    u = (m / c1) / (np.sqrt(v / c2) + 1e-6) + decay
    has = {"paper": path in RATIO, "optax": True, "tensorflow_addons": path in DECAYED}
    return u * (quotient(norm(x), u) if has[variant] else 1.0)


def oracle(variant, w, grads, lr, wd):
    def step(path, index, x):
        m, v = 0.0, 0.0
        for t, g in enumerate(grads, 1):
            g = g[path][index]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            x = x - lr * published(variant, path, x, m, v, t, wd)
        return x

    return layers.oracle(w, step)


@pytest.mark.parametrize(("variant", "own"), VARIANTS.items(), ids=VARIANTS)
def test_equals_the_published_variant_on_separate_layers(variant, own):
    w, *grads = map(layers.some if own else dict, (start(SPREAD), *draws(7, SPREAD)[1:]))
    tx = lamb.make(TABLE, weight_decay=0.01, **own)
    got, reports = layers.trace(tx, w, grads, 0.002)
    # float32 state and weights, six steps of a few roundings of 6e-8 each.
    layers.agree(got, oracle(variant, w, grads, 0.002, 0.01), 1e-6)
    # Bounds that are not reached could do nothing.
    assert max(norm(w[path][index]) for path in w for index in pieces(path)) > own.get("phi_max", 0)
    ratios = np.concatenate([x.ravel() for x in reports.values()])
    assert "ratio_max" not in own or {np.float32(0.01), np.float32(10)} <= set(ratios)


def test_the_epsilon_of_the_ratio_counts():
    w, *grads = ({"head/kernel": tree["head/kernel"]} for tree in (start(), *draws(2)[1:]))
    plain, with_eps = (run(w, grads, 0.01, ratio_eps=e)["head/kernel"] for e in (0.0, 1.0))
    # At the first step u is the gradient's sign.
    size = np.sqrt(w["head/kernel"].size)
    moved = [norm(np.float64(x) - w["head/kernel"]) for x in (plain, with_eps)]
    assert moved[1] / moved[0] == pytest.approx(size / (size + 1), rel=1e-4)


def test_phi_bounds_the_norm_from_below_too():
    w, *grads = map(layers.some, (start(), *draws(2)[1:]))
    got = run(w, grads, 0.01, phi_min=100.0, eps=1e-20)
    for path in RATIO & w.keys():
        for index in pieces(path):
            moved = norm(np.float64(got[path])[index] - w[path][index])
            assert moved == pytest.approx(0.01 * 100, rel=1e-5)  # float32


def test_optax_agrees_on_separate_layers():
    """The library itself, of which every matrix is a leaf."""
    paths = ("blocks/0/mixer/qkv", "blocks/0/mixer/k_norm", "head/bias")
    w, *grads = ({path: tree[path] for path in paths} for tree in (start(), *draws(4)[1:]))
    apart = lambda tree: {
        f"{p}{i}": np.float32(tree[p][index]) for p in paths for i, index in enumerate(pieces(p))
    }
    decayed = {f"{p}{i}": p in DECAYED for p in paths for i, _ in enumerate(pieces(p))}
    theirs = optax.lamb(1.0, weight_decay=0.1, mask=decayed)  # with the learning rate's sign
    negative = optax.chain(theirs, optax.scale(-1.0))
    want = layers.run(negative, apart(w), [apart(g) for g in grads], 0.01)
    got = apart(run(w, grads, 0.01, weight_decay=0.1, exclude="none"))
    for path in want:
        # float32 both, and optax's 1 - 0.999 is right to 1.4e-5, of which a step has half.
        np.testing.assert_allclose(got[path], want[path], atol=1e-5 * np.abs(want[path]).max())


def test_reports_one_ratio_a_matrix():
    w, grads = start(), draws(2)[1:]
    tx = lamb.make(TABLE, weight_decay=0.0, eps=1e-20, debias=False)
    _, reports = layers.trace(tx, w, grads, 0.01)
    assert reports.keys() == {f"{path}/trust_ratio" for path in RATIO}
    for path in RATIO:
        sizes, index = layers.stack(path)
        got = reports[f"{path}/trust_ratio"]
        assert (got.shape, got.dtype) == ((1, *sizes), jnp.float32)
        for place in np.ndindex(sizes):
            x = w[path][index(*place)]
            # u is 0.1 / sqrt(0.001) times the gradient's sign.
            want = norm(x) / np.sqrt(x.size * 10)
            assert got[(0, *place)] == pytest.approx(want, rel=1e-5)  # float32


def test_only_a_dict_is_reported_to():
    tx, w = lamb.make(TABLE, weight_decay=0.0), jax.tree.map(np.float32, start())
    update = lambda w: tx.update(w, tx.init(w), w, report=None, tokens=0.0)[0]
    assert jax.eval_shape(update, w).keys() == TABLE.keys()


def wider(path, fan_in, fan_out):
    return dataclasses.replace(TABLE[path], wider=(fan_in, fan_out))


def test_width():
    assert all(lamb.width(entry) == 1.0 for entry in TABLE.values())
    assert lamb.width(wider("blocks/0/mixer/qkv", 4.0, 4.0)) == 1 / 2  # 1 / sqrt(i): a ratio
    assert lamb.width(wider("blocks/0/ffn/down", 4.0, 4.0)) == 1 / 4  # 1 / i: starts at zero
    assert lamb.width(wider("blocks/0/norm/scale", 1.0, 4.0)) == 1.0
    assert lamb.width(wider("embed/tokens", 1.0, 4.0)) == 1.0


@pytest.mark.parametrize(("exclude", "rate"), [("declared", 1 / 4), ("none", 1 / 2)])
def test_width_of_a_weight_that_starts_at_zero_follows_its_ratio(exclude, rate):
    """Whatever `width` supposes, direction times width is right."""
    path = "blocks/0/ffn/down"
    entry, w, g = wider(path, 4.0, 4.0), draws(1)[0][path], draws(2)[1][path]
    step = {}
    for e in (entry, TABLE[path]):
        tx = lamb.make({path: e}, weight_decay=0.0, exclude=exclude)
        params = {path: jnp.float32(w)}
        u, _ = tx.update({path: jnp.float32(g)}, tx.init(params), params)
        step[e.wider] = lamb.width(e) * u[path]
    np.testing.assert_allclose(step[4.0, 4.0], rate * step[1.0, 1.0], rtol=1e-6)


def test_width_leaves_the_decay_its_share():
    """u is Adam's step at 1 / i and the same decay, up to the ratio."""
    path = "blocks/0/mixer/qkv"
    entry, w, g = wider(path, 4.0, 4.0), draws(1)[0][path], draws(2)[1][path]
    params = {path: jnp.float32(w)}
    tx = lamb.make({path: entry}, weight_decay=0.1, eps=1e-20)
    u, _ = tx.update({path: jnp.float32(g)}, tx.init(params), params)
    want = np.sign(g) * widths.elementwise(entry) + 0.1 * w
    for index in pieces(path):
        x = np.float64(u[path])[index]
        # Of one direction, float32.
        np.testing.assert_allclose(x / norm(x), want[index] / norm(want[index]), atol=1e-6)


def test_a_weight_of_norm_zero_has_ratio_one():
    w, g = map(layers.some, (start(), draws(2)[1]))
    w["embed/tokens"][:] = 0.0
    g["blocks/0/mixer/qkv"][1] = 0.0
    got = run(w, [g], 0.01)
    np.testing.assert_allclose(got["embed/tokens"], -0.01 * np.sign(g["embed/tokens"]), rtol=1e-4)
    np.testing.assert_array_equal(got["blocks/0/mixer/qkv"][1], w["blocks/0/mixer/qkv"][1])


def test_the_scale_of_the_gradient_does_not_matter():
    few = lambda tree: {path: tree[path] for path in ("blocks/0/mixer/qkv", "blocks/0/ffn/down")}
    w, *grads = map(few, (start(), *draws(4)[1:]))
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
            assert norm(moved) / norm(w[path][index]) == pytest.approx(lr, rel=1e-5)


def test_a_zero_initialised_matrix_grows_like_adam():
    path = "blocks/0/ffn/down"
    w, g = ({path: tree[path]} for tree in (start(), draws(2)[1]))
    got = run(w, [g] * 100, 1e-3, eps=1e-20)[path]
    # The same gradient again and again: Adam moves every element by lr a step.
    np.testing.assert_allclose(np.abs(got), 0.1, rtol=1e-3)


def test_a_parameter_without_a_declaration_is_named():
    tx = lamb.make(TABLE, weight_decay=0.0)
    params = {"blocks/1/mixer/q": jnp.ones((2, 2))}
    with pytest.raises(KeyError, match="'blocks/1/mixer/q' is not in the table"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"phi_min": 2.0, "phi_max": 1.0}, "phi_min 2.0 is above phi_max 1.0"),
        ({"ratio_min": 2.0, "ratio_max": 1.0}, "ratio_min 2.0 is above ratio_max 1.0"),
        ({"exclude": "all"}, "exclude is 'all'; it must be one of declared, undecayed, none"),
        ({"fold_debias": True, "debias": False}, "fold_debias says where"),
    ],
)
def test_errors_are_sentences(own, sentence):
    with pytest.raises(ValueError, match=sentence):
        lamb.make(TABLE, weight_decay=0.0, **own)
