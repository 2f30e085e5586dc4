"""What the TPU's kernels share: features and masks of a chunk whose tokens are the lanes.

With tokens in lanes a sum or a maximum over features adds whole registers, and what belongs to a
token (a softmax's sum, the normaliser, a mask) is one row.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention.features import BOUND
from pallas_kernels.linear_attention.reference import Arrays
from pallas_kernels.linear_attention.state import held

LANES = 128
LOG2E = math.log2(math.e)
PAIRED = ("exp", "softmax", "joint")  # forms with a feature of z and one of -z
FORMS = ("identity", "elu", "relu", *PAIRED)
# A packed register of bfloat16 has 16 rows.
ROWS = 16


def whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def width(form: str, f: int) -> int:
    """Features in VMEM: each half of them filled up with features that are 0."""
    return whole(f, ROWS) * (1 + (form in PAIRED))


def features(form: str, z, f: int, real=None):
    """Features [width, tokens] of z [whole(f), tokens], float32; those beyond f are 0.

    real: [1, tokens] float32, 0 where a token is to have none, or None.
    """
    scale = 1.0 if real is None else real
    if form in ("softmax", "joint"):
        halves = _softmax(form, z, f, scale)
    elif form == "exp":
        z = jnp.clip(z, -BOUND, BOUND) * LOG2E
        halves = [jnp.exp2(z), jnp.exp2(-z)]
    elif form == "elu":
        halves = [jnp.where(z > 0, 1 + z, jnp.exp2(jnp.minimum(z, 0) * LOG2E))]
    else:
        halves = [jnp.maximum(z, 0) if form == "relu" else z]
    if form not in ("softmax", "joint"):
        halves = [inside(x, f) for x in halves]
        halves = halves if real is None else [x * real for x in halves]
    return jnp.concatenate(halves, 0) if len(halves) > 1 else halves[0]


def _softmax(form: str, z, f: int, scale):
    """Each exponential is at most 1 and one of them is 1."""
    z = z * (LOG2E if form == "softmax" else 2 * LOG2E)
    most = jnp.max(inside(z, f, -jnp.inf), 0, keepdims=True)
    least = jnp.min(inside(z, f, jnp.inf), 0, keepdims=True)
    if form == "joint":
        most = jnp.maximum(most, -least)
        least = -most
    up, down = inside(jnp.exp2(z - most), f), inside(jnp.exp2(least - z), f)
    sums = [jnp.sum(x, 0, keepdims=True) for x in (up, down)]
    if form == "joint":
        sums = [sums[0] + sums[1]] * 2
    return [x * (scale * inverse(total)) for x, total in zip((up, down), sums, strict=True)]


def inverse(x):
    """1 / x to the last bits of float32, for x neither 0 nor so small that 1 / x overflows."""
    guess = pltpu.reciprocal(x, approx=True)
    for _ in range(2):
        guess = guess * (2 - x * guess)
    return guess


def features_back(form: str, z, phi, dphi, f: int):
    """The gradient of z from features as `features` gave them and their gradient, [.., tokens].

    Where a token has no features, its phi and its gradient are 0.
    """
    if form not in PAIRED:
        # elu's derivative at z <= 0 is exp z, which is phi.
        slope = {"elu": jnp.where(z > 0, 1.0, phi), "relu": jnp.where(z > 0, 1.0, 0.0)}.get(form)
        return dphi if slope is None else dphi * slope
    n = z.shape[0]
    each = [phi[:n] * dphi[:n], phi[n:] * dphi[n:]]
    if form == "exp":
        return jnp.where(jnp.abs(z) <= BOUND, each[0] - each[1], 0.0)
    sums = [jnp.sum(x, 0, keepdims=True) for x in each]
    if form == "joint":
        sums = [sums[0] + sums[1]] * 2
    up, down = (x - p * s for x, p, s in zip(each, (phi[:n], phi[n:]), sums, strict=True))
    return (up - down) * (2.0 if form == "joint" else 1.0)


def inside(x, f: int, fill=0.0):
    """x [rows, tokens] with `fill` in the rows from f on."""
    if x.shape[0] == f:
        return x
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < f, x, fill)


def turned(x):
    """x [A B] as [B A], both filled up to whole tiles."""
    A, B = x.shape
    tall, wide = whole(A, LANES) - A, whole(B, LANES) - B
    if wide:
        x = jnp.concatenate([x, jnp.zeros((A, wide), x.dtype)], 1)
    if tall:
        x = jnp.concatenate([x, jnp.zeros((tall, B + wide), x.dtype)], 0)
    return x.T


def folded(x):
    """[N, C] -> [N, 128], sums of the lanes that stand above each other."""
    return sum(x[:, i : i + LANES] for i in range(0, x.shape[1], LANES))


# Rows of `tokens`.
FIRST, LAST, USES, ADDS, REAL, KEEPS = range(6)


def tokens(arrays: Arrays, C: int, length: int):
    """What masks are made of, int32 [B 8 length] in chunks of C tokens; None if all is seen.

    Of query i: FIRST and LAST of the keys of its chunk that it sees, counted from the chunk's
    start, 0 and -1 if it sees none; USES 1 where it sees the state before the chunk. Of key i: ADDS
    1 where it is in the state after, REAL 1 where it is not padding. KEEPS is 1 in a chunk after
    which the state holds the same document as before it. Tokens beyond L are padding.
    """
    B, L = arrays.q.shape[:2]
    if arrays.q_segments is None and length == L:
        return None
    q, kv, before = arrays.q_segments, arrays.kv_segments, arrays.segment
    if q is None:
        q = kv = jnp.ones((B, L), jnp.int32)
        before = jnp.ones(B, jnp.int32)
    before = jnp.zeros(B, jnp.int32) if before is None else before
    q, kv = (jnp.pad(x, ((0, 0), (0, length - L))) for x in (q, kv))
    document = held(kv, before, C)
    old, new = (jnp.repeat(x, C, 1) for x in (document[:, :-1], document[:, 1:]))
    first, last = _range(q.reshape(B, -1, C), kv.reshape(B, -1, C))
    rows = [first.reshape(B, -1), last.reshape(B, -1), (q == old) & (q != 0)]
    rows += [(kv == new) & (kv != 0), kv != 0, old == new, old == old, old == old]
    return jnp.stack([x.astype(jnp.int32) for x in rows], 1)


def _range(q, kv):
    """First and last key [B n C] that each query of a chunk sees there, 0 and -1 for none."""
    at = jnp.arange(q.shape[2])
    seen = (q[..., :, None] == kv[..., None, :]) & (q != 0)[..., None]
    seen = seen & (at[None, :] <= at[:, None])[None, None]
    last = jnp.max(jnp.where(seen, at[None, None, None], -1), 3)
    return jnp.where(last < 0, 0, jnp.argmax(seen, 3)), last


def seen(first, last, keys: int, start: int = 0):
    """Mask [keys, queries] of a chunk: key start + j is seen by its query.

    first, last: [1, queries] rows of `tokens`, or None for causal with queries from `start` on.
    """
    shape = keys, keys if first is None else first.shape[1]
    j = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + start
    if first is None:
        return j <= jax.lax.broadcasted_iota(jnp.int32, shape, 1) + start
    return (j >= first) & (j <= last)
