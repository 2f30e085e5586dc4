"""Attention over rows of any length, compiled and timed."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from launch.bench import measure
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.linear_attention import linear_attention


class Timed:
    """kind: 'linear' with Hedgehog's maps, or 'softmax'.  passes: 'forward' or 'both'."""

    def __init__(self, kind: str, passes: str, heads: int, size: int, dtype: str):
        self._kind, self._shape, self._dtype = kind, (heads, size), dtype
        self._run = jax.jit(self._linear if kind == "linear" else flash_attention)
        if passes == "both":
            forward = self._run
            total = lambda *x: jnp.sum(forward(*x).astype(jnp.float32))
            self._run = jax.jit(jax.grad(total, argnums=(0, 1, 2)))

    def _linear(self, q, k, v):
        H, K = self._shape
        identity = jnp.broadcast_to(jnp.eye(K, dtype=q.dtype), (H, K, K))
        return linear_attention(q, k, v, features="softmax", q_map=identity, k_map=identity)[0]

    def at(self, length: int) -> Callable[[], float]:
        """Seconds of one call on a row of this length."""
        H, K = self._shape
        draw = np.random.default_rng(0).standard_normal
        q, k, v = (jnp.asarray(draw((1, length, H, K)), self._dtype) for _ in range(3))
        return functools.partial(measure.seconds, lambda: self._run(q, k, v))
