"""The peer on TPUs: JAX's own splash attention, for predictions beside `flash_attention`'s.

jax.experimental.pallas.ops.tpu.splash_attention, with its fused backward kernel. Its block sizes
are those that tokamax measured to be the best, within what this kernel compiles to.
"""

import dataclasses
from collections.abc import Callable

from launch.kernels.program import Program
from pallas_kernels.flash_attention import blocks, reference

PLATFORM = "tpu"


@dataclasses.dataclass(frozen=True)
class Config:
    """T: queries a block.  C: keys a block.  compute: keys at a time inside of a block."""

    T: int = 1024
    C: int = 1024
    compute: int = 256
    T_backward: int = 1024
    C_backward: int = 1024
    compute_backward: int = 512


def best() -> Config:
    """For the target: v5e and v5p leave a kernel less vector memory, and larger blocks fail."""
    from jax.experimental.pallas import tpu as pltpu

    if pltpu.get_tpu_info().generation == 5:
        return Config()
    return Config(2048, 2048, 512, 2048, 2048, 512)


def can(spec) -> bool:
    """Whether this kernel computes the spec: it knows neither leading keys nor sinks."""
    return not (spec.first or spec.sinks)


def call(spec, config: Config | None = None) -> Callable:
    """A function of q, k, v and segments, as flash_attention's, that gives o [B L H V].

    Raises NotImplementedError where it cannot.
    """
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if not can(spec):
        raise NotImplementedError("splash attention knows neither leading keys nor sinks")
    shape = spec.L, spec.S or spec.L
    mask = masks.MultiHeadMask([_mask(masks, spec, shape)] * spec.H)
    attend = kernel.make_splash_mha_single_device(
        mask, block_sizes=_blocks(kernel, spec, config), attn_logits_soft_cap=spec.softcap
    )

    def attention(q, k, v, q_segments=None, kv_segments=None):
        ids = None if q_segments is None else kernel.SegmentIds(q_segments, kv_segments)
        heads = lambda x: x.swapaxes(1, 2)
        q = q * spec.K**-0.5
        return heads(jax.vmap(attend)(heads(q), heads(k), heads(v), ids))

    return attention


def _mask(masks, spec, shape: tuple[int, int]):
    offset = shape[1] - shape[0]
    if spec.window is not None:
        ahead = 0 if spec.causal else spec.window - 1
        return masks.LocalMask(shape, (spec.window - 1, ahead), offset)
    return masks.CausalMask(shape, offset) if spec.causal else masks.FullMask(shape)


def _blocks(kernel, spec, config: Config | None):
    config = config or best()
    L, S = spec.L, spec.S or spec.L
    return kernel.BlockSizes(
        block_q=min(config.T, L),
        block_kv=min(config.C, S),
        block_kv_compute=min(config.compute, config.C, S),
        block_q_dkv=min(config.T_backward, L),
        block_kv_dkv=min(config.C_backward, S),
        block_kv_dkv_compute=min(config.compute_backward, config.C_backward, S),
        use_fused_bwd_kernel=True,
    )


def runs(spec, config: Config | None, name: str, program: Program, grid: int) -> list[float]:
    """How often each heavy piece runs in one call, from the program's structure.

    Matrix products run for blocks that are not masked as a whole; what else stands behind a branch
    of its own starts or ends a row of blocks; the rest runs every grid step.
    """
    config = config or best()
    L, S = spec.L, spec.S or spec.L
    backward = "dkv" in name
    T, C = (config.T_backward, config.C_backward) if backward else (config.T, config.C)
    options = reference.Options(spec.causal, spec.window, spec.softcap, spec.K**-0.5)
    kinds = blocks.kinds(min(T, L), min(C, S), L, S, None, None, options)
    heads = spec.B * spec.H
    rows = heads * kinds.shape[2 if backward else 1]
    seen = heads * int((kinds > 0).sum())
    branches = [set(piece.inside) for piece in program.heavy]
    common = set.intersection(*branches) if branches else set()
    found = []
    for piece in program.heavy:
        if set(piece.inside) == common:
            found.append(grid)
        else:
            found.append(seen if piece.matmuls else rows)
    return found
