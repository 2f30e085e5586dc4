"""Sinks: one more logit a head, with no value, that joins the denominator.

gpt-oss (arXiv 2508.10925), after StreamingLLM (arXiv 2309.17453): `p_ij = exp(s_ij) / (exp(sink_h)
+ sum_j exp(s_ij))`. What attention without sinks returns is enough, so no implementation knows of
them: `lse' = log(exp(lse) + exp(sink))` and `o' = o exp(lse - lse')`. Attention's backward pass
holds for o' and lse' as they are, since `exp(s - lse')` is the new p; a sink's own gradient is
`-sum_i exp(sink - lse'_i) delta_i` with `delta = sum_V(do o') - dlse'`. It costs one more pass over
o, and rounds o twice where that is bfloat16.
"""

import jax.numpy as jnp

from pallas_kernels.flash_attention.reference import row_terms


def join(o, lse, sinks):
    """o [B L H V] and lse [B L H] of attention with sinks [H], from those without.

    A query that sees no key has o = 0 and lse = sink.
    """
    joint = jnp.logaddexp(lse, sinks[None, None])
    # Nothing seen and a sink of -inf: there is nothing to take part of.
    part = jnp.exp(lse - jnp.where(joint == -jnp.inf, 0.0, joint))
    return (o * part[..., None]).astype(o.dtype), joint


def gradient(o, lse, sinks, do, dlse):
    """Gradient [H] of sinks from what `join` gave and its cotangents, summed over B and L."""
    lse, delta = row_terms(o, lse, do, dlse)
    return -jnp.sum(jnp.exp(sinks[None, None] - lse) * delta, (0, 1))
