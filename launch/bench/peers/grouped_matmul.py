"""Whom `grouped_matmul` is measured against, and what is wanted of it.

XLA's own jax.lax.ragged_dot, which on GPUs and CPUs multiplies all rows by all matrices; tokamax'
Mosaic GPU kernels; and torch's grouped_mm, which is CUTLASS. None says what rows of no group give,
so where there are such rows all decline.
"""

from collections.abc import Callable, Mapping

import jax

from launch.bench.contender import Case, Declined, Jax, Torch, imported
from launch.bench.target import Target

XLA, TOKAMAX, TORCH = "jax.lax.ragged_dot", "tokamax mosaic", "torch grouped_mm"
MOST_EXPANDED = 2**34  # elements of x, once for every group, that fit into a GPU
# 600 TFLOP/s where tokamax publishes, for an H100, 452 of y, 346 of dx and 112 of dw: dx and dw
# together, as they are timed here, are 169.
TARGETS = (
    Target("forward", "forward", TOKAMAX, 1.2, lambda spec: spec.name == "moonshot"),
    Target("backward", "backward", TOKAMAX, 3.5, lambda spec: spec.name == "moonshot"),
    Target("forward", "forward", TORCH, 1.0, lambda spec: spec.sizes != "holes"),
    Target("backward", "backward", TORCH, 1.0, lambda spec: spec.sizes != "holes"),
)


def peers() -> Mapping[str, Callable[[Case], Jax | Torch]]:
    """{name: from a case to the contender}, which raises Declined. In the order of the report."""
    return {
        XLA: lambda case: Jax(_xla(case), case),
        TOKAMAX: lambda case: Jax(_tokamax(case), case),
        TORCH: lambda case: Torch(_grouped_mm, _checked(case)),
    }


def _xla(case: Case) -> Callable:
    _decline_holes(case.spec)
    expanded = case.spec.G * case.spec.M * max(case.spec.K, case.spec.N)
    if jax.default_backend() == "gpu" and expanded > MOST_EXPANDED:
        raise Declined("it repeats all rows for every group, too many here")
    return lambda x, w, sizes: jax.lax.ragged_dot(x, w, sizes)


def _tokamax(case: Case) -> Callable:
    tokamax = imported("tokamax")
    if jax.default_backend() == "cpu":
        raise Declined("its kernel runs on a GPU or a TPU")
    _decline_holes(case.spec)
    return lambda x, w, sizes: tokamax.ragged_dot(x, w, sizes, implementation="mosaic")


def _checked(case: Case) -> Case:
    torch = imported("torch")
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        raise Declined("its kernel runs on a GPU")
    if not hasattr(torch.nn.functional, "grouped_mm"):
        raise Declined(f"torch {torch.__version__} has none")
    if case.dtype != "bfloat16":
        raise Declined("it takes bfloat16 alone")
    _decline_holes(case.spec)
    return case


def _grouped_mm(spec, arrays):
    import torch

    del spec
    ends = torch.cumsum(arrays["sizes"], 0, dtype=torch.int32)
    return lambda x, w: torch.nn.functional.grouped_mm(x, w, offs=ends)


def _decline_holes(spec) -> None:
    if spec.counts.sum() < spec.M:
        raise Declined("it does not say what rows of no group give")
