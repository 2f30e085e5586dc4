"""Grouped products on TPUs, in Pallas: what they take, their configuration, two directions."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, tuning
from pallas_kernels.grouped_matmul import tpu_rows, tpu_weights
from pallas_kernels.grouped_matmul.tpu_rows import Rows
from pallas_kernels.grouped_matmul.tpu_weights import Weights


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels are cut; each part also given as a mapping of its fields.

    forward, inputs: the products that give y and dx.  weights: those that give dw.

    Raises:
      ValueError: sizes that the kernels are not made for.
    """

    forward: Rows | Mapping
    inputs: Rows | Mapping
    weights: Weights | Mapping

    def __post_init__(self):
        for name, kind in (("forward", Rows), ("inputs", Rows), ("weights", Weights)):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, kind(**value))


def forward(x, w, sizes, config: Config | None = None):
    """y [M N] in x's dtype, as `reference.forward`.

    Raises:
      NotImplementedError: not a TPU, a dtype other than bfloat16 and float32, an array without
        entries, or K or N of which no tile fits into VMEM, since sums are not cut.
    """
    return tpu_rows.product(x, w, sizes, _config(x, w, config).forward, transposed=False)


def backward(x, w, sizes, dy, config: Config | None = None):
    """dx [M K] and dw [G K N]; raises as `forward`."""
    config = _config(x, w, config)
    dx = tpu_rows.product(dy, w, sizes, config.inputs, transposed=True)
    return dx, tpu_weights.gradient(x, dy, sizes, config.weights)


def heuristic(x, w) -> Config:
    """The least work for each core, and then the least to be moved; raises as `forward`."""
    (M, K), N = x.shape, w.shape[2]
    return Config(
        forward=tpu_rows.heuristic(M, K, N, x.dtype, transposed=False),
        inputs=tpu_rows.heuristic(M, N, K, x.dtype, transposed=True),
        weights=tpu_weights.heuristic(M, K, N, x.dtype),
    )


def candidates(spec) -> Iterator[Config]:
    """Configurations worth trying: other tiles of rows, more rows at once, smaller tiles of dw."""
    guess = heuristic(*_abstract(spec))
    yield guess
    for T, part in itertools.product((256, 512, 1024), (128, 256)):
        rows = [dataclasses.replace(x, T=T, part=part) for x in (guess.forward, guess.inputs)]
        if rows != [guess.forward, guess.inputs]:
            yield dataclasses.replace(guess, forward=rows[0], inputs=rows[1])
    for name in "KN":
        if (size := getattr(guess.weights, name)) % 256 == 0:
            weights = dataclasses.replace(guess.weights, **{name: size // 2})
            yield dataclasses.replace(guess, weights=weights)


def executions(spec, config: Config | None = None) -> dict[str, list[float]]:
    """How often each heavy piece of the kernels' programs runs in one call in bfloat16.

    Args:
      spec: as in `specs`.
      config: explicit, or None.

    Returns:
      {kernel: runs of its heavy pieces, in the order of its program, cores together}.
    """
    config, (M, K, N) = _config(*_abstract(spec), config), (spec.M, spec.K, spec.N)
    return {
        tpu_rows.FORWARD: tpu_rows.executions(spec.counts, M, N, config.forward),
        tpu_rows.BACKWARD: tpu_rows.executions(spec.counts, M, K, config.inputs),
        tpu_weights.NAME: tpu_weights.executions(spec.counts, M, K, N, config.weights),
    }


def _abstract(spec):
    arrays = spec.abstract(jnp.bfloat16)
    return [jax.ShapeDtypeStruct(*arrays[name]) for name in "xw"]


def _config(x, w, config: Config | None) -> Config:
    _check(x, w)
    # Rows are named as lengths are, of which a record takes those that are near too.
    key = dict(L=x.shape[0], K=x.shape[1], N=w.shape[2], G=w.shape[0], dtype=x.dtype.name)
    return tuning.choose("grouped_matmul", "pallas_tpu", key, config, lambda: heuristic(x, w))


def _check(x, w):
    if dispatch.platform() != "tpu":
        raise NotImplementedError(f"pallas_tpu is for a TPU, not a {dispatch.platform()}.")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"pallas_tpu takes bfloat16 and float32, not {x.dtype}.")
    if not x.size or not w.size:
        raise NotImplementedError(
            f"pallas_tpu takes no arrays without entries, as x {x.shape} by w {w.shape}: use xla."
        )
