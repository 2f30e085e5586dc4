"""Attention on TPUs, in Pallas: what it takes, its configuration, its two directions."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, tuning
from pallas_kernels.flash_attention import tpu_backward, tpu_forward
from pallas_kernels.flash_attention.reference import Options
from pallas_kernels.flash_attention.tpu_backward import Backward
from pallas_kernels.flash_attention.tpu_tiles import LANES


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels are cut.

    Attributes:
      T, C: queries and keys a tile. If C divides T, and T divides P and S - L, then of the causal
        diagonal, of a window's far end (if T divides the window too) and of a window of at most T
        only what is seen is computed, but for pieces of D.
      D: queries of a strip, whose scores are one product; divides T and C.
      P: keys in VMEM at a time, a multiple of C; more keys stream by.
      ahead: strips whose scores are asked for before the softmax of the current one.
      backward: how the gradients' kernel is cut; also given as a mapping of its fields.

    Raises:
      ValueError: sizes that the kernel is not made for.
    """

    T: int
    C: int
    D: int
    P: int
    ahead: int
    backward: Backward

    def __post_init__(self):
        if isinstance(self.backward, Mapping):
            object.__setattr__(self, "backward", Backward(**self.backward))
        for name in "TCDP":
            if (size := getattr(self, name)) < 1 or size % LANES:
                raise ValueError(f"{name} {size} is no multiple of {LANES}: choose one.")
        if self.T % self.D or self.C % self.D:
            raise ValueError(f"D {self.D} must divide T {self.T} and C {self.C}: choose a divisor.")
        if self.P % self.C:
            raise ValueError(f"P {self.P} is no multiple of C {self.C}: choose one.")


def forward(q, k, v, q_segments, kv_segments, options: Options):
    """o [B L H V] in q's dtype and lse [B L H] float32, as `reference.forward`.

    Raises:
      NotImplementedError: not a TPU, or a dtype other than bfloat16 and float32.
    """
    _check(q)
    config = _config(q, k, v, q_segments is not None, options)
    return tpu_forward.forward(q, k, v, q_segments, kv_segments, options, config)


def backward(q, k, v, q_segments, kv_segments, o, lse, do, dlse, options: Options):
    """dq, dk, dv for cotangents do [B L H V] and dlse [B L H]; raises as `forward`."""
    _check(q)
    config = _config(q, k, v, q_segments is not None, options).backward
    given = (q, k, v, q_segments, kv_segments, o, lse, do, dlse)
    return tpu_backward.backward(*given, options, config)


def heuristic(q, k, v, packed: bool, options: Options) -> Config:
    """Large tiles, as even as L allows, and as many keys in VMEM as fit in half of it."""
    (L, K), (S, V), size = (q.shape[1], q.shape[3]), (v.shape[1], v.shape[3]), q.dtype.itemsize
    info = pltpu.get_tpu_info()
    wide, large = info.mxu_column_size > LANES, max(K, V) > LANES
    most = 512 if size == 4 else 1024 if packed or (large and not wide) else 2048
    while options.window is not None and options.window > most > 512 and options.window % most:
        most //= 2  # so that the window's far end is that of a tile
    D = 2 * LANES if wide and large and L > LANES else LANES
    T = _multiple(math.ceil(L / math.ceil(L / most)), 2 * D if L > 1024 else D)
    # Few queries, as in decoding, need keys enough that a tile is work.
    C = T // 2 if T > 1024 else T if T >= 512 or L == S else _multiple(min(S, 1024), D)
    unit = _multiple(C, T) if T % C == 0 else C
    key = 2 * (_multiple(K, LANES) + _multiple(V, LANES)) * size  # the next ones are on their way
    fit = max(1, info.vmem_capacity_bytes // 2 // (key * unit))
    P = min(fit, math.ceil(S / unit)) * unit
    ahead = 2 if wide and not large else 1
    return Config(T, C, D, P, ahead, tpu_backward.heuristic(L, S, K, V, q.dtype))


def candidates(spec) -> Iterator[Config]:
    """Configurations of the forward kernel worth trying: other tiles, strips and depths."""
    q, k, v, packed, options = _abstract(spec, None)
    guess = heuristic(q, k, v, packed, options)
    for T, C, D, ahead in itertools.product((512, 1024, 2048), (512, 1024), (128, 256), (0, 1, 2)):
        if guess.T % T == 0 and T % C == 0 and guess.P % T == 0:
            yield dataclasses.replace(guess, T=T, C=C, D=D, ahead=ahead)


def executions(spec, config: Config | None = None) -> dict[str, list[float]]:
    """How often each heavy piece of the kernels' programs runs in one call in bfloat16.

    Args:
      spec: as in `specs`; segments are those of its seed 0.
      config: explicit, or None.

    Returns:
      {kernel: runs of its heavy pieces, in the order of its program, cores together}.
    """
    q, k, v, packed, options = _abstract(spec, config)
    config = _config(q, k, v, packed, options)
    segments = [spec.segments().get(f"{side}_segments") for side in ("q", "kv")]
    runs = tpu_forward.executions(q, k, v, *segments, options, config)
    return {tpu_forward.NAME: runs} | tpu_backward.executions(spec, config.backward)


def _abstract(spec, config: Config | None):
    """q, k, v, whether there are segments, and options of a spec."""
    arrays = {n: jax.ShapeDtypeStruct(*x) for n, x in spec.abstract(jnp.bfloat16).items()}
    scale = arrays["q"].shape[3] ** -0.5
    options = Options(**spec.options, scale=scale, config=config)
    return *(arrays[n] for n in "qkv"), "q_segments" in arrays, options


def _check(q):
    if dispatch.platform() != "tpu":
        raise NotImplementedError(f"pallas_tpu is for a TPU, not a {dispatch.platform()}.")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"pallas_tpu takes bfloat16 and float32, not {q.dtype}.")


def _config(q, k, v, packed: bool, options: Options) -> Config:
    (B, L, H, K), (S, G, V) = q.shape, v.shape[1:]
    key = dict(B=B, L=L, S=S, H=H, G=G, K=K, V=V, causal=options.causal, window=options.window)
    key |= dict(segments=packed, dtype=q.dtype.name)
    key |= dict(first=options.first > 0, softcap=options.softcap is not None)
    guess = lambda: heuristic(q, k, v, packed, options)
    return tuning.choose("flash_attention", "pallas_tpu", key, options.config, guess)


def _multiple(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit
