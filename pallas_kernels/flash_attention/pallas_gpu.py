"""Attention on Hopper GPUs, in Mosaic GPU: what it takes, its configuration, its two directions."""

import dataclasses
from collections.abc import Mapping

from pallas_kernels import tuning
from pallas_kernels.flash_attention import gpu_backward, gpu_forward, gpu_tiles
from pallas_kernels.flash_attention.gpu_backward import Backward
from pallas_kernels.flash_attention.reference import Options


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels are cut.

    Attributes:
      block_q: queries a thread block takes at a time, 64 for each warpgroup that multiplies.
      block_kv: keys a tile, a multiple of 64.
      stages: tiles of keys and values in shared memory at once.
      turns: whether warpgroups issue their products by turns, one's softmax under another's.
      share: whether the output leaves through the queries' shared memory, which saves some and
        makes the next queries wait.
      backward: how the gradients' kernel is cut; also given as a mapping of its fields.

    Raises:
      ValueError: sizes that the kernel is not made for.
    """

    block_q: int = 128
    block_kv: int = 128
    stages: int = 2
    turns: bool = True
    share: bool = False
    backward: Backward = dataclasses.field(default_factory=Backward)

    def __post_init__(self):
        if isinstance(self.backward, Mapping):
            object.__setattr__(self, "backward", Backward(**self.backward))
        if self.block_q not in (128, 192):
            raise ValueError(
                f"block_q is 128 or 192, two or three warpgroups of 64, not {self.block_q}."
            )
        if self.block_kv % 64 or not 64 <= self.block_kv <= 256:
            raise ValueError(
                f"block_kv is a multiple of 64 from 64 to 256, not {self.block_kv}: a product "
                f"contracts 64 keys at a time."
            )
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2 to load ahead, not {self.stages}.")


def forward(q, k, v, q_segments, kv_segments, options: Options):
    """o [B L H V] in q's dtype and lse [B L H] float32, as `reference.forward`.

    Raises:
      NotImplementedError: not a Hopper GPU, not a 16-bit dtype, or heads wider than 256.
    """
    gpu_tiles.check(q, k, v)
    config = _config(q, k, v, q_segments, options)
    return gpu_forward.forward(q, k, v, q_segments, kv_segments, options, config)


def backward(q, k, v, q_segments, kv_segments, o, lse, do, dlse, options: Options):
    """dq, dk, dv for cotangents do [B L H V] and dlse [B L H]; raises as `forward`."""
    gpu_tiles.check(q, k, v)
    config = _config(q, k, v, q_segments, options).backward
    given = (q, k, v, q_segments, kv_segments, o, lse, do, dlse)
    return gpu_backward.backward(*given, options, config)


def heuristic(K: int, V: int, plain: bool = True) -> Config:
    """A configuration for keys of size K and values of size V that fits a multiprocessor.

    Three warpgroups of narrow heads have registers for causality at most, as `plain` says.
    """
    K, V = (-(-size // 64) * 64 for size in (K, V))
    wide = max(K, V) > 128
    block_q, block_kv = 192 if plain and max(K, V) == 64 else 128, 64 if wide else 128
    share = wide and K == V
    fixed = 2 * block_q * (K if share else K + V)
    stages = (gpu_tiles.SHARED - 2**13 - fixed) // (2 * block_kv * (K + V))
    backward = gpu_backward.heuristic(K, V)
    return Config(block_q, block_kv, max(2, min(stages, 4)), not wide, share, backward)


def _config(q, k, v, q_segments, options: Options) -> Config:
    (B, L, H, K), (S, G, V) = q.shape, v.shape[1:]
    key = dict(B=B, L=L, S=S, H=H, G=G, K=K, V=V, causal=options.causal, window=options.window)
    key |= dict(segments=q_segments is not None, dtype=q.dtype.name)
    key |= dict(first=options.first > 0, softcap=options.softcap is not None)
    plain = options.window is None and options.softcap is None and q_segments is None
    guess = lambda: heuristic(K, V, plain)
    return tuning.choose("flash_attention", "pallas_gpu", key, options.config, guess)
