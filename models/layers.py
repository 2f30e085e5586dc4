"""Small pieces that several layers share: norms, rotary positions, biases, dropout."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.context import Context
from models.param import Dims, param
from parallel.named import named


class Norm(nnx.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm (1607.06450) over the last dimension, in float32."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, kind: str = "rmsnorm", eps: float = 1e-6):
        if kind not in ("rmsnorm", "layernorm"):
            raise ValueError(f"norm {kind!r} is unknown; known: rmsnorm, layernorm")
        self.eps = eps
        vector = dict(axes=(None,), decay=False, group="norm")
        self.scale = param(rngs, (width,), init=("ones",), **vector)
        self.bias = param(rngs, (width,), **vector) if kind == "layernorm" else None

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... K"]:
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        y = y * like(self.scale[...], y)
        if self.bias is not None:
            y = y + like(self.bias[...], y)
        return y.astype(x.dtype)


class TwoLayer(nnx.Module):
    """y = activate(x W_up + b) W_down + b; a feed-forward file says which `activate`."""

    def __init__(self, dims: Dims, *, rngs: nnx.Rngs, width: int | None, bias: bool):
        D, F = dims.d_model, width or 4 * dims.d_model
        fans = dict(fan_in=(0,), fan_out=(1,))
        self.up = param(rngs, (D, F), ("embed", "ffn"), init=dims.normal(D), **fans)
        down = dims.normal(F, residual=True)
        self.down = param(rngs, (F, D), ("ffn", "embed"), init=down, **fans)
        vector = dict(decay=False, group="bias")
        self.up_bias = param(rngs, (F,), ("ffn",), **vector) if bias else None
        self.down_bias = param(rngs, (D,), (None,), **vector) if bias else None

    def activate(self, h: Float[Array, "B L F"]) -> Float[Array, "B L F"]:
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "B L D"], ctx: Context
    ) -> tuple[Float[Array, "B L D"], dict]:
        h = add_bias(jnp.einsum("bld,df->blf", x, self.up[...].astype(x.dtype)), self.up_bias)
        down = self.down[...].astype(x.dtype)
        h = named(self.activate(h), "ffn_hidden", "batch", "length", "ffn")
        y = jnp.einsum("blf,fd->bld", h, down, out_sharding=ctx.stream)
        return add_bias(y, self.down_bias), {}


def like(b: Array, x: Array) -> Array:
    """b with leading dimensions of size 1, so that it broadcasts against x in b's own dtype."""
    return b.reshape((1,) * (x.ndim - b.ndim) + b.shape)


def add_bias(x: Array, bias: nnx.Param | None) -> Array:
    """x plus a bias over its last dimensions, cast to x's dtype; x itself where there is none."""
    return x if bias is None else x + like(bias[...], x).astype(x.dtype)


def dropout(
    x: Float[Array, "B L D"], rate: float, ctx: Context, salt: int
) -> Float[Array, "B L D"]:
    """x with elements dropped by a mask that depends on (run, row number, layer, salt) alone.

    Neither the device nor the micro-batch a row sits in changes its mask (arXiv 1207.0580).
    """
    if rate == 0.0 or not ctx.train:
        return x
    if ctx.key is None or ctx.sample is None:
        raise ValueError("dropout needs ctx.key and ctx.sample in training")
    key = jax.random.fold_in(ctx.key, salt)
    key = key if ctx.layer is None else jax.random.fold_in(key, ctx.layer)
    kept = jax.vmap(lambda row: _row_mask(key, row, x.shape[1:], rate))(ctx.sample)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def _row_mask(key: Array, row: Array, shape: tuple[int, ...], rate: float) -> Array:
    key = jax.random.fold_in(jax.random.fold_in(key, row[0]), row[1])
    return jax.random.bernoulli(key, 1 - rate, shape)


def rope_frequencies(
    width: int, base: float, scaling: str = "none", factor: float = 1.0, original_length: int = 8192
) -> Float[Array, "half"]:
    """Angular frequencies of rotary positions, radians a token (RoFormer, arXiv 2104.09864).

    scaling: 'none'; 'linear' divides all by factor (arXiv 2306.15595); 'llama3' leaves wavelengths
    under original_length / 4, divides those over original_length, and blends between (Llama 3.1).
    """
    freq = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if scaling == "none":
        return freq
    if scaling == "linear":
        return freq / factor
    if scaling == "llama3":
        turns = original_length * freq / (2 * math.pi)
        blend = jnp.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
        return freq * (blend + (1 - blend) / factor)
    raise ValueError(f"rope_scaling {scaling!r} is unknown; known: none, linear, llama3")


def rope(
    x: Float[Array, "B L H K"], positions: Int[Array, "B L"], freq: Float[Array, "half"]
) -> Float[Array, "B L H K"]:
    """x rotated by its positions; dimension i is paired with i + K/2 (GPT-NeoX's order)."""
    angle = positions[:, :, None, None].astype(jnp.float32) * freq[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
