"""Counters beyond 32 bits against Python's integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training import state

EDGES = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 3 * 2**32 - 1, 2**53 + 1, 2**64 - 2**33]
STEPS = [0, 1, 2**16, 2**31 - 1]


@pytest.mark.parametrize("start", EDGES)
def test_add_carries(start):
    add = jax.jit(state.add)
    for n in [*STEPS, 2**32 - 1]:
        counter = add(state.pair(start), jnp.uint32(n))
        assert counter.dtype == jnp.uint32
        assert counter.shape == (2,)
        assert state.to_int(counter) == start + n


def test_other_integers():
    for n in STEPS:
        assert state.to_int(state.add(state.pair(2**32 - 1), jnp.int32(n))) == 2**32 - 1 + n
        assert state.to_int(state.add(state.pair(2**32 - 1), np.uint32(n))) == 2**32 - 1 + n
    assert state.to_int(state.add(state.pair(7), 5 * 2**32 + 3)) == 5 * 2**32 + 10


def test_wraps_at_two_to_the_64():
    assert state.to_int(state.add(state.pair(2**64 - 1), 2)) == 1


def test_a_long_run_counts_exactly():
    """2^34 tokens, where float32 would stand still at steps of 1000 tokens."""
    last, _ = jax.lax.scan(
        lambda c, _: (state.add(c, jnp.uint32(2**30 + 1)), None),
        jnp.asarray(state.pair(5)),
        length=17,
    )
    assert state.to_int(last) == 5 + 17 * (2**30 + 1)


@pytest.mark.parametrize("n", EDGES)
def test_round_trip(n):
    assert state.to_int(state.pair(n)) == n
    value = jax.jit(state.to_float)(state.pair(n))
    assert value.dtype == jnp.float32
    # Two roundings to float32: of the low word, and of the sum.
    assert abs(float(value) - n) <= 2.0**-23 * n


def test_errors():
    with pytest.raises(ValueError, match="not -1"):
        state.pair(-1)
    with pytest.raises(ValueError, match="2\\^64"):
        state.pair(2**64)
    with pytest.raises(TypeError, match="not by float32"):
        state.add(state.pair(0), jnp.float32(3))


def test_add_keeps_a_replicated_sharding():
    mesh = jax.make_mesh((8,), ("data",))
    with jax.set_mesh(mesh):
        counter = jax.device_put(state.pair(2**32 - 1), jax.P(None))
        add = jax.jit(lambda counter: state.add(counter, jnp.uint32(1)))
        for _ in range(3):
            counter = add(counter)
        assert counter.sharding.is_fully_replicated
        assert add._cache_size() == 1
        assert state.to_int(counter) == 2**32 + 2
