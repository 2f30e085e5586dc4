"""Log-likelihood, counts and cross-entropy against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.batch import Batch
from models.context import of_batch
from training.loss import at_least_some, counts, log_likelihood
from training.losses import cross_entropy

B, L, W, REAL = 3, 5, 16, 11
RNG = np.random.default_rng(0)
# Large logits: a softmax without its maximum subtracted would overflow.
LOGITS = np.where(np.arange(W) < REAL, 30.0 * RNG.normal(size=(B, L, W)) + 200.0, -np.inf)
TARGETS = RNG.integers(0, REAL, (B, L), dtype=np.int32)
WEIGHTS = RNG.choice([0.0, 1.0, 2.5], (B, L)).astype(np.float32)
SEGMENTS = np.array([[1, 1, 2, 2, 0], [1] * 5, [0] * 5], np.int32)


def _oracle():
    top = LOGITS.max(-1, keepdims=True)
    log_z = np.log(np.exp(LOGITS - top).sum(-1)) + top[..., 0]
    return np.take_along_axis(LOGITS, TARGETS[..., None], -1)[..., 0] - log_z, log_z


def test_log_likelihood():
    log_p, log_z = jax.jit(log_likelihood)(jnp.float32(LOGITS), jnp.asarray(TARGETS))
    expected_p, expected_z = _oracle()
    # Logits of size 300 have steps of 3e-5 in float32.
    np.testing.assert_allclose(log_p, expected_p, rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(log_z, expected_z, rtol=1e-6)


def test_log_likelihoods_gradient():
    """d log p / d logits = one-hot - softmax, 0 where the vocabulary is padded."""
    total = lambda logits: jnp.sum(log_likelihood(logits, jnp.asarray(TARGETS))[0])
    gradient = jax.jit(jax.grad(total))(jnp.float32(LOGITS))
    softmax = np.exp(LOGITS - _oracle()[1][..., None])
    np.testing.assert_allclose(gradient, np.eye(W)[TARGETS] - softmax, rtol=0, atol=1e-4)
    assert np.all(gradient[:, :, REAL:] == 0)


@pytest.mark.parametrize("z", [0.0, 1e-3])
def test_cross_entropy(z):
    zeros = np.zeros((B, L), np.int32)
    sample, domain = np.zeros((B, 2), np.uint32), np.zeros(B, np.int32)
    batch = Batch(zeros, TARGETS, WEIGHTS, SEGMENTS, zeros, sample, domain)
    batch = jax.tree.map(jnp.asarray, batch)
    size = {"blocks/0/mixer/size": jnp.float32([18.0, 9.0])}
    loss = cross_entropy.make(lambda params, inputs, ctx: (jnp.float32(LOGITS), size), z=z)
    run = jax.jit(lambda: loss.finish(counts(batch) | loss.sums({}, batch, of_batch(batch))))
    scalar, metrics = run()
    log_p, log_z = _oracle()
    nll, squared = ((WEIGHTS * x).sum() / WEIGHTS.sum() for x in (-log_p, log_z**2))
    np.testing.assert_allclose(scalar, nll + z * squared, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"], nll, rtol=1e-5)
    np.testing.assert_allclose(metrics["log_z_squared"], squared, rtol=1e-5)
    # Layers' sums are reported a valid token, of which there are nine.
    np.testing.assert_allclose(metrics["blocks/0/mixer/size"], [2.0, 1.0], rtol=1e-6)
    assert loss.needs == ()


def test_denominators_of_nothing():
    assert [float(at_least_some(jnp.float32(n))) for n in (0.0, 0.25, 7.0)] == [1.0, 0.25, 7.0]
