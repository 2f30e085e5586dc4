"""Health of routers against explicit lists of choices, counted in float64 by the definitions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from data.batch import Batch
from models.context import of_batch
from parallel import mesh as meshes
from training import health
from training.accumulate import value_and_grad
from training.loss import Loss
from training.program import batch_sharding

VALUES = {"load_max", "load_min", "gini", "dead", "drop_rate", "router_entropy", "router_z"}
# Counts are exact in float32, so what is left are a few roundings of 6e-8 each.
CLOSE = dict(rtol=1e-5, atol=1e-6)
# (metrics, what is left of the totals)
take = jax.jit(lambda totals: (health.take(totals), totals))


def routing(seed, T, E, k, K):
    """(experts of each of T tokens `[T k]`, their domains `[T]`, probabilities `[T E]`)."""
    rng = np.random.default_rng(seed)
    domain = rng.integers(0, K, T)
    logits = rng.normal(size=(K, E))[domain] + rng.normal(size=(T, E))
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return np.argsort(-logits, 1)[:, :k], domain, probability


def sums(chosen, domain, probability, K, dropped=0.0):
    """What a layer reports of these tokens, float64."""
    T, E = probability.shape
    found = {"selected": np.zeros(E), "together": np.zeros((E, E)), "domains": np.zeros((K, E))}
    for t in range(T):
        for e in chosen[t]:
            found["selected"][e] += 1
            found["domains"][domain[t], e] += 1
            for f in chosen[t]:
                found["together"][e, f] += 1
    entropy = -(probability * np.log(probability)).sum()
    own = {"probability": probability.sum(0), "z": 3.5 * T, "entropy": entropy, "dropped": dropped}
    return found | {name: np.asarray(value) for name, value in own.items()}


def totals(tokens, **layers):
    """Of the layers at these paths; a list is of stacked ones."""
    found = {"tokens": jnp.float32(tokens)}
    for path, own in layers.items():
        stacked = isinstance(own, list)
        for name in own[0] if stacked else own:
            value = np.stack([x[name] for x in own]) if stacked else own[name]
            found[f"{path}/{name}"] = jnp.float32(value)
    return found


def expected(chosen, domain, probability, K, dropped=0.0):
    """The definitions, token by token and pair by pair: (metrics, pictures)."""
    T, E = probability.shape
    experts = [set(row.tolist()) for row in chosen]
    count = [sum(e in own for own in experts) for e in range(E)]
    load = [E * c / sum(count) for c in count]
    pairs = sum(abs(a - b) for a, b in itertools.product(count, repeat=2))
    both = lambda e, f: sum(e in own and f in own for own in experts)
    of = lambda k, e: sum(e in own for own, its in zip(experts, domain, strict=True) if its == k)
    joint = np.array([[of(k, e) for e in range(E)] for k in range(K)]) / sum(count)
    information = 0.0
    for k, e in zip(*np.nonzero(joint), strict=True):
        apart = joint[k].sum() * joint[:, e].sum()
        information += joint[k, e] * np.log(joint[k, e] / apart)
    values = {
        "load_max": max(load),
        "load_min": min(load),
        "gini": pairs / (2 * E * sum(count)),
        "dead": count.count(0),
        "drop_rate": dropped / (T * len(chosen[0])),
        "router_entropy": np.mean(-(probability * np.log(probability)).sum(1)),
        "router_z": 3.5,
        "specialisation": information,
    }
    rows = joint.sum(1, keepdims=True)
    pictures = {
        "co_activation": [[both(e, f) / max(count[e], 1) for f in range(E)] for e in range(E)],
        "experts_by_domain": joint / np.where(rows > 0, rows, 1),
    }
    return values, pictures


def check(found, path, values, pictures):
    named = {f"{path}/{name}": value for name, value in values.items()}
    named |= {f"picture/{path}/{name}": value for name, value in pictures.items()}
    for name, value in named.items():
        assert found[name].dtype == jnp.float32, name
        np.testing.assert_allclose(found[name], value, err_msg=name, **CLOSE)
    return named.keys()


@pytest.mark.parametrize(
    ("T", "E", "k", "K"), [(40, 8, 2, 3), (7, 16, 4, 5), (9, 1, 1, 2), (30, 5, 5, 1), (1, 3, 1, 1)]
)
def test_one_layer_is_as_defined(T, E, k, K):
    own = routing(T, T, E, k, K)
    given = totals(T, **{"prefix/0/ffn": sums(*own, K, dropped=3.0)}) | {"nll": jnp.float32(2)}
    found, left = take(given)
    assert found.keys() == check(found, "prefix/0/ffn", *expected(*own, K, dropped=3.0))
    assert left == {"tokens": T, "nll": 2}


def test_stacked_layers_are_each_as_defined_and_paths_are_apart():
    """Of one layer and of two stacked ones, with unlike numbers of experts, at names of no sort."""
    T, K = 25, 2
    layers = [routing(seed, T, 6, 2, K) for seed in range(2)]
    single = routing(7, T, 4, 1, K)
    given = totals(T, tower=[sums(*own, K) for own in layers], **{"a/b": sums(*single, K)})
    given["tower/balance"] = jnp.float32(1)
    found, left = take(given)
    named = check(found, "a/b", *expected(*single, K))
    for layer, own in enumerate(layers):
        of = {name: value[layer] for name, value in found.items() if "tower" in name}
        named |= check(of, "tower", *expected(*own, K))
    assert found.keys() == named
    assert left == {"tokens": T, "tower/balance": 1}
    assert found["tower/gini"].shape == (2,)
    assert found["picture/tower/co_activation"].shape == (2, 6, 6)
    assert found["picture/a/b/experts_by_domain"].shape == (2, 4)


def test_without_the_tap_there_are_no_pictures():
    own = sums(*routing(0, 9, 4, 2, 2), 2)
    del own["together"], own["domains"]
    found, _ = take(totals(9, x=own))
    assert found.keys() == {f"x/{name}" for name in VALUES}


@pytest.mark.parametrize("E", [1, 4])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_a_step_without_a_token_is_all_zeros(E, stack):
    shapes = {"selected": (E,), "probability": (E,), "together": (E, E), "domains": (2, E)}
    given = {f"x/{name}": jnp.zeros((*stack, *shapes.get(name, ()))) for name in health.SUMS}
    found, _ = take(given | {"tokens": jnp.float32(0)})
    assert len(found) == len(VALUES) + 3
    for name, value in found.items():
        np.testing.assert_array_equal(value, np.zeros(value.shape), name)


# Each size is compiled once.
of_size = lambda E: st.lists(st.integers(0, 10**6), min_size=E, max_size=E).filter(any)
counts = st.sampled_from([1, 2, 7]).flatmap(of_size)


def of_counts(selected, domains=None):
    selected = jnp.float32(selected)
    own = {"selected": selected, "probability": selected} | {
        name: jnp.float32(0) for name in ("z", "entropy", "dropped")
    }
    own |= {} if domains is None else {"domains": jnp.float32(domains)}
    found, _ = take({f"x/{name}": x for name, x in own.items()} | {"tokens": jnp.float32(1)})
    return {name.rpartition("/")[2]: np.asarray(value) for name, value in found.items()}


@settings(max_examples=40, deadline=None)
@given(counts, st.randoms(use_true_random=False))
def test_gini_and_loads_are_bounded_and_know_no_order(selected, random):
    E, found = len(selected), of_counts(selected)
    assert -1e-6 <= found["gini"] <= 1 - 1 / E + 1e-6
    assert 0 <= found["load_min"] <= 1 + 1e-6
    assert 1 - 1e-6 <= found["load_max"] <= E * (1 + 1e-6)
    pairs = np.abs(np.subtract.outer(selected, selected)).sum()
    np.testing.assert_allclose(found["gini"], pairs / (2 * E * sum(selected)), **CLOSE)
    again = of_counts(random.sample(selected, E))
    for name, value in found.items():
        np.testing.assert_allclose(again[name], value, err_msg=name, **CLOSE)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(1, 4), (3, 1), (2, 6), (5, 3)]), st.integers(0, 10**6))
def test_specialisation_is_bounded_and_0_where_domains_are_routed_alike(shape, seed):
    (K, E), rng = shape, np.random.default_rng(seed)
    domains = rng.integers(0, 50, (K, E)) * rng.integers(0, 2, (K, E))
    domains[0, 0] += 1
    information = of_counts(domains.sum(0), domains)["specialisation"]
    assert 0 <= information <= np.log(min(K, E)) + 1e-5
    alike = np.outer(domains.sum(1), domains.sum(0))
    # A sum of K E products of 6e-8 each, of which none is above 1.
    assert 0 <= of_counts(alike.sum(0), alike)["specialisation"] < 2e-6


def test_extremes():
    equal, one = of_counts([7.0] * 6), of_counts([0, 0, 5, 0])
    assert (equal["gini"], equal["load_max"], equal["load_min"], equal["dead"]) == (0, 1, 1, 0)
    assert (one["gini"], one["load_max"], one["load_min"], one["dead"]) == (0.75, 4, 0, 3)
    told = of_counts([4, 4, 4], 4 * np.eye(3))
    np.testing.assert_allclose(told["specialisation"], np.log(3), **CLOSE)


def test_counts_beyond_what_float32_counts_singly():
    """As of a step of 4e9 choices; counts themselves are rounded to 6e-8 of their size."""
    selected = np.random.default_rng(0).integers(2**23, 2**25, 256)
    found = of_counts(selected)
    pairs = np.abs(np.subtract.outer(selected, selected)).sum()
    np.testing.assert_allclose(found["gini"], pairs / (2 * 256 * selected.sum()), rtol=1e-5)


def _sums(params, micro, ctx):
    """A token's input has a bit for each expert that it chose, and its weight is its entropy."""
    count = lambda text, *x: jnp.einsum(text, *x, precision="highest", out_sharding=P())
    picked = ((micro.inputs[:, :, None] >> jnp.arange(4)[None, None]) & 1).astype(jnp.float32)
    domain = (micro.domain[:, None] == jnp.arange(3)[None]).astype(jnp.float32)
    valid = ctx.valid.astype(jnp.float32)
    picked = picked * valid[:, :, None]
    own = {
        "selected": jnp.sum(picked, (0, 1)),
        "z": params["w"] * jnp.sum(valid),
        "entropy": params["w"] * jnp.sum(micro.weights),
        "dropped": jnp.float32(0),
        "together": count("ble,blf->ef", picked, picked),
        "domains": count("bk,ble->ke", domain, picked),
    }
    return {"linear": params["w"] * jnp.sum(valid)} | {f"x/{n}": value for n, value in own.items()}


def _finish(totals):
    totals = dict(totals)
    metrics = health.take(totals)
    assert totals.keys() == {"linear", "weight", "tokens"}
    return totals["linear"] / totals["tokens"], metrics


def test_of_micro_batches_and_devices_it_is_that_of_the_whole_step():
    """In a loss that is differentiated; two rows are of padding alone."""
    A, b, L, E, K = 2, 8, 4, 4, 3
    rng = np.random.default_rng(5)
    chosen, _, probability = routing(5, A * b * L, E, 2, K)
    domain, valid = rng.integers(0, K, (A, b)), np.arange(A * b).reshape(A, b) % 8 > 0
    spread = lambda row: np.broadcast_to(row[:, :, None], (A, b, L))
    entropy = -(probability * np.log(probability)).sum(1).reshape(A, b, L)
    segments, mesh = np.int32(spread(valid)), meshes.make(data=8)
    batch = Batch(
        inputs=np.int32((1 << chosen).sum(1)).reshape(A, b, L),
        targets=segments,
        weights=np.float32(entropy * segments),
        segment_ids=segments,
        positions=segments,
        sample=np.zeros((A, b, 2), np.uint32),
        domain=np.int32(domain),
    )
    lay = lambda name, x: jax.device_put(x, batch_sharding(name, mesh, 1))
    batch = Batch(**{name: lay(name, x) for name, x in batch._asdict().items()})
    with jax.set_mesh(mesh):
        context = lambda micro, totals: of_batch(micro, totals=totals)
        run = jax.jit(lambda p, batch: value_and_grad(Loss(_sums, _finish), p, batch, context))
        _, metrics, _, gradient = run({"w": jnp.float32(2)}, batch)
    here, flat = spread(valid).reshape(-1), spread(domain).reshape(-1)
    values, pictures = expected(chosen[here], flat[here], probability[here], K)
    values |= {"router_z": 2.0, "router_entropy": 2 * values["router_entropy"]}
    check(metrics, "x", values, pictures)
    assert gradient["w"] == 1
