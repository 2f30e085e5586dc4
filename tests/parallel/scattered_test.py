"""A gradient in parts is the whole one, in order, whatever else splits its dimension."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from parallel import mesh as meshes
from parallel.manual import manual
from parallel.scattered import Stacked, land, part, scatter, scattered, total
from parallel.zero import SHARDS, beside

SPEC = P("fsdp", "tensor")
# Small integers, so that float32 sums are exact in any order.
X = np.random.default_rng(0).integers(-4, 5, (8, 16, 8)).astype(np.float32)
W = np.random.default_rng(1).integers(-2, 3, (3, 16, 8)).astype(np.float32)
MESHES = ({"data": 2, "fsdp": 2, "tensor": 2}, {"replica": 2, "data": 4}, {"data": 8})


def _run(fn, w, spec, lead):
    """fn(w, rows of X) -> the part of a gradient, over the shards of rows, as one whole array."""
    held = beside(spec, lead)
    region = manual(
        lambda w, x: total(fn(w, x), ("replica",))[None],
        SHARDS,
        (P(), P(SHARDS)),
        P("data"),
        check=False,
    )
    rows = jax.device_put(X, P(SHARDS))
    got = jax.jit(lambda w, x: land(region(w, x), spec, held))(jax.device_put(w, spec), rows)
    assert got.sharding.spec == held
    return np.asarray(got)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("sizes", MESHES)
def test_the_gradient_of_rows_everywhere(sizes, dim):
    def gradient(w, x):
        zeros = part(w, dim)
        loss = lambda p: jnp.sum(x * scattered(dim - 2, w, p)[None])
        found = jax.grad(loss)(zeros)
        assert found.shape == zeros.shape
        return found

    with jax.set_mesh(meshes.make(**sizes)):
        np.testing.assert_array_equal(_run(gradient, W[0], SPEC, dim), X.sum(0))
        by_hand = lambda w, x: scatter(jax.reshard(jnp.sum(x, 0), SPEC), dim)
        np.testing.assert_array_equal(_run(by_hand, W[0], SPEC, dim), X.sum(0))


@pytest.mark.parametrize("remat", [False, True])
def test_a_stack_is_scattered_layer_by_layer(remat):
    """sum over rows of x * w_0 * w_1 * w_2, whose gradient by one layer is x times the others."""

    def gradient(w, x):
        layer = lambda y, w: (y * w[...][None], None)
        body = jax.checkpoint(layer) if remat else layer
        y = jax.reshard(x, P(None, *SPEC))
        loss = lambda p: jnp.sum(jax.lax.scan(body, y, Stacked(w, p, -2))[0])
        return jax.grad(loss)(part(w, 1))

    with jax.set_mesh(meshes.make(**MESHES[0])):
        found = _run(gradient, W, P(None, *SPEC), 1)
    expected = np.stack([X.sum(0) * np.prod(np.delete(W, i, 0), 0) for i in range(3)])
    np.testing.assert_array_equal(found, expected)


def test_reading_gives_the_value():
    with jax.set_mesh(meshes.make(data=8)):
        read = lambda w: Stacked(w, jnp.zeros((3, 2, 8)), -2)[...]
        np.testing.assert_array_equal(jax.jit(read)(W), W)
        np.testing.assert_array_equal(jax.jit(lambda w: Stacked(w, w, -2)[1])(W), W[1])
