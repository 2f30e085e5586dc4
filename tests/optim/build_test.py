"""Clip, method, step; the warm-up convention; state layout; errors; AdamW and SGD oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optim.build import build
from parallel.weight import Entry, Weight

TABLE = {
    "head/kernel": Entry(Weight(("embed", "vocab"), (0,), (1,), init=("normal", 1.0)), (4, 6)),
    "head/bias": Entry(Weight(("vocab",), decay=False, group="bias"), (6,)),
}
KEYS = {
    "name": "adamw",
    "lr": 0.1,
    "schedule": "constant",
    "warmup_tokens": None,
    "warmup_fraction": 0.0,
    "clip": None,
    "weight_decay": 0.0,
    "methods": {},
    "schedules": {},
}
STEP = {"tokens": jnp.float32(0), "batch_tokens": jnp.float32(10)}


def made(total=1000.0, **keys):
    return build(TABLE, total, **(KEYS | keys))


def draws(count):
    rng = np.random.default_rng(0)
    return [{k: rng.normal(size=e.shape) for k, e in TABLE.items()} for _ in range(count)]


def as_jax(tree):
    return jax.tree.map(jnp.float32, tree)


def run(tx, params, grads):
    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params, **STEP)
        return (jax.tree.map(jnp.add, params, updates), state), None

    @jax.jit
    def steps(params, grads):
        return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]

    stacked = jax.tree.map(lambda *x: np.float32(np.stack(x)), *grads)
    return steps(jax.tree.map(np.float32, params), stacked)


def agree(got, want):
    for k in want:
        # float32 rounding over eight steps; 1 - 0.95 alone is right to 6e-7 in optax.
        np.testing.assert_allclose(got[k], want[k], atol=2e-6 * np.abs(want[k]).max(), rtol=0)


def test_adamw_equals_numpy():
    w, *grads = draws(9)
    got = run(made(weight_decay=0.1)[0], w, grads)
    m = {k: np.zeros_like(x) for k, x in w.items()}
    v = {k: np.zeros_like(x) for k, x in w.items()}
    for t, g in enumerate(grads, 1):
        for k in w:
            m[k] = 0.9 * m[k] + 0.1 * g[k]
            v[k] = 0.95 * v[k] + 0.05 * g[k] ** 2
            u = m[k] / (1 - 0.9**t) / (np.sqrt(v[k] / (1 - 0.95**t)) + 1e-8)
            w[k] = w[k] - 0.1 * (u + 0.1 * w[k] * (k == "head/kernel"))
    agree(got, w)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_numpy(momentum, nesterov):
    w, *grads = draws(9)
    own = {"sgd": {"momentum": momentum, "nesterov": nesterov}, "adamw": {"b1": 0.5}}
    got = run(made(name="sgd", weight_decay=0.1, methods=own)[0], w, grads)
    m = {k: np.zeros_like(x) for k, x in w.items()}
    for g in grads:
        for k in w:
            m[k] = momentum * m[k] + g[k]
            u = g[k] + momentum * m[k] if nesterov else m[k]
            w[k] = w[k] - 0.1 * (u + 0.1 * w[k] * (k == "head/kernel"))
    agree(got, w)


def test_clip_is_by_the_global_norm():
    w, g = draws(2)
    norm = np.sqrt(sum((x**2).sum() for x in g.values()))
    keys = {"name": "sgd", "lr": 1.0}
    for clip, factor in ((1.0, 1 / norm), (2 * norm, 1.0), (None, 1.0)):
        got = run(made(**keys, clip=clip)[0], w, [g])
        agree(got, {k: w[k] - factor * g[k] for k in w})


def test_the_rate_of_a_step_includes_its_own_tokens():
    """Ten steps of 100 tokens, two of warm-up: the first moves, the last has the final rate."""
    keys = {"name": "sgd", "schedule": "cosine", "warmup_tokens": 200, "lr": 0.5}
    tx, lr_fn = made(**keys)
    w, g = (as_jax(x) for x in draws(2))
    state, steps = tx.init(w), []
    for i in range(10):
        fresh = tx.init(w)
        updates, after = tx.update(g, fresh, w, tokens=jnp.float32(100 * i), batch_tokens=100.0)
        steps.append(-float(updates["head/bias"][0] / g["head/bias"][0]))
        assert jax.tree.structure(after) == jax.tree.structure(state)
    want = [lr_fn(100.0 * i, 100.0) for i in range(10)]
    np.testing.assert_allclose(steps, want, rtol=1e-5)  # float32 against float64
    np.testing.assert_allclose([steps[0], steps[1], steps[-1]], [0.25, 0.5, 0.05], rtol=1e-5)


def test_warmup_fraction_is_of_the_run_and_tokens_win():
    rate = lambda **keys: made(lr=1.0, **keys)[1](0.0, 100.0)
    assert rate(warmup_fraction=0.5) == pytest.approx(0.2)
    assert rate(warmup_fraction=0.5, warmup_tokens=400) == pytest.approx(0.25)
    assert rate(warmup_fraction=0.5, warmup_tokens=0) == 1.0


def test_own_arguments_reach_the_schedule():
    own = {"linear": {"final_ratio": 0.5}, "cosine": {"final_ratio": 0.0}}
    assert made(schedule="linear", schedules=own)[1](900.0, 100.0) == pytest.approx(0.05)


def test_layout_of_the_state_does_not_depend_on_clipping():
    w = as_jax(draws(1)[0])
    off, on = (made(clip=clip)[0].init(w) for clip in (None, 1.0))
    assert jax.tree.structure(off) == jax.tree.structure(on)


def test_only_the_trained_leaves_have_state():
    w = as_jax(draws(1)[0])
    state = made()[0].init({"head/bias": w["head/bias"]})
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * 6 + 1


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"name": "adamv"}, r"optim.name is 'adamv'; .*adamw, lamb, .*Did you mean 'adamw'\?"),
        ({"schedule": "cosin"}, r"optim.schedule is 'cosin'; .*Did you mean 'cosine'\?"),
        ({"schedule": "_ramp"}, "optim.schedule is '_ramp'; it must be one of"),
        ({"schedule": "jax"}, "optim.schedule is 'jax'; it must be one of"),
        ({"clip": 0.0}, "optim.clip is 0.0; give a norm above 0"),
        ({"warmup_fraction": 2000.0}, "optim.warmup_fraction is 2000.0; .*optim.warmup_tokens"),
        ({"warmup_tokens": 5000}, "A warm-up of 5000 tokens .* a run of 1000 tokens"),
        ({"schedule": "wsd", "schedules": {"wsd": {"shape": "x"}}}, "shape is 'x'"),
        ({"name": "lamb", "methods": {"lamb": {"phi_min": 2.0, "phi_max": 1.0}}}, "phi_min 2.0"),
    ],
)
def test_errors_are_sentences(keys, sentence):
    with pytest.raises(ValueError, match=sentence):
        made(**keys)


def test_a_parameter_without_a_declaration_is_named():
    w = {"head/scale": jnp.ones(3)}
    tx, _ = made(weight_decay=0.1)
    with pytest.raises(KeyError, match="'head/scale' is not in the table"):
        tx.update(w, tx.init(w), w, **STEP)
