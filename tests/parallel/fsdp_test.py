"""Gathering a block's weights: `fsdp` goes, everything else stays, the gradient is scattered."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from parallel import mesh as meshes
from parallel.fsdp import gather


def _normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (P("fsdp", "tensor"), P(None, "tensor")),
        (P("tensor", "fsdp"), P("tensor", None)),
        (P(("data", "fsdp"), "tensor"), P("data", "tensor")),
        (P(("data", "fsdp", "tensor"), None), P(("data", "tensor"), None)),
        (P(None, "tensor"), P(None, "tensor")),
        (P("data", None), P("data", None)),
    ],
)
def test_removes_fsdp_and_nothing_else(before, after):
    with jax.set_mesh(meshes.make(data=2, fsdp=2, tensor=2)):
        x = jax.device_put(_normal(8, 8), before)
        y = gather(x)
        assert y.sharding.spec == after
        np.testing.assert_array_equal(x, y)


def test_the_gradient_has_the_weights_sharding():
    w, x = _normal(8, 4), _normal(16, 8)
    loss = lambda w, x: (x @ gather(w) ** 2).sum()
    with jax.set_mesh(meshes.make(data=2, fsdp=2, tensor=2)):
        placed = jax.device_put(w, P("fsdp", "tensor"))
        rows = jax.device_put(x, P(("data", "fsdp"), None))
        gradient = jax.jit(jax.grad(loss))(placed, rows)
        assert gradient.sharding.spec == P("fsdp", "tensor")
    expected = 2 * w.astype(np.float64) * x.astype(np.float64).sum(0)[:, None]
    # Float32 sums of 16 rows in two parts.
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_does_nothing_where_fsdp_is_not_explicit():
    x = jax.numpy.asarray(_normal(2, 2))
    assert gather(x) is x
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        placed = jax.device_put(x, P())
        assert gather(placed) is placed
