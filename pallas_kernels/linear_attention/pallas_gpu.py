"""Linear attention on Hopper GPUs, in Mosaic GPU: what it takes, its configuration, both ways."""

import dataclasses
from collections.abc import Mapping

from pallas_kernels import tuning
from pallas_kernels.flash_attention import gpu_tiles
from pallas_kernels.linear_attention import gpu_backward, gpu_forward, gpu_maps
from pallas_kernels.linear_attention.gpu_backward import Backward
from pallas_kernels.linear_attention.gpu_forward_chunk import Forward
from pallas_kernels.linear_attention.reference import Arrays, Options

WIDEST = 256  # features whose state registers hold
STATES = 0.4  # of a piece's time, what the pass takes that finds the states between pieces


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels are cut.

    Attributes:
      stages: chunks of queries and keys in shared memory at once, and one less than of values.
      pieces: that rows are cut into, to be worked on at once; a first pass finds their states.
      backward: how the gradients' kernels are cut; also given as a mapping of its fields.

    Raises:
      ValueError: fewer than one of them.
    """

    stages: int = 1
    pieces: int = 1
    backward: Backward = dataclasses.field(default_factory=Backward)

    def __post_init__(self):
        if isinstance(self.backward, Mapping):
            object.__setattr__(self, "backward", Backward(**self.backward))
        for name in ("stages", "pieces"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")


def forward(arrays: Arrays, options: Options):
    """o, total, values and keys, as `reference.forward`.

    Raises:
      NotImplementedError: not a Hopper GPU, not a 16-bit dtype, the form 'taylor', more than 256
        features, or heads and maps that together do not fit shared memory.
    """
    _check(arrays, options)
    return gpu_forward.forward(arrays, options, _config(arrays, options))


def backward(arrays: Arrays, o, total, do, dtotal, dvalues, dkeys, options: Options):
    """Gradients of `arrays.differentiable`, None for what is None; raises as `forward`."""
    _check(arrays, options)
    given = arrays, o, total, do, dtotal, dvalues, dkeys
    return gpu_backward.backward(*given, options, _config(arrays, options).backward)


def heuristic(arrays: Arrays, options: Options) -> Config:
    """A configuration that fits a multiprocessor and keeps most of them busy."""
    shape, ahead = (gpu_forward.sizes(arrays, options, stages, 1) for stages in (1, 2))
    # Two heads at once hide more than loading further ahead.
    fits = Forward.shared(ahead) <= gpu_tiles.SHARED and ahead.teams == shape.teams
    stages = 2 if fits else 1
    blocks = shape.B * shape.H // shape.teams * (shape.V // (64 * shape.W))
    cores = gpu_tiles.cores()
    waves = lambda pieces: -(-blocks * pieces // cores) / pieces * (1 + STATES * (pieces > 1))
    pieces = min(range(1, max(shape.N // 8, 1) + 1), key=waves)
    F, V = shape.width * gpu_maps.HALVES.get(shape.form, 1), arrays.v.shape[3]
    backward = gpu_backward.heuristic(shape.B, shape.L, shape.H, shape.G, F, V)
    return Config(stages, pieces, backward)


def _check(arrays: Arrays, options: Options):
    gpu_tiles.check(*arrays[:3])
    if options.features == "taylor":
        raise NotImplementedError("The Hopper kernel has no 'taylor' features: use 'xla'.")
    shape = gpu_forward.sizes(arrays, options, 1, 1)
    if shape.F > WIDEST:
        raise NotImplementedError(
            f"The Hopper kernel holds states of up to {WIDEST} features, not {shape.F}: use 'xla'."
        )
    if Forward.shared(shape) > gpu_tiles.SHARED:
        raise NotImplementedError(
            f"Keys of {shape.K} with maps to {shape.F} features take {Forward.shared(shape)} bytes "
            f"of shared memory, of which there are {gpu_tiles.SHARED}: use 'xla'."
        )


def _config(arrays: Arrays, options: Options) -> Config:
    (B, L, H, K), (G, V) = arrays.q.shape, arrays.v.shape[2:]
    width = 0 if arrays.q_map is None else arrays.q_map.shape[-1]
    key = dict(B=B, L=L, H=H, G=G, K=K, V=V, f=width, features=options.features)
    key |= dict(segments=arrays.q_segments is not None, dtype=arrays.q.dtype.name)
    guess = lambda: heuristic(arrays, options)
    return tuning.choose("linear_attention", "pallas_gpu", key, options.config, guess)
