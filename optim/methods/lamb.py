"""LAMB: "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes".

arXiv 1904.00962 (You et al., ICLR 2020). For every layer's weight W with gradient g at step t:

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    u = m^ / (sqrt(v^) + eps) + weight_decay W,     m^ = m / (1 - b1^t), v^ = v / (1 - b2^t)
    direction = phi(||W||) / ||u|| * u              (ratio 1 where ||W|| or ||u|| is 0)

The ratio belongs to one true layer matrix. Layers, the parts of a fused weight and experts are held
in one array, so norms run over `entry.norm_axes`; one norm a leaf would give every layer of a stack
the step of the largest. They are float32 and, under a mesh, global.

Published variants, by arguments that differ from the defaults:

| variant           | arguments                                                              |
|-------------------|------------------------------------------------------------------------|
| the paper         | none; it leaves open which weights have a ratio                        |
| optax             | exclude none                                                           |
| tensorflow_addons | exclude undecayed                                                      |
| cybertronai       | exclude none, debias false, phi_max 10                                 |
| NVIDIA, safari    | exclude none, debias false, phi_max 10, ratio_eps 1e-6                 |
| DeepSpeed         | exclude none, fold_debias true, ratio_min 0.01, ratio_max 10, eps 1e-8 |

Their norms are of whole leaves, and their lists of undecayed weights go by name. The declaration is
read here instead: a norm's gain, a bias and any other vector has no ratio, nor has a weight that
starts at zero. With one it would grow by a factor of at most 1 + lr a step, hardly at all; so it
steps like Adam.

Under muP each element of the decay stays beside Adam's what it is at the base width. A clip of
||W|| or of the ratio breaks the scaling: norms grow with the width and its bounds do not.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim import widths
from optim.build import decay, lookup
from optim.trust import has_ratio, norm
from parallel.weight import Entry, Table

EXCLUDE = ("declared", "undecayed", "none")


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
    fold_debias: bool = False,
    phi_min: float = 0.0,
    phi_max: float | None = None,
    ratio_min: float = 0.0,
    ratio_max: float | None = None,
    ratio_eps: float = 0.0,
    exclude: str = "declared",
) -> optax.GradientTransformationExtraArgs:
    """The direction, without learning rate and sign; phi(z) = min(max(z, phi_min), phi_max).

    debias: correct the moments' start at zero.  fold_debias: do so by a factor sqrt(1 - b2^t) /
      (1 - b1^t) of the whole step instead, after the ratio.
    ratio_min, ratio_max: bounds of the ratio; ratio_eps: added to its denominator.
    exclude: which weights have no ratio: 'declared' as above, 'undecayed' those without weight
      decay, 'none'.

    State: step count and two moments a weight. Reports `PATH/trust_ratio`. ValueError for bounds
    that cross, for an unknown `exclude`, and for `fold_debias` without `debias`.
    """
    _check(debias, fold_debias, (phi_min, phi_max), (ratio_min, ratio_max), exclude)
    # By Adam's multiplier: the ratio only rescales Adam's step to the width that a weight bears.
    decayed = decay(table, weight_decay, widths.elementwise)
    trust = functools.partial(
        _trust, phi=(phi_min, phi_max), bounds=(ratio_min, ratio_max), eps=ratio_eps
    )

    def init(params):
        zeros = lambda: {path: jnp.zeros_like(w, jnp.float32) for path, w in params.items()}
        return LambState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def scaled(path, w, u, report):
        entry = lookup(table, path)
        if _has_ratio(entry, exclude):
            ratio = trust(entry, w, u)
            u = ratio * u
            if report is not None:
                report[f"{path}/trust_ratio"] = jnp.squeeze(ratio, entry.norm_axes)
        # 1 but where `exclude` makes another method of it than `width` supposes.
        return u * (_width(entry, exclude) / width(entry))

    def update(grads, state, params, *, report: dict | None = None, **_):
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        c1, c2 = (_correction(b, count) if debias else 1.0 for b in (b1, b2))
        step, c1, c2 = (jnp.sqrt(c2) / c1, 1.0, 1.0) if fold_debias else (1.0, c1, c2)
        adam = jax.tree.map(lambda m, v: m / c1 / (jnp.sqrt(v / c2) + eps), mu, nu)
        u, _ = decayed.update(adam, optax.EmptyState(), params)
        direction = {path: step * scaled(path, params[path], u[path], report) for path in u}
        return direction, LambState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def width(entry: Entry) -> float:
    """The learning rate's multiplier under muP."""
    return _width(entry, "declared")


def _width(entry, exclude):
    rule = widths.relative if _has_ratio(entry, exclude) else widths.elementwise
    return rule(entry)


def _correction(b, count):
    """1 - b^t. Through expm1: float32 loses three of seven digits of 1 - 0.999."""
    return -jnp.expm1(count * math.log(b)) if b else 1.0


def _has_ratio(entry: Entry, exclude: str) -> bool:
    if exclude != "declared":
        return exclude == "none" or entry.weight.decay
    return has_ratio(entry)


def _trust(entry: Entry, w, u, *, phi, bounds, eps):
    """The ratio of each of the matrices that stand side by side in the leaf, its other axes 1."""
    w_norm, u_norm = norm(entry, w), norm(entry, u)
    defined = (w_norm > 0) & (u_norm > 0)
    ratio = jnp.clip(w_norm, *phi) / jnp.where(defined, u_norm + eps, 1.0)
    return jnp.where(defined, jnp.clip(ratio, *bounds), 1.0)


def _check(debias, fold_debias, phi, ratio, exclude):
    for name, (low, high) in (("phi", phi), ("ratio", ratio)):
        if high is not None and low > high:
            raise ValueError(f"lamb: {name}_min {low} is above {name}_max {high}.")
    if exclude not in EXCLUDE:
        raise ValueError(f"lamb: exclude is {exclude!r}; it must be one of {', '.join(EXCLUDE)}.")
    if fold_debias and not debias:
        raise ValueError(
            "lamb: fold_debias says where the bias correction goes, and debias false leaves it "
            "out; change one of them."
        )
