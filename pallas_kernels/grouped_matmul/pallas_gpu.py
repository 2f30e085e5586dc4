"""Grouped products on Hopper GPUs, in Mosaic GPU: what they take, configuration, both ways."""

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping

import jax.numpy as jnp

from pallas_kernels import dispatch, tuning
from pallas_kernels.flash_attention import gpu_tiles
from pallas_kernels.grouped_matmul import gpu_rows, gpu_weights
from pallas_kernels.grouped_matmul.gpu_cut import Cut


@dataclasses.dataclass(frozen=True)
class Config:
    """How the three kernels are cut, each also given as a mapping of its fields.

    Attributes:
      forward: of y, tiles [block_m rows, block_n of N].
      inputs: of dx, tiles [block_m rows, block_n of K].
      weights: of dw, tiles [block_m of K, block_n of N].
    """

    forward: Cut | Mapping = dataclasses.field(default_factory=Cut)
    inputs: Cut | Mapping = dataclasses.field(default_factory=Cut)
    weights: Cut | Mapping = dataclasses.field(default_factory=Cut)

    def __post_init__(self):
        for name, cut in vars(self).items():
            if isinstance(cut, Mapping):
                object.__setattr__(self, name, Cut(**cut))


def forward(x, w, sizes, config: Config | None = None):
    """y [M N] of x [M K], w [G K N] and sizes [G], in x's dtype, as `reference.forward`.

    Raises:
      NotImplementedError: not a Hopper GPU, not a 16-bit dtype, or nothing to multiply.
    """
    _check(x, w)
    (M, _), N = x.shape, w.shape[2]
    cut = _config(x, w, config).forward
    x, w = _pad(x), _pad(w, rows=64)
    return gpu_rows.product(x, w, sizes, cut, False, "grouped_matmul_forward")[:M, :N]


def backward(x, w, sizes, dy, config: Config | None = None):
    """dx [M K] and dw [G K N] of the cotangent dy [M N], in the dtype of x; raises as `forward`."""
    _check(x, w)
    M, K, N = *x.shape, w.shape[2]
    config = _config(x, w, config)
    x, dy, w = _pad(x), _pad(dy.astype(x.dtype)), _pad(w, rows=64)
    name = "grouped_matmul_backward_inputs"
    dx = gpu_rows.product(dy, w, sizes, config.inputs, True, name)
    dw = gpu_weights.product(x, dy, sizes, config.weights)
    return dx[:M, :K], dw[:, :K, :N]


def heuristic(K: int, N: int) -> Config:
    """A configuration for matrices [K N]: the widest tiles that they fill, as many as fit."""
    narrow = {64: Cut(block_n=64, stages=8, pieces=1), 128: Cut(block_n=128, stages=6)}
    cut = lambda width: next((cut for n, cut in narrow.items() if width <= n), Cut())
    return Config(forward=cut(N), inputs=cut(K), weights=cut(N))


def candidates(spec) -> list[Config]:
    """Configurations to try on a device, whatever the spec: the kernels cut alike."""
    del spec
    tiles = (128, 256), (256, 128), (128, 128)
    rings = (3, 2), (3, 4), (4, 1), (4, 2), (6, 2)
    found = []
    for (rows, columns), (stages, pieces), panel in itertools.product(tiles, rings, (8, 16, 32)):
        with contextlib.suppress(ValueError):  # it does not fit, or not the columns
            found.append(Config(*[Cut(rows, columns, stages, pieces, panel)] * 3))
    return found


def _check(x, w):
    if dispatch.platform() != "gpu":
        raise NotImplementedError(f"The Hopper kernel does not run on a {dispatch.platform()}.")
    if not gpu_tiles.HOPPER.search(dispatch.device_kind()):
        raise NotImplementedError(
            f"The Hopper kernel needs compute capability 9.0, which a {dispatch.device_kind()} "
            f"does not have."
        )
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"Tensor cores multiply bfloat16 or float16 at full rate, not {x.dtype}: cast x and w, "
            f"or use the implementation 'xla'."
        )
    if 0 in (*x.shape, *w.shape):
        raise NotImplementedError(f"The Hopper kernel needs rows: x {x.shape}, w {w.shape}.")


def _pad(x, rows: int = 8):
    """x [.. M K] with zeros behind, up to multiples of `rows` rows and 64 columns.

    Shared memory's tiles are copied whole.
    """
    below, behind = -x.shape[-2] % rows, -x.shape[-1] % 64
    widths = [(0, 0)] * (x.ndim - 2) + [(0, below), (0, behind)]
    return jnp.pad(x, widths) if below or behind else x


def _config(x, w, config: Config | None) -> Config:
    G, K, N = w.shape
    key = dict(M=x.shape[0], K=K, N=N, G=G, dtype=x.dtype.name)
    guess = lambda: heuristic(K, N)
    return tuning.choose("grouped_matmul", "pallas_gpu", key, config, guess)
