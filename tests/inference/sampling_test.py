"""Sampling against a brute-force distribution in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from inference.sampling import keys, sample, truncate

W = 24
cut = jax.jit(truncate, static_argnames="top_k")


def rows(seed=0, batch=4, width=W):
    return np.random.default_rng(seed).normal(size=(batch, width)).astype(np.float32) * 2


def distribution(row, temperature, top_k=None, top_p=1.0):
    """Probabilities of one row, token by token, by the words of the definition."""
    row = row.astype(np.float64)
    p = np.exp((row - row.max()) / temperature)
    order = np.argsort(-row, kind="stable")
    keep = order[: top_k or len(row)]
    p = np.where(np.isin(np.arange(len(row)), keep), p, 0)
    p /= p.sum()
    if top_p < 1:
        chosen, mass = [], 0.0
        for token in order:
            if mass < top_p or row[token] == row[chosen[-1]]:
                chosen.append(token)
                mass += p[token]
        p = np.where(np.isin(np.arange(len(row)), chosen), p, 0)
    return p / p.sum()


N = 2000


@functools.partial(jax.jit, static_argnames="top_k")
def draw(x, seed, positions, numbers, **own):
    return sample(x, seed, positions, rows=numbers, **own)


def many(row, *, temperature=1.0, top_k=None, top_p=1.0):
    """N draws of one row, at positions 0 to N - 1."""
    x, numbers = np.tile(row, (N, 1)), np.zeros(N, np.int32)
    own = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    return np.asarray(draw(x, 0, np.arange(N), numbers, **own))


CASES = [
    dict(temperature=0.7),
    dict(temperature=1.0, top_k=5),
    dict(temperature=1.3, top_p=0.8),
    dict(temperature=0.5, top_k=5, top_p=0.9),
    dict(temperature=2.0, top_k=5, top_p=0.5),
    dict(temperature=1.0, top_p=1e-6),
]


@pytest.mark.parametrize("own", CASES)
def test_distribution(own):
    x = rows()
    got = np.asarray(jax.nn.softmax(cut(x, **own), -1))
    for row, p in zip(x, got, strict=True):
        want = distribution(row, **own)
        np.testing.assert_array_equal(p > 0, want > 0)
        np.testing.assert_allclose(p, want, rtol=1e-5)  # float32 exponentials and their sum


@pytest.mark.parametrize("own", CASES)
def test_support_of_the_draws(own):
    row = rows(1, 1)[0]
    want = distribution(row, **own)
    drawn = many(row, **own)
    assert set(drawn) <= set(np.flatnonzero(want))
    # A token of 1 % misses all 2000 draws once in 5e8 seeds.
    assert set(np.flatnonzero(want > 0.01)) <= set(drawn)


def test_frequencies():
    row = rows(2, 1)[0]
    want = distribution(row, 1.0, top_k=5)
    got = np.bincount(many(row, top_k=5), minlength=W) / N
    # Five standard deviations of a frequency; the seed is fixed.
    assert np.all(np.abs(got - want) <= 5 * np.sqrt(want * (1 - want) / N))


def test_padded_vocabulary_is_never_drawn():
    row = np.concatenate([rows(3, 1)[0][:5], np.full(W - 5, -np.inf, np.float32)])
    for own in (dict(temperature=0.0), dict(temperature=50.0), dict(top_p=0.999)):
        assert many(row, **own).max() < 5
    assert set(many(row, temperature=50.0)) == set(range(5))


def test_extremes():
    x, zeros = rows(4, N), np.zeros(N, np.int32)
    greedy, defaults = x.argmax(-1), dict(temperature=1.0, top_k=None, top_p=1.0)
    for own in (
        dict(temperature=0.0),
        dict(temperature=1e-30),
        dict(temperature=1e-42),
        dict(temperature=5.0, top_k=1),
        dict(temperature=5.0, top_p=1e-6),
        dict(temperature=0.0, top_k=5, top_p=0.5),
    ):
        np.testing.assert_array_equal(draw(x, 1, zeros, zeros, **defaults | own), greedy)
    assert np.isfinite(cut(x, top_k=10 * W)).all()
    # 1e5 tokens of equal probability: their rounded sum is not 1, and still none is dropped.
    assert np.isfinite(cut(np.zeros((1, 100_003), np.float32), top_p=1.0)).all()
    assert draw(x, 1, zeros, zeros, **defaults).dtype == jnp.int32


def test_ties():
    row = np.array([[0, 3, 1, 3, 3, -1] + [-np.inf] * (W - 6)], np.float32)
    kept = lambda **own: np.flatnonzero(np.isfinite(cut(row, **own)[0])).tolist()
    assert kept(top_p=0.2) == [1, 3, 4]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=2, top_p=0.2) == [1, 3]
    assert set(many(row[0], temperature=0.0)) == {1}
    assert set(many(row[0], temperature=9.0, top_k=1)) == {1}


def test_a_row_does_not_depend_on_its_batch():
    x, number, position = rows(5, 32), np.arange(32) + 100, np.arange(32) % 7
    own = dict(temperature=1.5, top_k=10, top_p=0.95)
    fn = jax.jit(lambda x, n, p: sample(x, 7, p, rows=n, **own))
    at = lambda i: np.asarray(fn(x[i], number[i], position[i]))
    together = at(np.arange(32))
    alone = np.concatenate([at(np.array([i])) for i in range(32)])
    np.testing.assert_array_equal(alone, together)
    shuffled = np.random.default_rng(0).permutation(32)
    np.testing.assert_array_equal(at(shuffled), together[shuffled])


def test_keys_differ_by_seed_row_and_position():
    data = [
        jax.random.key_data(keys(s, jnp.arange(4), jnp.full(4, p))) for s in (0, 1) for p in (0, 1)
    ]
    assert len({tuple(k) for k in np.concatenate(data).tolist()}) == 16


def test_numbers_may_be_traced_and_differ_by_row():
    x, n = rows(6, 8), np.arange(8)
    t = np.array([0, 0.5, 1, 2, 0, 1, 1, 3], np.float32)
    p = np.array([1, 0.5, 0.9, 1, 0.5, 1, 0.1, 0.7], np.float32)
    one = jax.jit(lambda x, s, n, t, p: sample(x, s, n, rows=n, temperature=t, top_k=9, top_p=p))
    got = one(x, np.uint32(3), n, t, p)
    rowwise = [int(one(x[i : i + 1], np.uint32(3), n[i : i + 1], t[i], p[i])[0]) for i in range(8)]
    np.testing.assert_array_equal(got, rowwise)
    assert [int(g) for g in got[t == 0]] == x[t == 0].argmax(-1).tolist()


def test_rows_over_devices():
    x, n = rows(7, 8), np.arange(8)
    own = dict(temperature=0.8, top_k=9, top_p=0.9)
    want = sample(x, 0, n, **own)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "tensor"))):
        put = lambda a, *spec: jax.device_put(a, P(*spec))
        fn = jax.jit(lambda x, n: sample(x, 0, n, **own))
        got = fn(put(x, "data", "tensor"), put(n, "data"))
        assert jax.typeof(got).sharding.spec == P("data")
        np.testing.assert_array_equal(fn(put(x, "data"), put(n)), want)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (dict(temperature=-0.1), "temperature must be finite and at least 0, not -0.1"),
        (dict(temperature=float("nan")), "temperature must be finite"),
        (dict(temperature=np.array([1, np.inf, 1, 1])), "temperature must be finite"),
        (dict(top_p=0.0), r"top_p must lie in \(0, 1\], not 0.0"),
        (dict(top_p=1.1), "top_p must lie"),
        (dict(top_p=np.array([0.5, -1, 1, 1])), "top_p must lie"),
        (dict(top_k=0), "top_k must be at least 1, or None to keep every token, not 0"),
    ],
)
def test_arguments_are_checked(own, words):
    with pytest.raises(ValueError, match=words):
        sample(rows(), 0, jnp.arange(4), **own)
