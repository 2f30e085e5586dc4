"""Routes and what is summed of them, against loops over tokens and experts in float64 numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.routing import ROUTERS, route
from parallel import mesh as meshes
from parallel.rules import spec
from tests.models.built import context, packed

B, L, E, K, G = 4, 16, 6, 3, 2
KINDS = [(r, k) for r in ROUTERS for k in (1, 2, 3) if (r, k) != ("topk_softmax", 1)]
SCALE = 2.5
# Exponentials and sums of six float32 numbers.
CLOSE = dict(rtol=1e-5, atol=1e-6)

every_kind = pytest.mark.parametrize(("router", "k"), KINDS)
seeds = st.integers(0, 2**16)
# Documents of a row; what they leave of it is padding.
layouts = st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=B, max_size=B)
examples = settings(max_examples=8, deadline=None)


@functools.cache
def compiled(router, k, capacity=None):
    def run(logits, bias, segments, group, domain):
        own = dict(taps=("routing",), domains=K, groups=G, group=group, domain=domain)
        ctx = context(segments, jnp.zeros_like(segments), **own)
        return route(logits, bias, ctx, router=router, top_k=k, scale=SCALE, capacity=capacity)

    return jax.jit(run)


def drawn(seed, layout=((9, 4), (16,), (3, 3, 3), ())):
    """Logits, bias, segments, groups and domains."""
    rng = np.random.default_rng(seed)
    segments = packed(layout, L)[0]
    logits = np.float32(2 * rng.normal(size=(B, L, E)))
    bias = np.float32(0.3 * rng.normal(size=E))
    group = rng.integers(0, G, (B, L)).astype(np.int32)
    return logits, bias, segments, group, rng.integers(0, K, B).astype(np.int32)


def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()


def scored(logits, router):
    """Of a token's logits."""
    return 1 / (1 + np.exp(-logits)) if router == "sigmoid" else softmax(logits)


def gated(logits, chosen, router):
    if router == "topk_softmax":
        return SCALE * softmax(logits[chosen])
    scores = scored(logits, router)[chosen]
    whole = router == "sigmoid" and len(chosen) > 1
    return SCALE * scores / (scores.sum() if whole else 1)


def one(logits, bias, router, k):
    """A token's (chosen, gates, distribution over all experts)."""
    scores = scored(logits, router)
    chosen = np.argsort(-(scores + bias))[:k]
    return chosen, gated(logits, chosen, router), scores / scores.sum()


def expected(router, k, logits, bias, segments, group, domain, capacity=math.inf):
    """(chosen, gates, sums), token by token; an expert of a row takes the first `capacity`."""
    chosen, gates = np.full((B, L, k), E), np.zeros((B, L, k))
    sums = {name: 0.0 for name in ("z", "entropy", "dropped")}
    sums |= {"selected": np.zeros(E), "probability": np.zeros(E), "together": np.zeros((E, E))}
    by_group = {f"group_{name}": np.zeros((G, E)) for name in ("selected", "probability")}
    sums |= {"domains": np.zeros((K, E))} | by_group
    for b in range(B):
        taken = np.zeros(E)
        for t in np.flatnonzero(segments[b]):
            own, weights, p = one(logits[b, t].astype(np.float64), bias, router, k)
            at = group[b, t]
            sums["probability"] += p
            sums["group_probability"][at] += p
            sums["z"] += np.log(np.exp(logits[b, t].astype(np.float64)).sum()) ** 2
            sums["entropy"] -= (p * np.log(p)).sum()
            for i, e in enumerate(own):
                sums["selected"][e] += 1
                sums["group_selected"][at, e] += 1
                sums["domains"][domain[b], e] += 1
                sums["together"][e, own] += 1
                sums["dropped"] += taken[e] >= capacity
                if taken[e] < capacity:
                    chosen[b, t, i], gates[b, t, i] = e, weights[i]
                taken[e] += 1
    return chosen, gates, sums


@every_kind
@pytest.mark.parametrize("capacity", [None, 2])
@examples
@given(seed=seeds, layout=layouts)
def test_it_is_what_a_loop_over_tokens_gives(router, k, capacity, seed, layout):
    arrays = drawn(seed, layout)
    routed, sums = compiled(router, k, capacity)(*arrays)
    chosen, gates, known = expected(router, k, *arrays, capacity=capacity or math.inf)
    np.testing.assert_array_equal(routed.chosen, chosen)
    np.testing.assert_allclose(routed.gates, gates, **CLOSE)
    assert routed.gates.dtype == jnp.float32
    assert sums.keys() == known.keys()
    for name, value in known.items():
        assert sums[name].dtype == jnp.float32
        np.testing.assert_allclose(sums[name], value, err_msg=name, **CLOSE)


@every_kind
@examples
@given(seed=seeds, layout=layouts)
def test_sums_add_up(router, k, seed, layout):
    arrays = drawn(seed, layout)
    _, sums = compiled(router, k)(*arrays)
    sums = jax.tree.map(np.asarray, sums)
    valid, selected = np.count_nonzero(arrays[2]), sums["selected"]
    assert selected.sum() == k * valid
    np.testing.assert_allclose(sums["probability"].sum(), valid, rtol=1e-5)
    assert -1e-4 <= sums["entropy"] <= valid * math.log(E) * (1 + 1e-6)
    assert sums["dropped"] == 0
    np.testing.assert_array_equal(sums["together"], sums["together"].T)
    np.testing.assert_array_equal(np.diag(sums["together"]), selected)
    np.testing.assert_array_equal(sums["together"].sum(1), k * selected)
    np.testing.assert_array_equal(sums["domains"].sum(0), selected)
    np.testing.assert_array_equal(sums["group_selected"].sum(0), selected)
    np.testing.assert_allclose(sums["group_probability"].sum(0), sums["probability"], **CLOSE)


@pytest.mark.parametrize("router", ROUTERS)
def test_the_extremes_of_entropy(router):
    logits, bias, *rest = drawn(0)
    valid = np.count_nonzero(rest[0])
    even = compiled(router, 2)(0 * logits, bias, *rest)[1]["entropy"]
    np.testing.assert_allclose(even, valid * math.log(E), rtol=1e-5)
    sure = np.full_like(logits, -80.0)
    sure[..., 3] = 80.0
    assert 0 <= compiled(router, 2)(sure, bias, *rest)[1]["entropy"] < 1e-3


@every_kind
@examples
@given(seed=seeds)
def test_a_bias_changes_the_choice_and_never_a_gate(router, k, seed):
    logits, bias, segments, *rest = drawn(seed)
    push = bias + np.float32(2.0 * (np.arange(E) == seed % E))
    routed, _ = compiled(router, k)(logits, push, segments, *rest)
    chosen, gates = map(np.asarray, routed)
    for b, t in np.argwhere(segments):
        assert seed % E in chosen[b, t]
        known = gated(logits[b, t].astype(np.float64), chosen[b, t], router)
        np.testing.assert_allclose(gates[b, t], known, **CLOSE)


@pytest.mark.parametrize("router", ROUTERS)
def test_no_gradient_goes_to_the_choice(router):
    """Neither to the bias nor through counts; padding has none at all."""
    arrays = drawn(1)
    rng = np.random.default_rng(2)

    def read(logits, bias):
        (_, gates), sums = compiled(router, 2)(logits, bias, *arrays[2:])
        counted = ("selected", "dropped", "together", "domains", "group_selected", "entropy")
        parts = [sums[name] for name in counted]
        weigh = lambda x: jnp.sum(np.float32(rng.normal(size=x.shape)) * x)
        return sum(map(weigh, parts)), weigh(gates) + weigh(sums["probability"]) + sums["z"]

    counts = jax.grad(lambda *a: read(*a)[0], (0, 1))(*arrays[:2])
    assert all(np.all(np.asarray(g) == 0) for g in counts)
    rest, bias = jax.grad(lambda *a: read(*a)[1], (0, 1))(*arrays[:2])
    assert np.all(np.asarray(bias) == 0)
    read_of = np.any(np.asarray(rest) != 0, -1)
    np.testing.assert_array_equal(read_of, arrays[2] > 0)


@pytest.mark.parametrize("router", ROUTERS)
@examples
@given(seed=seeds, t=st.integers(0, L - 2), row=st.integers(0, B - 1))
def test_what_is_dropped_depends_on_what_comes_before_in_the_row(router, seed, t, row):
    """Later tokens and other rows may be anything, and the tokens before lose nothing by it."""
    run = compiled(router, 2, 2)
    arrays, others = drawn(seed, [[L]] * B), drawn(seed + 1, [[3, 5]] * B)
    before = np.zeros((B, L), bool)
    before[row, : t + 1] = True
    mixed = [np.where(before[..., None], arrays[0], others[0]), arrays[1]]
    mixed += [np.where(before, x, y) for x, y in zip(arrays[2:4], others[2:4], strict=True)]
    (one, _), (two, _) = run(*arrays), run(*mixed, arrays[4])
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[before], np.asarray(b)[before])


@pytest.mark.parametrize("seed", range(3))
def test_a_capacity_of_a_whole_row_drops_nothing(seed):
    """Also where all tokens want the same experts; one place less loses exactly their last ones."""
    logits, bias, *rest = drawn(seed, [[L]] * B)
    logits[..., 1] += 50
    rest = [0 * bias, *rest]
    whole, sums = compiled("topk_softmax", 2, L)(logits, *rest)
    free, _ = compiled("topk_softmax", 2)(logits, *rest)
    assert sums["dropped"] == 0
    jax.tree.map(np.testing.assert_array_equal, whole, free)
    less, sums = compiled("topk_softmax", 2, L - 1)(logits, *rest)
    assert sums["dropped"] == B
    np.testing.assert_array_equal(np.asarray(less.chosen)[:, -1] == E, whole.chosen[:, -1] == 1)


@pytest.mark.parametrize("sizes", [dict(context=4, expert=2), dict(data=2, context=2, expert=2)])
@pytest.mark.parametrize("capacity", [None, 3])
def test_one_device_equals_eight(sizes, capacity):
    arrays = drawn(3)
    run = lambda: compiled.__wrapped__("sigmoid", 3, capacity)
    routed, sums = run()(*arrays)
    assert (sums["dropped"] > 0) == (capacity is not None)
    axes = ("batch", "length", None), (None,), ("batch", "length"), ("batch", "length"), ("batch",)
    with jax.set_mesh(meshes.make(**sizes)):
        placed = [jax.device_put(x, spec(*names)) for x, names in zip(arrays, axes, strict=True)]
        split, totals = run()(*placed)
        assert all(x.sharding.spec == spec("batch", "length", None) for x in split)
    np.testing.assert_array_equal(split.chosen, routed.chosen)
    np.testing.assert_array_equal(split.gates, routed.gates)
    for name, value in sums.items():
        np.testing.assert_allclose(totals[name], value, err_msg=name, **CLOSE)
    for name in ("selected", "dropped", "together", "domains", "group_selected"):
        np.testing.assert_array_equal(totals[name], sums[name])
