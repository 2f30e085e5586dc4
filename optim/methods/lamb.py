"""LAMB: "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes".

arXiv 1904.00962 (You et al., ICLR 2020). For every layer's weight W with gradient g at step t:

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    u = m^ / (sqrt(v^) + eps) + weight_decay W,     m^ = m / (1 - b1^t), v^ = v / (1 - b2^t)
    direction = phi(||W||) / ||u|| * u              (ratio 1 where ||W|| or ||u|| is 0)

The ratio belongs to one true layer matrix. Layers, the parts of a fused weight and experts are held
in one array, so norms run over `entry.norm_axes`; one norm a leaf would give every layer of a stack
the step of the largest. They are float32 and, under a mesh, global.

| here                                     | elsewhere                                           |
|------------------------------------------|-----------------------------------------------------|
| bias correction (`debias`), as the paper | off in cybertronai, NVIDIA; DeepSpeed: only in lr   |
| phi = identity; optional clip of ||W||   | cybertronai, NVIDIA: [0, 10]; DeepSpeed: the ratio  |
| ratio per true matrix                    | per leaf in optax, wrong for stacked layers         |
| no ratio for vectors, norms and biases   | so in tensorflow_addons; optax gives them one       |
| no ratio for weights declared zero-init: | all give one, so that the weight grows by a factor  |
| they step like Adam                      | of at most 1 + lr a step, hardly at all             |
| decay where the declaration says so      | by lists of names                                   |
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim.build import decay, lookup
from parallel.weight import Entry, Table


class LambState(NamedTuple):
    count: jax.Array  # int32 []
    mu: dict[str, jax.Array]  # float32, as the parameters
    nu: dict[str, jax.Array]


def make(
    table: Table,
    *,
    weight_decay,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    debias: bool = True,
    phi_min: float = 0.0,
    phi_max: float | None = None,
) -> optax.GradientTransformation:
    """The direction, without learning rate and sign; phi(z) = min(max(z, phi_min), phi_max).

    State: step count and two moments a weight. ValueError if phi_min exceeds phi_max.
    """
    if phi_max is not None and phi_min > phi_max:
        raise ValueError(f"lamb: phi_min {phi_min} is above phi_max {phi_max}.")
    decayed = decay(table, weight_decay)

    def init(params):
        zeros = lambda: {path: jnp.zeros_like(w, jnp.float32) for path, w in params.items()}
        return LambState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads, state, params):
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        c1, c2 = (_correction(b, count) if debias else 1.0 for b in (b1, b2))
        adam = jax.tree.map(lambda m, v: m / c1 / (jnp.sqrt(v / c2) + eps), mu, nu)
        u, _ = decayed.update(adam, optax.EmptyState(), params)
        direction = {p: _scale(lookup(table, p), params[p], u[p], phi_min, phi_max) for p in u}
        return direction, LambState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _correction(b, count):
    """1 - b^t. Through expm1: float32 loses three of seven digits of 1 - 0.999."""
    return -jnp.expm1(count * math.log(b)) if b else 1.0


def _has_ratio(entry: Entry) -> bool:
    # A norm's gain or a bias may have two dimensions (heads, head) without being a matrix. A weight
    # that starts at zero could only grow in proportion to its own tiny norm.
    vector = not entry.is_matrix or entry.weight.group in ("norm", "bias")
    return not vector and entry.weight.init[0] != "zeros"


def _scale(entry: Entry, w, u, phi_min, phi_max):
    """u times the trust ratio of each of the matrices that stand side by side in the leaf."""
    if not _has_ratio(entry):
        return u
    w_norm, u_norm = (jnp.sqrt(jnp.sum(x * x, entry.norm_axes, keepdims=True)) for x in (w, u))
    defined = (w_norm > 0) & (u_norm > 0)
    ratio = jnp.clip(w_norm, phi_min, phi_max) / jnp.where(defined, u_norm, 1.0)
    return jnp.where(defined, ratio, 1.0) * u
