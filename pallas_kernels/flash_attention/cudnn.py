"""cuDNN's flash attention, through JAX's binding of it.

`jax.nn.dot_product_attention` can return lse but not run its backward pass from a given o and lse,
which is what sinks and remat need; so this module calls `jax._src.cudnn`, private functions of the
JAX 0.11.2 line that this project is pinned to. No GPU has run it from here yet: what is tested is
that it lowers and compiles for one.
"""

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused

from pallas_kernels import dispatch
from pallas_kernels.flash_attention.reference import Options

DTYPES = (jnp.float16, jnp.bfloat16)


def forward(q, k, v, q_segments, kv_segments, options: Options):
    """o [B L H V] in q's dtype and lse [B L H] float32, as `reference.forward`."""
    _decline(q, k, v, q_segments, options)
    own = (*_own(k, options), _version(), True)
    o, lse = fused._dot_product_attention_fwd(q, k, v, *_absent(q, 7), *own)
    return o, lse.swapaxes(1, 2)


def backward(q, k, v, q_segments, kv_segments, o, lse, do, dlse, options: Options):
    """dq, dk, dv for the cotangent do [B L H V]; cuDNN takes none for lse."""
    _decline(q, k, v, q_segments, options)
    if options.lse_gradient:
        raise NotImplementedError("cuDNN's backward pass takes no gradient of lse.")
    kept = (q, k, v, *_absent(q, 7), lse.swapaxes(1, 2), o)
    own = (*_own(k, options), _version(), False)
    return fused._dot_product_attention_bwd_rule(*own, kept, do)[:3]


def _own(k, options: Options):
    """Scale, seed, dropout, what there is of a bias, mask, layout and window."""
    mask = fused.MaskType.CAUSAL if options.causal else fused.MaskType.NO_MASK
    window = None if options.window is None or options.window >= k.shape[1] else options.window
    layout = fused.AttentionLayout.BTNH.value
    return options.scale, 0, 0.0, (False, False), mask, layout, window


def _absent(q, count: int):
    """In place of a bias, lengths, offsets and pages of keys."""
    return [jnp.zeros(0, q.dtype)] * count


def _version() -> int:
    """Of cuDNN here; 0, what every version can do, where the program is for another machine."""
    try:
        return fused.check_cudnn_version()
    except RuntimeError as error:
        if jax.default_backend() == "gpu":
            raise NotImplementedError(f"cuDNN cannot be had: {error}.") from error
        return 0


def _decline(q, k, v, q_segments, options: Options):
    if dispatch.platform() != "gpu":
        raise NotImplementedError(f"cuDNN is for a gpu, not a {dispatch.platform()}.")
    if q.dtype not in DTYPES:
        raise NotImplementedError(f"cuDNN's attention takes 16-bit floats, not {q.dtype}.")
    for what, given in {
        "documents of packed rows": q_segments is not None,
        "a soft cap": options.softcap is not None,
        "leading keys beyond a window": options.first,
        "a window on both sides": options.window is not None and not options.causal,
    }.items():
        if given:
            raise NotImplementedError(f"cuDNN's attention does not know of {what}.")
    L, S, K, V = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    if options.causal and L != S:
        raise NotImplementedError(
            f"cuDNN's attention aligns queries and keys at the start, and {L} and {S} are to be "
            f"aligned at the end."
        )
    if K % 8 or V % 8:
        raise NotImplementedError(f"cuDNN's attention needs head sizes of 8 n, not {K} and {V}.")
