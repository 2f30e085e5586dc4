"""Linear attention on TPUs, in Pallas: what it takes, its configuration, its two directions."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, tuning
from pallas_kernels.linear_attention import tpu_backward, tpu_forward, tpu_tiles
from pallas_kernels.linear_attention.reference import Arrays, Options
from pallas_kernels.linear_attention.tpu_backward import Backward
from pallas_kernels.linear_attention.tpu_tiles import LANES, whole

# Chunks of 128 queries a step: more hide the ends of a step, and take longer to compile.
PIECES = 16
MOST_QUERIES = 8  # heads of them a step


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels are cut.

    Attributes:
      T: tokens a step of the grid, a multiple of C.
      C: tokens a chunk, a multiple of 128, inside of which all queries meet all keys.
      heads: key heads a step; divides their number.
      R: query heads a step of each of them; divides their number, and is it unless heads is 1.
        With less, the key head's state is summed up more than once.
      backward: how the gradients' kernels are cut; also given as a mapping of its fields.

    Raises:
      ValueError: sizes that the kernel is not made for.
    """

    T: int
    C: int
    heads: int
    R: int
    backward: Backward

    def __post_init__(self):
        if isinstance(self.backward, Mapping):
            object.__setattr__(self, "backward", Backward(**self.backward))
        if self.C < 1 or self.C % LANES:
            raise ValueError(f"C {self.C} is no multiple of {LANES}: choose one.")
        if self.T < 1 or self.T % self.C:
            raise ValueError(f"T {self.T} is no multiple of C {self.C}: choose one.")
        if self.heads < 1 or self.R < 1:
            raise ValueError(f"heads {self.heads} and R {self.R} must be positive: choose such.")


def forward(arrays: Arrays, options: Options):
    """o, total, values and keys, as `reference.forward`.

    Raises:
      NotImplementedError: not a TPU, a dtype other than bfloat16 and float32, or 'taylor'.
      ValueError: the config's heads do not divide those that there are.
    """
    return tpu_forward.forward(arrays, options, _config(arrays, options))


def backward(arrays: Arrays, o, total, do, dtotal, dvalues, dkeys, options: Options):
    """Gradients of `arrays.differentiable`, None for what is None; raises as `forward`."""
    given = (arrays, o, total, do, dtotal, dvalues, dkeys, options)
    return tpu_backward.backward(*given, _config(arrays, options).backward)


def heuristic(arrays: Arrays, options: Options) -> Config:
    """Chunks as the matrix unit is wide, and steps of as many as hide a step's ends."""
    (L, H, K), (G, V), size = arrays.q.shape[1:], arrays.v.shape[2:], arrays.q.dtype.itemsize
    info, F = pltpu.get_tpu_info(), _features(arrays, options)
    C = min(info.mxu_column_size, whole(L, LANES))
    R = max(r for r in range(1, MOST_QUERIES + 1) if H // G % r == 0)
    heads = 2 if H == G and G % 2 == 0 else 1
    # q, o, k, v, twice for the copies on their way, features, and the compiler's own.
    wide = whole(K, LANES) + whole(V, LANES)
    token = heads * (R + 1) * (2 * wide + 2 * F) * size
    fit = info.vmem_capacity_bytes // 2 // (token * C)
    pieces = PIECES if size == 2 else PIECES // 4
    most, chunks = max(1, min(pieces * LANES // C // (heads * R), fit)), math.ceil(L / C)
    T = math.ceil(chunks / math.ceil(chunks / most)) * C
    return Config(T, C, heads, R, tpu_backward.heuristic(L, H // G, K, V, F, arrays.q.dtype))


def candidates(spec) -> Iterator[Config]:
    """Configurations of the forward kernel worth trying: other steps, chunks and heads."""
    arrays, options = _abstract(spec, None)
    guess, (L, H, G) = heuristic(arrays, options), (spec.L, spec.H, spec.G or spec.H)
    for T, C, heads in itertools.product((256, 512, 1024, 2048), (128, 256), (1, 2, 4)):
        fits = G % heads == 0 and (heads == 1 or guess.R == H // G)
        fits = fits and T % C == 0 and whole(L, LANES) >= T
        if fits and T // LANES * heads * guess.R <= 2 * PIECES:
            yield dataclasses.replace(guess, T=T, C=C, heads=heads)


def executions(spec, config: Config | None = None) -> dict[str, list[float]]:
    """How often each heavy piece of the kernels' programs runs in one call in bfloat16.

    Args:
      spec: as in `specs`.
      config: explicit, or None.

    Returns:
      {kernel: runs of its heavy pieces, in the order of its program, cores together}.
    """
    arrays, options = _abstract(spec, config)
    config = _config(arrays, options)
    runs = tpu_forward.executions(arrays, options, config)
    return {tpu_forward.NAME: runs} | tpu_backward.executions(spec, config.backward)


def _abstract(spec, config: Config | None) -> tuple[Arrays, Options]:
    """The arrays' shapes, and the options, of a spec."""
    arrays = {n: jax.ShapeDtypeStruct(*x) for n, x in spec.abstract(jnp.bfloat16).items()}
    return Arrays(**arrays), Options(spec.features, config)


def _features(arrays: Arrays, options: Options) -> int:
    f = (arrays.q if arrays.q_map is None else arrays.q_map).shape[-1]
    return tpu_tiles.width(options.features, f)


def _config(arrays: Arrays, options: Options) -> Config:
    _check(arrays, options)
    (B, L, H, K), (G, V) = arrays.q.shape, arrays.v.shape[2:]
    key = dict(B=B, L=L, H=H, G=G, K=K, V=V, F=_features(arrays, options))
    key |= dict(features=options.features, mapped=arrays.q_map is not None)
    key |= dict(segments=arrays.q_segments is not None, dtype=arrays.q.dtype.name)
    guess = lambda: heuristic(arrays, options)
    config = tuning.choose("linear_attention", "pallas_tpu", key, options.config, guess)
    if G % config.heads or H // G % config.R or (config.heads > 1 and config.R != H // G):
        raise ValueError(
            f"{G} key heads of {H // G} query heads each cannot be cut into heads {config.heads} "
            f"and R {config.R}: choose divisors, and heads 1 if R is less."
        )
    return config


def _check(arrays: Arrays, options: Options):
    if dispatch.platform() != "tpu":
        raise NotImplementedError(f"pallas_tpu is for a TPU, not a {dispatch.platform()}.")
    if arrays.q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"pallas_tpu takes bfloat16 and float32, not {arrays.q.dtype}.")
    if options.features not in tpu_tiles.FORMS:
        raise NotImplementedError(
            f"pallas_tpu has the features {', '.join(tpu_tiles.FORMS)}, not {options.features}: "
            f"use xla."
        )
