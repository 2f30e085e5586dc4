"""Attention with causality, windows, packed segments, grouped queries, capped scores and sinks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.flash_attention import sinks as sink
from pallas_kernels.flash_attention.reference import Options

# The modules, in the order in which implementation=None tries them, and the platform of those that
# are for one. Each offers `forward` and `backward`, those in TUNED also `Config`. pallas_gpu is
# behind xla, which takes everything: what no GPU has run yet must be asked for by name.
IMPLEMENTATIONS = {
    "pallas_tpu": "tpu",
    "cudnn": "gpu",
    "xla": None,
    "pallas_gpu": "gpu",
    "reference": None,
}
TUNED = ("pallas_tpu", "pallas_gpu")
# Dimensions that a kernel needs in one piece.
WHOLE = {0: {1: "length of q", 3: "head size of q"}, 1: {1: "length of k", 3: "head size of k"}}
WHOLE |= {2: {1: "length of v", 3: "head size of v"}}
WHOLE |= {3: {1: "length of q_segments"}, 4: {1: "length of kv_segments"}}


def flash_attention(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    q_segments: Int[Array, "B L"] | None = None,
    kv_segments: Int[Array, "B S"] | None = None,
    causal: bool = True,
    window: int | None = None,
    first: int = 0,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    config: Any = None,
) -> Float[Array, "B L H V"] | tuple[Float[Array, "B L H V"], Float[Array, "B L H"]]:
    """Softmax attention, `o_i = sum_j exp(s_ij - lse_i) v_j`, `lse_i = log sum_j exp(s_ij)`.

    `s_ij = cap(scale q_i . k_j)` over the keys j that query i sees, `cap(s) = c tanh(s / c)` with a
    softcap c. Query i stands at the keys' position `i + S - L` (aligned at the end); it sees key j
    if all of these hold: causal: `j <= i + S - L`; window w: `i + S - L - j < w`, and without
    causal also `j - i - S + L < w`, or else j is among the `first` keys of its document (of the row
    without segments); segments: both have the same one, and it is not 0. A query that sees nothing
    has o = 0, lse = -inf and gives no gradient. Query head h reads key head `h // (H / G)`. Sums,
    softmax and lse are float32; products are of the inputs' dtype.

    With sinks, lse_i is `log(exp(sink_h) + sum_j exp(s_ij))`; a query that sees nothing then has
    o = 0 and lse = sink_h.

    Under Explicit mesh axes batch and heads may be split; differentiable once, in reverse mode.
    The output and lse bear the checkpoint name 'attention', so that remat can keep them.

    Args:
      q, k, v: queries, keys and values of one dtype.
      q_segments, kv_segments: documents of a packed row, 0 is padding; both or neither.
      causal: whether a query sees no later key.
      window: number of tokens seen, with one's own; without causal, on each side.
      first: keys at the start of a document that are seen from beyond the window too.
      softcap: bound of the scores' size.
      scale: factor of the scores, K**-0.5 by default.
      sinks: one logit a head that takes its share of the softmax and has no value.
      return_lse: whether to return (o, lse); lse has a gradient too.
      implementation: name in IMPLEMENTATIONS; None takes the first that can, of the target's
        platform: on a TPU pallas_tpu, on a GPU cudnn; then xla. An array without elements is
        left to reference.
      config: of the named implementation, its module's Config; None lets `tuning.choose` decide.

    Returns:
      o [B L H V] in q's dtype, and with return_lse also lse [B L H] float32.

    Raises:
      ValueError: shapes, dtypes, options or config do not fit, an unknown implementation, or
        length, head or value dimension split over a mesh axis, or q, k, v split in different ways.
      NotImplementedError: a named implementation cannot do this.

    Source: FlashAttention-2, arXiv 2307.08691; softcap after Gemma 2, arXiv 2408.00118; first
    after LM-Infinite, arXiv 2308.16137; sinks after gpt-oss, arXiv 2508.10925.
    """
    _check_shapes(q, k, v, q_segments, kv_segments, sinks)
    _check_options(window, first, softcap)
    _check_config(config, implementation)
    dispatch.check_heads(q, k, v)
    if implementation is None and 0 in (*q.shape, *k.shape, *v.shape):
        implementation = "reference"  # nothing to compute, and no kernel has a grid for it
    batch, _, heads, _ = dispatch.spec(q)
    if q_segments is not None:
        pair = (x.astype(jnp.int32) for x in (q_segments, kv_segments))
        q_segments, kv_segments = (_split_first(x, batch) for x in pair)
    if sinks is not None:
        exact = jnp.promote_types(sinks.dtype, jnp.float32)
        sinks = _split_first(sinks.astype(exact), heads)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    options = Options(causal, window, softcap, scale, first, config, return_lse)
    args = dispatch.vary(q, k, v, q_segments, kv_segments, sinks)
    o, lse = _attend(options, implementation, *args)
    return (o, lse) if return_lse else o


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(options: Options, implementation: str | None, *args):
    choices = dispatch.choices(__name__, IMPLEMENTATIONS, "forward")

    def run(*args):
        *args, sinks = args
        found = dispatch.pick(choices, implementation, *args, options)
        o, lse = dispatch.like(args, found)
        return (o, lse) if sinks is None else sink.join(o, lse, sinks)

    like_q = lambda q, *_: (q, PartitionSpec(*q[:3]))
    return dispatch.local(run, follow=like_q, whole=WHOLE)(*args)


def _attend_fwd(options: Options, implementation: str | None, *args):
    o, lse = (checkpoint_name(x, "attention") for x in _attend(options, implementation, *args))
    return (o, lse), (*args, o, lse)


def _attend_bwd(options: Options, implementation: str | None, kept, cotangents):
    q, k = kept[:2]
    choices = dispatch.choices(__name__, IMPLEMENTATIONS, "backward")
    # One key head for all queries may be whole where query heads are split: its gradients add up.
    shared = tuple(a for a in dispatch.split(q, 2) if a not in dispatch.split(k, 2))
    batch = dispatch.spec(q)[0]

    def run(*args):
        *qkv_segments, sinks, o, lse, do, dlse = args
        rest = (o, lse, do, dlse)
        found = dispatch.pick(choices, implementation, *qkv_segments, *rest, options)
        dq, *dkv = dispatch.like(args, found)
        dkv = jax.lax.psum(dkv, shared) if shared else dkv
        if sinks is None:
            return dq, *dkv, None
        dsinks = sink.gradient(o, lse, sinks, do, dlse)
        return dq, *dkv, jax.lax.psum(dsinks, batch) if batch else dsinks

    do, dlse = cotangents
    dlse = jnp.where(kept[-1] == -jnp.inf, 0.0, dlse)  # nothing seen, nothing to change
    follow = (0, 1, 2, None if kept[5] is None else 5)
    *grads, dsinks = dispatch.local(run, follow=follow, whole=WHOLE)(*kept, do, dlse)
    return (*grads, None, None, dsinks)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _check_shapes(q, k, v, q_segments, kv_segments, sinks):
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
        raise ValueError(f"Attention takes q [B L H K], k [B S G K], v [B S G V], not {shapes}.")
    (B, L, H, K), (_, S, G, _) = q.shape, k.shape
    if k.shape != (B, S, G, K) or v.shape[:3] != (B, S, G):
        raise ValueError(
            f"q {q.shape} wants k {(B, 'S', 'G', K)} and v {(B, 'S', 'G', 'V')}, but they are "
            f"{k.shape} and {v.shape}."
        )
    if H % G:
        raise ValueError(f"{H} query heads cannot share {G} key heads: {H} % {G} is {H % G}.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v need one dtype, not {q.dtype}, {k.dtype}, {v.dtype}.")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("Give both q_segments and kv_segments, or neither.")
    if q_segments is not None and (q_segments.shape, kv_segments.shape) != ((B, L), (B, S)):
        raise ValueError(
            f"Segments must be {(B, L)} and {(B, S)}, not {q_segments.shape} and "
            f"{kv_segments.shape}."
        )
    if sinks is not None and sinks.shape != (H,):
        raise ValueError(f"sinks must be {(H,)}, one a query head, not {sinks.shape}.")


def _check_options(window: int | None, first: int, softcap: float | None):
    if first < 0 or (first and window is None):
        raise ValueError(
            f"first counts keys seen from beyond the window, so {first} with window {window} means "
            f"nothing: first must be 0 or more, and 0 without a window."
        )
    if window is not None and window < 1:
        raise ValueError(f"window counts the tokens seen, with one's own: {window} is less than 1.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap bounds the scores' size: {softcap} is not positive.")


def _check_config(config, implementation: str | None):
    if config is not None and implementation not in TUNED:
        raise ValueError(
            f"config {config} is for one of the implementations {', '.join(TUNED)}: name the one."
        )


def _split_first(x, axes):
    """x with its first dimension split over the Explicit mesh axes `axes`; keeps None."""
    if x is None or dispatch.spec(x)[0] == axes:
        return x
    return jax.reshard(x, PartitionSpec(axes, *dispatch.spec(x)[1:]))
