"""The backward pass on a TPU: one kernel leaves the keys' states, one brings all gradients back.

With g = do / total and e = dtotal - g . o the derivative of the weight a_ij is g_i . v_j + e_i. The
gradients of a chunk's queries need the state of the keys before it, those of its keys the sums of
the queries after it. States before each chunk take one short pass over the keys; the sums grow
while the second kernel walks from the last chunk to the first, so that the features, the weights
and their derivatives, which both sides need, are computed once. Between the two the states take
F V / C numbers a token and key head in HBM.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.linear_attention import tpu_tiles
from pallas_kernels.linear_attention.reference import Arrays, Options
from pallas_kernels.linear_attention.tpu_backward_kernel import Plan
from pallas_kernels.linear_attention.tpu_backward_sweeps import (
    MOST,
    NAME,
    STATES,
    gradients,
    states,
    states_step,
)
from pallas_kernels.linear_attention.tpu_tiles import LANES, ROWS, whole

MOST_HEADS = 4  # of the queries a step


@dataclasses.dataclass(frozen=True)
class Backward:
    """How the kernels cut their work.

    T: tokens a step, a multiple of C.
    C: tokens a chunk, a multiple of 128. Products inside of a chunk grow with it; the states,
      of which one is kept for each chunk, become fewer.
    R: query heads a step, of those that share a key head; divides their number. With fewer, their
      keys' gradients are added up after the kernel.
    """

    T: int
    C: int
    R: int

    def __post_init__(self):
        if self.C < 1 or self.C % LANES:
            raise ValueError(f"C {self.C} is no multiple of {LANES}: choose one.")
        if self.T < 1 or self.T % self.C:
            raise ValueError(f"T {self.T} is no multiple of C {self.C}: choose one.")
        if self.R < 1:
            raise ValueError(f"R {self.R} query heads are none: choose 1 or more.")


def heuristic(L: int, R: int, K: int, V: int, F: int, dtype) -> Backward:
    """Chunks as small as the matrix unit is wide, and steps of some of them.

    Args:
      L, K, V, F: length, head sizes, features.  R: query heads a key head.
    """
    info, size = pltpu.get_tpu_info(), jnp.dtype(dtype).itemsize
    C = min(info.mxu_column_size, whole(L, LANES))
    heads = max(r for r in range(1, MOST_HEADS + 1) if R % r == 0)
    # q, g, dq, k, v, dk, dv and states, twice for the copies on their way.
    token = 2 * (whole(K, LANES) + whole(V, LANES)) * (2 * heads + 3) * size
    token += 2 * whole(V, LANES) * F * size // C
    fit = info.vmem_capacity_bytes // 3 // (token * C)
    # Products of float32 are six times as many instructions.
    most, chunks = max(1, min((MOST if size == 2 else 4) // heads, fit)), math.ceil(L / C)
    return Backward(math.ceil(chunks / math.ceil(chunks / most)) * C, C, heads)


def backward(arrays: Arrays, o, total, do, dtotal, dvalues, dkeys, options: Options, config):
    """Gradients of `arrays.differentiable`, None for what is None.

    Args:
      arrays: float32 or bfloat16.
      o, total: what the forward pass gave, [B L H V] and [B L H].
      do, dtotal, dvalues, dkeys: cotangents, the latter two [B G F V] and [B G F].
      config: `Backward`.

    Raises:
      ValueError: R of the config does not divide the query heads of a key head.
    """
    g = do.astype(jnp.float32) / total[..., None]
    e = dtotal - jnp.sum(g * o.astype(jnp.float32), -1)
    length = whole(arrays.q.shape[1], config.T)
    tokens = _tokens(arrays, config, length)
    plan = _plan(arrays, options, config, tokens is not None)
    given = _given(plan, arrays, length) | {
        "g": _by_head(g.astype(arrays.v.dtype), length),
        "e": _filled(e.swapaxes(1, 2), length, 2)[:, :, None],
    }
    given |= _last(plan, dvalues, dkeys) | ({"tokens": tokens} if plan.masked else {})
    given = dict(zip(given, dispatch.vary(*given.values()), strict=True))
    given |= states(plan, given)
    return _results(plan, arrays, gradients(plan, given))


def executions(spec, config: Backward) -> dict[str, list[float]]:
    """How often each heavy piece of the programs runs in one call, in its order, cores together.

    Args:
      spec: as in `specs`.
      config: how the kernels are cut.
    """
    length, G = whole(spec.L, config.T), spec.G or spec.H
    per_head = (length // x for x in (states_step(config.T, config.C, length), config.T))
    heads = spec.B * G, spec.B * spec.H // config.R
    runs = [float(n * steps) for n, steps in zip(heads, per_head, strict=True)]
    return {STATES: runs[:1], NAME: runs[1:]}


def _plan(arrays: Arrays, options: Options, config: Backward, masked: bool) -> Plan:
    mapped, R = arrays.q_map is not None, arrays.q.shape[2] // arrays.k.shape[2]
    f = (arrays.q_map if mapped else arrays.q).shape[-1]
    if R % config.R:
        raise ValueError(f"R {config.R} does not divide {R} query heads a key head: choose one.")
    return Plan(
        *(options.features, f, config.R, config.T, config.C),
        groups=R // config.R,
        mapped=mapped,
        biased=arrays.q_bias is not None,
        masked=masked,
        state=arrays.values is not None,
    )


def _tokens(arrays: Arrays, config: Backward, length: int):
    """Rows of masks, or None where there is nothing to mask.

    Padding is at the end and zero, so that only a bias's gradient would notice it.
    """
    if arrays.q_segments is None and arrays.q_bias is None:
        return None
    return tpu_tiles.tokens(arrays, config.C, length)


def _given(plan: Plan, arrays: Arrays, length: int) -> dict:
    """The arguments as the kernels take them, by their names there."""
    given = {n: _by_head(getattr(arrays, n), length) for n in ("q", "k", "v")}
    rows = whole(plan.f, ROWS)
    for name in ("q_map", "k_map") * plan.mapped:
        weight = getattr(arrays, name).astype(arrays.q.dtype).swapaxes(1, 2)
        given[name] = _filled(_filled(weight, rows, 1), LANES, 2)
    for name in ("q_bias", "k_bias") * plan.biased:
        bias = _filled(getattr(arrays, name).astype(jnp.float32), rows, 1)[..., None]
        given[name] = jnp.broadcast_to(bias, (*bias.shape[:2], LANES))
    (B, _, G, V), values, keys = arrays.v.shape, arrays.values, arrays.keys
    if values is None:
        F = plan.f * plan.halves
        values, keys = jnp.zeros((B, G, F, V), jnp.float32), jnp.zeros((B, G, F), jnp.float32)
    values = _filled(_laid(plan, values, 2), LANES, 3)
    return given | {"values": values, "keys": _laid(plan, keys, 2)[:, :, None]}


def _last(plan: Plan, dvalues, dkeys) -> dict:
    """The gradients of the state at the end, which the first group of query heads begins with."""
    dvalues, dkeys = _filled(_laid(plan, dvalues, 2), LANES, 3), _laid(plan, dkeys, 2)[..., None]
    own = {"last_values": dvalues, "last_keys": _filled(dkeys, LANES, 3)}
    first = lambda x: jnp.pad(x[:, :, None], [(0, 0)] * 2 + [(0, plan.groups - 1)] + [(0, 0)] * 2)
    return {n: first(x).reshape(x.shape[0], -1, *x.shape[2:]) for n, x in own.items()}


def _laid(plan: Plan, x, dim: int):
    """x with features as the kernels have them along a dimension: each half filled up."""
    halves = jnp.split(x, plan.halves, dim)
    return jnp.concatenate([_filled(half, ROWS, dim) for half in halves], dim)


def _taken(plan: Plan, x, dim: int):
    """What `_laid` was given."""
    halves = jnp.split(x, plan.halves, dim)
    return jnp.concatenate([jax.lax.slice_in_dim(x, 0, plan.f, axis=dim) for x in halves], dim)


def _results(plan: Plan, arrays: Arrays, found: dict) -> tuple:
    """The gradients as the arguments are."""
    grads, (L, _, K), V = {}, arrays.q.shape[1:], arrays.v.shape[3]
    for name in found:
        if plan.groups > 1 and name[1] != "q":
            x = found[name]
            found[name] = jnp.sum(x.reshape(x.shape[0], -1, plan.groups, *x.shape[2:]), 2)
    for name, size in (("q", K), ("k", K), ("v", V)):
        grads[name] = found[f"d{name}"].swapaxes(1, 2)[:, :L, :, :size]
    for name in ("q_map", "k_map") * plan.mapped:
        grads[name] = jnp.sum(found[f"d{name}"], 0)[:, : plan.f, :K].swapaxes(1, 2)
    for name in ("q_bias", "k_bias") * plan.biased:
        grads[name] = jnp.sum(found[f"d{name}"], (0, 3))[:, : plan.f]
    if plan.state:
        grads["values"] = _taken(plan, found["dvalues"], 2)[..., :V]
        grads["keys"] = _taken(plan, jnp.sum(found["dkeys"], 3), 2)
    return tuple(grads.get(n) for n in Arrays._fields[:9])


def _by_head(x, length: int):
    """[B L H K] -> [B H length K], K filled up to whole lanes."""
    return _filled(_filled(x, LANES, 3), length, 1).swapaxes(1, 2)


def _filled(x, multiple: int, dim: int):
    """x with zeros at the end of a dimension, up to a multiple."""
    width = [(0, 0)] * x.ndim
    width[dim] = (0, -x.shape[dim] % multiple)
    return jnp.pad(x, width) if width[dim][1] else x
