"""Adafactor: "Adaptive Learning Rates with Sublinear Memory Cost", Shazeer and Stern, 1804.04235.

For a matrix W, fan-in by fan-out, with gradient g at step t, b = 1 - t^-decay_exponent:

    r <- b r + (1 - b) (mean of g^2 + eps over the fan-out)        c: the same over the fan-in
    v = r c' / mean(r)        u = g / sqrt(v)        u <- u / max(1, rms(u) / clip)
    direction = max(min_scale, rms(W)) u + weight_decay W

Vectors, and matrices with a fan below `min_factored`, keep a whole v. The learning rate is the
paper's relative step rho, there min(0.01, 1 / sqrt(t)). With `momentum`, an average of the steps,
before the decay.

optax.scale_by_factored_rms factors the two largest dimensions of an array, which may be layers or
experts, or parts of one fan as H and K of `[D H K]`, keeps a dummy for every moment that it does
not need, and takes rms(u) and rms(W) of whole arrays. Here all of that belongs to one true matrix,
whose fans may be several dimensions. A matrix in an array of its own steps as with optax.adafactor.

Under muP min_scale breaks the scaling of weights that start at zero: it does not fall with width.
And a width that is below `min_factored` at the base and above it here makes another method of it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim import widths
from optim.build import decay, lookup
from optim.widths import relative as width
from parallel.weight import Entry, Table


class AdafactorState(NamedTuple):
    count: jax.Array  # int32 []
    rows: dict[str, jax.Array]  # float32, as the parameters with dimensions of the fan-out 1
    columns: dict[str, jax.Array]  # with those of the fan-in 1
    whole: dict[str, jax.Array]  # of what is not factored
    momentum: dict[str, jax.Array]


def make(
    table: Table,
    *,
    weight_decay,
    decay_exponent: float = 0.8,
    eps: float = 1e-30,
    clip: float | None = 1.0,
    relative: bool = True,
    min_scale: float = 1e-3,
    min_factored: int = 128,
    momentum: float = 0.0,
) -> optax.GradientTransformation:
    """The direction, without learning rate and sign.

    clip: largest root mean square of u, None for no clipping.  relative: steps are multiples of
      the weight's root mean square; otherwise the learning rate is absolute, as Adam's.
    State: step count, r and c or v a weight, and with momentum one more. ValueError for an eps that
    float32 takes for 0.
    """
    if not eps >= jnp.finfo(jnp.float32).tiny:
        raise ValueError(f"adafactor: eps is {eps}; a row without a gradient needs 1e-37 or more.")
    rule = width if relative else widths.elementwise
    decayed = decay(table, weight_decay, rule)
    fans = lambda path: _factored(lookup(table, path), min_factored)

    def init(params):
        factored = {path: w for path, w in params.items() if fans(path)}
        means = lambda k: {path: _zero_mean(w, fans(path)[k]) for path, w in factored.items()}
        zeros = {path: jnp.zeros_like(w, jnp.float32) for path, w in params.items()}
        whole = {path: x for path, x in zeros.items() if path not in factored}
        count = jnp.zeros((), jnp.int32)
        return AdafactorState(count, means(1), means(0), whole, zeros if momentum else {})

    def sized(path, u, w):
        entry = lookup(table, path)
        u = u if clip is None else u / jnp.maximum(1.0, _rms(entry, u) / clip)
        return jnp.maximum(min_scale, _rms(entry, w)) * u if relative else u

    def update(grads, state, params):
        count = state.count + 1
        b = 1 - count.astype(jnp.float32) ** -decay_exponent
        average = lambda old, new: b * old + (1 - b) * new
        rows, columns, whole, u = {}, {}, {}, {}
        for path, g in grads.items():
            square = g * g + eps
            if fans(path):
                ins, outs = fans(path)
                r = average(state.rows[path], jnp.mean(square, outs, keepdims=True))
                c = average(state.columns[path], jnp.mean(square, ins, keepdims=True))
                rows[path], columns[path] = r, c
                # Apart: the product of two means of squares may be too small for float32.
                u[path] = g * (r / jnp.mean(r, ins, keepdims=True)) ** -0.5 * c**-0.5
            else:
                whole[path] = average(state.whole[path], square)
                u[path] = g * whole[path] ** -0.5
        u = {path: sized(path, x, params[path]) for path, x in u.items()}
        if momentum:
            u = {p: momentum * state.momentum[p] + (1 - momentum) * x for p, x in u.items()}
        after = AdafactorState(count, rows, columns, whole, u if momentum else {})
        direction, _ = decayed.update(u, optax.EmptyState(), params)
        # 1 but where `relative` is off, which makes another method of it than `width` supposes.
        rate = lambda entry: rule(entry) / width(entry)
        return {p: rate(lookup(table, p)) * x for p, x in direction.items()}, after

    return optax.GradientTransformation(init, update)


def _factored(entry: Entry, least: int):
    """Dimensions of the shape held of fan-in and fan-out; None for what is not factored."""
    weight, norm_axes = entry.weight, entry.norm_axes
    if not entry.is_matrix or weight.group in ("norm", "bias"):
        return None
    fans = [tuple(entry.layers + i for i in fan) for fan in (weight.fan_in, weight.fan_out)]
    if not all(fans) or tuple(sorted(fans[0] + fans[1])) != norm_axes:
        fans = [norm_axes[:-1], norm_axes[-1:]]  # an embedding has no fan-in
    sizes = [math.prod(entry.shape[i] for i in fan) for fan in fans]
    return fans if min(sizes) >= least else None


def _zero_mean(w, axes):
    """Zeros with shape and sharding of a mean of w."""
    mean = jax.eval_shape(lambda w: jnp.mean(w, axes, keepdims=True), w)
    return jnp.zeros_like(mean, jnp.float32)


def _rms(entry: Entry, x):
    """Of each of the matrices that stand side by side in the leaf, its other axes 1."""
    return jnp.sqrt(jnp.mean(x * x, entry.norm_axes, keepdims=True))
