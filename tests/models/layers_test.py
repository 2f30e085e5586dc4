"""Norms, rotary positions and activations against float64 numpy; dropout's mask and its keys."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data.batch import to_words
from models.context import Context
from models.ffns.gelu import FFN as Gelu
from models.layers import Norm, add_bias, dropout, like, rope, rope_frequencies
from models.param import Dims
from parallel import mesh as meshes
from parallel.rules import spec

# Float32 arithmetic on numbers of size one: a few roundings of 6e-8.
ROUNDING = 2e-6


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norm(kind, eps):
    # A mean far from zero: the variance must not be computed as a difference of large numbers.
    x, scale, bias = 10.0 + _normal(0, 2, 3, 8), _normal(1, 8), _normal(2, 8)
    norm = Norm(8, rngs=nnx.Rngs(0), kind=kind, eps=eps)
    norm.scale = norm.scale.replace(jnp.asarray(scale, jnp.float32))
    if kind == "layernorm":
        norm.bias = norm.bias.replace(jnp.asarray(bias, jnp.float32))
        centred = x - x.mean(-1, keepdims=True)
        expected = centred / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias
    else:
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale
        assert norm.bias is None
    actual = jax.jit(norm.__call__)(jnp.asarray(x, jnp.float32))
    # The mean of 10 rounds at 1e-6, which the layer norm keeps.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_norm_computes_in_float32_and_returns_its_inputs_dtype():
    x = (300.0 * jnp.ones((1, 256))).astype(jnp.float16)  # squares beyond float16
    y = jax.jit(Norm(256, rngs=nnx.Rngs(0)).__call__)(x)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y, 1.0, rtol=1e-3)
    with pytest.raises(ValueError, match="'batchnorm' is unknown; known: rmsnorm, layernorm"):
        Norm(4, rngs=nnx.Rngs(0), kind="batchnorm")


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu(approximate):
    x = np.linspace(-4, 4, 33)[None, None]
    if approximate == "tanh":
        expected = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    else:
        expected = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    dims = Dims(d_model=4, length=4, n_layers=1, base_d_model=4)
    ffn = Gelu(dims, rngs=nnx.Rngs(0), approximate=approximate)
    actual = jax.jit(ffn.activate)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ROUNDING)


def test_bias_broadcasts_over_leading_dimensions_only():
    x, b = jnp.zeros((2, 3, 4, 5), jnp.bfloat16), nnx.Param(jnp.arange(20.0).reshape(4, 5))
    y = add_bias(x, b)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, np.broadcast_to(b[...], x.shape))
    assert add_bias(x, None) is x
    assert like(jnp.ones(3), jnp.ones((2, 2, 3))).shape == (1, 1, 3)


class TestRope:
    K, LENGTH = 16, 24

    def _rotate(self, x, at, **scaling):
        freq = rope_frequencies(self.K, 100.0, **scaling)
        x = jnp.asarray(x, jnp.float32)[None, :, None]
        return np.asarray(jax.jit(rope)(x, jnp.asarray(at)[None], freq))[0, :, 0]

    def test_is_a_complex_rotation(self):
        """Dimension i and i + K/2 are a complex number, turned by position * base^(-2i/K)."""
        x, at = _normal(0, self.LENGTH, self.K), np.arange(self.LENGTH, dtype=np.int32) * 7
        z = x[:, : self.K // 2] + 1j * x[:, self.K // 2 :]
        theta = 100.0 ** (-2 * np.arange(self.K // 2) / self.K)
        z = z * np.exp(1j * at[:, None] * theta)
        expected = np.concatenate([z.real, z.imag], -1)
        # Angles up to 161 radians have an error of 161 * 6e-8 in float32.
        np.testing.assert_allclose(self._rotate(x, at), expected, rtol=0, atol=1e-4)

    def test_products_depend_on_the_distance_alone(self):
        q, k = _normal(0, 1, self.K), _normal(1, 1, self.K)
        place = lambda x, at: self._rotate(np.repeat(x, len(at), 0), np.asarray(at, np.int32))
        starts = np.array([0, 3, 50])
        scores = np.sum(place(q, starts + 5) * place(k, starts), -1)
        np.testing.assert_allclose(scores, scores[0], rtol=0, atol=1e-4)
        assert abs(np.sum(place(q, [6]) * place(k, [0])) - scores[0]) > 1e-2

    def test_linear_scaling_stretches_positions(self):
        x, at = _normal(0, self.LENGTH, self.K), np.arange(self.LENGTH, dtype=np.int32)
        stretched = self._rotate(x, at * 4, scaling="linear", factor=4.0)
        np.testing.assert_allclose(stretched, self._rotate(x, at), rtol=0, atol=1e-4)

    def test_llama3_scaling(self):
        """As Meta's model.py has it: by wavelength, with its low and high factors 1 and 4."""
        width, base, factor, original = 64, 500_000.0, 32.0, 8192
        expected = []
        for freq in base ** (-np.arange(0, width, 2) / width):
            wavelength = 2 * math.pi / freq
            if wavelength < original / 4:
                expected.append(freq)
            elif wavelength > original:
                expected.append(freq / factor)
            else:
                smooth = (original / wavelength - 1) / (4 - 1)
                expected.append((1 - smooth) * freq / factor + smooth * freq)
        kinds = np.array(expected) * base ** (np.arange(0, width, 2) / width)
        assert {1.0, 1 / factor} <= set(kinds.round(9))  # all three branches are met
        assert np.any((kinds < 0.99) & (kinds > 1.01 / factor))
        actual = rope_frequencies(width, base, "llama3", factor, original)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)

    def test_unknown_scaling(self):
        with pytest.raises(ValueError, match="'yarn' is unknown; known: none, linear, llama3"):
            rope_frequencies(8, 1e4, "yarn")


@functools.partial(jax.jit, static_argnums=(4, 5))
def _dropped(x, words, layer, seed, salt, rate):
    at = jnp.zeros(x.shape[:2], jnp.int32, out_sharding=spec("batch", None))
    key = jax.random.key(seed)
    return dropout(x, rate, Context(at, at, sample=words, key=key, layer=layer, train=True), salt)


class TestDropout:
    B, L, D, RATE = 8, 6, 16, 0.3
    ROWS = np.array([0, 1, 5, 2**32 - 1, 2**32, 2**32 + 1, 2**40, 7], np.uint64)

    def _mask(self, rows, *, seed=0, layer=3, salt=0, x=None):
        x = jnp.ones((len(rows), self.L, self.D)) if x is None else x
        words = jax.device_put(to_words(rows), spec("batch", None))
        return np.asarray(_dropped(x, words, jnp.int32(layer), jnp.uint32(seed), salt, self.RATE))

    def test_depends_on_the_row_and_not_on_its_place(self):
        whole = self._mask(self.ROWS)
        order = np.array([3, 0, 7, 2, 1, 5, 6, 4])
        np.testing.assert_array_equal(self._mask(self.ROWS[order]), whole[order])
        strangers = np.arange(20, 28, dtype=np.uint64)
        strangers[5] = self.ROWS[4]
        np.testing.assert_array_equal(self._mask(strangers)[5], whole[4])
        flat = whole.reshape(self.B, -1) > 0
        assert all(np.any(flat[i] != flat[j]) for i in range(self.B) for j in range(i))

    def test_depends_on_run_layer_and_salt(self):
        masks = [
            self._mask(self.ROWS, **changed)
            for changed in ({}, {"seed": 1}, {"layer": 4}, {"salt": 1})
        ]
        assert all(np.any(masks[i] != masks[j]) for i in range(4) for j in range(i))

    def test_eight_devices_drop_the_same(self):
        expected = self._mask(self.ROWS)
        with jax.set_mesh(meshes.make(data=4, fsdp=2)):
            x = jax.device_put(np.ones((self.B, self.L, self.D), np.float32), spec("batch"))
            np.testing.assert_array_equal(self._mask(self.ROWS, x=x), expected)

    def test_rate_and_scale(self):
        rows = np.arange(800, dtype=np.uint64).reshape(100, 8)
        kept = np.concatenate([self._mask(part) for part in rows]) > 0
        np.testing.assert_allclose(self._mask(self.ROWS).max(), 1 / (1 - self.RATE), rtol=1e-6)
        # Four standard deviations of a share of n Bernoulli draws.
        spread = 4 * math.sqrt(self.RATE * (1 - self.RATE) / kept.size)
        assert abs(kept.mean() - (1 - self.RATE)) < spread

    def test_keeps_the_dtype(self):
        assert self._mask(self.ROWS, x=jnp.ones((8, 6, 16), jnp.bfloat16)).dtype == jnp.bfloat16

    def test_is_the_identity_outside_of_training(self):
        at = jnp.zeros((2, 3), jnp.int32)
        x = jnp.ones((2, 3, 4))
        assert dropout(x, 0.5, Context(at, at, train=False), 0) is x
        assert dropout(x, 0.0, Context(at, at, train=True), 0) is x
        with pytest.raises(ValueError, match=r"needs ctx\.key and ctx\.sample"):
            dropout(x, 0.5, Context(at, at, train=True), 0)
