"""Tokens before each piece of a row, from one piece or several, against padding the whole row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from parallel import mesh as meshes
from parallel.halo import halo
from parallel.manual import manual
from parallel.rules import spec
from tests.hlo import collectives

B, L, D = 2, 24, 4
RNG = np.random.default_rng(0)
X, Y = (RNG.standard_normal((B, L, D), np.float32) for _ in range(2))


def sums(width):
    """own times the sum of the `width` tokens before it and itself, by halo."""

    def op(own, extended):
        length = own.shape[1]
        return own * sum(extended[:, i : i + length] for i in range(width + 1))

    return halo(op, width)


def exact(width):
    wide = np.pad(np.float64(Y), [(0, 0), (width, 0), (0, 0)])
    return X * sum(wide[:, i : i + L] for i in range(width + 1))


def put(x, mesh):
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec("batch", "length", None)))


# Within a piece, exactly one, some, all, and more tokens than there are.
@pytest.mark.parametrize("width", [1, 3, 6, 7, 12, 17, 24, 40])
@pytest.mark.parametrize("sizes", [{}, dict(context=4), dict(data=2, context=4), dict(context=8)])
def test_pieces_see_what_whole_rows_see(width, sizes):
    n = int(np.prod(list(sizes.values()), dtype=int))
    mesh = meshes.make(jax.devices()[:n], **sizes or {"data": 1})
    loss = lambda x, y: jnp.sum(jnp.sin(sums(width)(x, y)))
    whole = jax.jit(jax.grad(loss, (0, 1)))(X, Y)
    with jax.set_mesh(mesh):
        x, y = put(X, mesh), put(Y, mesh)
        found = jax.jit(sums(width))(x, y)
        gradients = jax.jit(jax.grad(loss, (0, 1)))(x, y)
    # Products and sums of up to 41 float32 terms of order 1.
    close = dict(rtol=0, atol=1e-4)
    np.testing.assert_allclose(found, exact(width), **close)
    for a, b in zip(gradients, whole, strict=True):
        np.testing.assert_allclose(a, b, **close)
        assert a.sharding.is_equivalent_to(x.sharding, 3) or n == 1


def test_what_is_sent_does_not_grow_with_the_row():
    mesh, bytes_of = meshes.make(jax.devices()[:4], context=4), {}
    with jax.set_mesh(mesh):
        for length in (64, 256):
            x = jax.ShapeDtypeStruct((1, length, D), jnp.float32)
            x = jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=jax.NamedSharding(mesh, P(None, "context"))
            )
            text = jax.jit(sums(5)).lower(x, x).compile().as_text()
            bytes_of[length] = sum(op.bytes for op in collectives(text))
    assert bytes_of[64] == bytes_of[256] == 5 * D * 4


def test_inside_a_region_of_its_own_axis():
    mesh = meshes.make(jax.devices()[:4], context=4)
    rows = P(None, "context")
    with jax.set_mesh(mesh):
        run = manual(sums(9), "context", (rows, rows), rows, check=False)
        found = jax.jit(run)(put(X, mesh), put(Y, mesh))
    np.testing.assert_allclose(found, exact(9), rtol=0, atol=1e-4)
