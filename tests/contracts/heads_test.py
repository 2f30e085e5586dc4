"""What every file in models/heads must hold, tied or not; a new file is tested by being there."""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models.heads
from models.param import Dims, restore, table
from parallel import mesh as meshes
from parallel.fsdp import gather
from parallel.rules import spec

NAMES = sorted(m.name for m in pkgutil.iter_modules(models.heads.__path__))
B, L, D, W = 4, 6, 32, 128


def _cases():
    for name in NAMES:
        module = importlib.import_module(f"models.heads.{name}")
        for i, own in enumerate(({}, *getattr(module, "CASES", ()))):
            for tied in (True, False):
                kind = "tied" if tied else "untied"
                yield pytest.param(module.Head, own | {"tied": tied}, id=f"{name}-{i}-{kind}")


every_case = pytest.mark.parametrize(("head", "own"), list(_cases()))


def _build(head, own):
    dims = Dims(d_model=D, length=L, n_layers=2, base_d_model=D)
    graph, state = nnx.split(nnx.eval_shape(lambda: head(dims, W, rngs=nnx.Rngs(0), **own)))
    entries, rng = table(state), np.random.default_rng(1)
    draw = lambda shape: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)
    params = {path: draw(entry.shape) for path, entry in entries.items()}
    return lambda params: nnx.merge(graph, restore(state, params)), params, entries


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, EMBEDDING = _normal(2, B, L, D), _normal(3, W, D)


@every_case
def test_shape_and_dtype(head, own):
    """Logits are float32 whatever the dtype of the computation: softmax and loss are in float32."""
    build, params, _ = _build(head, own)
    run = jax.jit(lambda params, x, embedding: build(params)(x, embedding))
    exact = run(params, jnp.asarray(X), jnp.asarray(EMBEDDING))
    assert exact.shape == (B, L, W)
    assert exact.dtype == jnp.float32
    rounded = run(params, *(jnp.asarray(a, jnp.bfloat16) for a in (X, EMBEDDING)))
    assert rounded.dtype == jnp.float32
    # Inputs of eight bits, and a few roundings on the way: 5% of the largest logit.
    assert np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()
    # Sums that were rounded to bfloat16 on the way out would be equal to their rounding.
    assert np.any(rounded != rounded.astype(jnp.bfloat16).astype(jnp.float32))


@every_case
def test_works_on_each_position_alone_and_reads_the_embedding_where_tied(head, own):
    build, params, _ = _build(head, own)
    weight = _normal(4, W)
    seen = lambda x, embedding, b, t: jnp.sum(weight * build(params)(x, embedding)[b, t])
    gradients = jax.jit(jax.grad(seen, (0, 1)))
    for b, t in ((0, 0), (3, L - 1)):
        of_x, of_embedding = gradients(jnp.asarray(X), jnp.asarray(EMBEDDING), b, t)
        size = np.abs(of_x).max(-1)
        assert size[b, t] > 0
        assert np.count_nonzero(size) == 1
        assert bool(np.abs(of_embedding).max() > 0) == own["tied"]


@every_case
def test_one_device_equals_eight(head, own):
    build, params, entries = _build(head, own)

    def run(params, x, embedding):
        # The model hands a head weights whose fsdp shards are gathered.
        params, embedding = jax.tree.map(gather, (params, embedding))
        return jnp.sum(jnp.arange(W * 1.0)[None, None] * build(params)(x, embedding) ** 2)

    grads = jax.jit(jax.value_and_grad(run, (0, 1, 2)))
    expected = grads(params, X, jnp.asarray(EMBEDDING))
    with jax.set_mesh(meshes.make(data=2, fsdp=2, tensor=2)):
        put = lambda x, *names: jax.device_put(x, spec(*names))
        placed = {p: put(leaf, *entries[p].axes) for p, leaf in params.items()}
        actual = grads(placed, put(X, "batch", "length", None), put(EMBEDDING, "vocab", "embed"))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # The loss squares sums of 32 products, which doubles their relative rounding.
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-4 * np.abs(e).max())


@every_case
def test_parameter_table_is_complete(head, own):
    _, _, entries = _build(head, own)
    matrices = {path for path, entry in entries.items() if entry.is_matrix}
    of_words = {p for p, e in entries.items() if e.is_matrix and "vocab" in e.weight.axes}
    assert bool(of_words) == (not own["tied"])
    for path, entry in entries.items():
        weight, rank = entry.weight, len(entry.shape)
        roles = (*weight.fan_in, *weight.fan_out, *weight.stack)
        assert len(weight.axes) == rank, path
        if path in matrices:
            assert weight.group == ("head" if "vocab" in weight.axes else "hidden"), path
            assert sorted(roles) == list(range(rank)), path
        if weight.group in ("bias", "norm"):
            assert not weight.decay, path
    # Every dimension as wide as the vocabulary is named so, or it could not be sharded.
    wide = [e.weight.axes[i] for e in entries.values() for i, n in enumerate(e.shape) if n == W]
    assert set(wide) <= {"vocab"}
