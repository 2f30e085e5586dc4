"""What is computed under names, wherever it is, and nothing else changed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.named import named
from parallel.observed import observed

ROWS = np.float32(np.arange(12).reshape(4, 3))


@jax.custom_vjp
def half(x):
    return 0.5 * x


half.defvjp(lambda x: (half(x), None), lambda _, g: (0.5 * g,))


def everywhere(x):
    def layer(x, row):
        inner = jax.checkpoint(lambda x: jnp.tanh(named(x + row, "sum", None)))
        return half(inner(x)), 2 * x

    x = jax.jit(lambda x: named(3 * x, "first", None))(x)
    last, doubled = jax.lax.scan(layer, x, ROWS)
    back, _ = jax.lax.scan(layer, x, ROWS[:2], reverse=True)
    twice = lambda x: jax.lax.scan(lambda x, _: layer(x, x), x, None, length=2)[0]
    deep, _ = jax.lax.scan(lambda x, _: (twice(x), None), x, None, length=2)
    return {"last": named(last, "last", None), "doubled": doubled, "rest": back + deep}


def by_hand(x):
    """The values of 'sum' in their order: forward, backward, and two loops of two."""
    sums, start = [], 3 * x
    for rows in (ROWS, ROWS[1::-1], (None,) * 4):
        y = start
        for row in rows:
            sums.append(y + (y if row is None else row))
            y = np.tanh(sums[-1]) / 2
    return sums


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit], ids=["eager", "jit"])
def test_values_in_their_order_and_the_output_of_the_function(wrap):
    x = jnp.float32([0.1, -0.2, 0.3])
    out, found = wrap(observed(everywhere))(x)
    # Fused or not, float32 is rounded in other places, seven times over.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, out, everywhere(x))
    assert set(found) == {"first", "sum", "last"}
    np.testing.assert_array_equal(found["first"], [3 * x])
    np.testing.assert_array_equal(found["last"], [out["last"]])
    expected = by_hand(np.float32(x))
    assert len(found["sum"]) == len(expected) == 10
    close(found["sum"], expected)


def test_what_cannot_be_followed_is_said():
    branch = lambda x: jax.lax.cond(x[0] > 0, lambda x: named(x, "here", None), jnp.sin, x)
    with pytest.raises(NotImplementedError, match="named values inside of cond"):
        observed(branch)(jnp.ones(2))
