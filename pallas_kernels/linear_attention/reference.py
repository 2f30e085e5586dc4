"""The definition of linear attention: the whole weight matrix, in float32, or float64 for such."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention import features
from pallas_kernels.linear_attention.state import held

EPS = 1e-12  # of the denominators


@dataclasses.dataclass(frozen=True)
class Options:
    """features: their form, see `features`.  config: the implementation's own, or None."""

    features: str
    config: Any = None


class Arrays(NamedTuple):
    """The arguments of `linear_attention` that are arrays, or None where not given.

    Segments are both given or both None; values, keys and segment are the state's, all or none.
    """

    q: Any  # [B L H K]
    k: Any  # [B L G K]
    v: Any  # [B L G V]
    q_map: Any = None  # [H K f]
    k_map: Any = None  # [G K f]
    q_bias: Any = None  # [H f]
    k_bias: Any = None  # [G f]
    values: Any = None  # [B G F V] float32
    keys: Any = None  # [B G F] float32
    q_segments: Any = None  # [B L] int32
    kv_segments: Any = None  # [B L] int32
    segment: Any = None  # [B] int32

    @property
    def differentiable(self) -> tuple:
        return self[:9]


def forward(arrays: Arrays, options: Options):
    """Linear attention by its definition.

    Returns:
      o [B L H V] in q's dtype; total [B L H], what o was divided by; values [B G F V] and keys
      [B G F], the state after the last key. All but o float32 (float64 if q is).
    """
    exact = _exact(arrays)
    q, k, v = exact.q, exact.k, exact.v
    (B, L, H, _), (G, V) = q.shape, v.shape[2:]
    phi_q = features.of(options.features, features.project(q, exact.q_map, exact.q_bias))
    phi_k = features.of(options.features, features.project(k, exact.k_map, exact.k_bias))
    phi_q = phi_q.reshape(B, L, G, H // G, -1)
    sees, uses, adds, keeps = _who(arrays, B, L)
    a = jnp.where(sees[:, None, None], jnp.einsum("blgrf,bmgf->bgrlm", phi_q, phi_k), 0)
    total = jnp.einsum("bgrlm->blgr", a)
    num = jnp.einsum("bgrlm,bmgv->blgrv", a, v)
    added = jnp.where(adds[:, :, None, None], phi_k, 0)
    values, keys = jnp.einsum("bmgf,bmgv->bgfv", added, v), jnp.einsum("bmgf->bgf", added)
    if exact.values is not None:
        phi_q = jnp.where(uses[:, :, None, None, None], phi_q, 0)
        total = total + jnp.einsum("blgrf,bgf->blgr", phi_q, exact.keys)
        num = num + jnp.einsum("blgrf,bgfv->blgrv", phi_q, exact.values)
        values = values + jnp.where(keeps[:, None, None, None], exact.values, 0)
        keys = keys + jnp.where(keeps[:, None, None], exact.keys, 0)
    total = total + EPS
    o = (num / total[..., None]).reshape(B, L, H, V).astype(arrays.q.dtype)
    return o, total.reshape(B, L, H), values, keys


def backward(arrays: Arrays, o, total, do, dtotal, dvalues, dkeys, options: Options):
    """Gradients of `arrays.differentiable`, None for what is None, by JAX's own rules."""
    given = [i for i, x in enumerate(arrays.differentiable) if x is not None]

    def run(*some):
        changed = dict(zip((Arrays._fields[i] for i in given), some, strict=True))
        return forward(arrays._replace(**changed), options)

    _, pull = jax.vjp(run, *(arrays[i] for i in given))
    found = dict(zip(given, pull((do, dtotal, dvalues, dkeys)), strict=True))
    return tuple(found.get(i) for i in range(len(arrays.differentiable)))


def _who(arrays: Arrays, B: int, L: int):
    """Who meets whom.

    Returns:
      sees [B L L]: query i sees key j; uses [B L]: query i sees the given state; adds [B L]: key j
      is in the state at the end; keeps [B]: so is the given state.
    """
    causal = jnp.tril(jnp.ones((L, L), bool))[None]
    if arrays.q_segments is None:
        every = jnp.ones((B, L), bool)
        return causal, every, every, every[:, 0]
    q, kv = arrays.q_segments, arrays.kv_segments
    before = jnp.zeros(B, kv.dtype) if arrays.segment is None else arrays.segment
    after = held(kv, before, L)[:, -1:]
    sees = causal & (q[:, :, None] == kv[:, None]) & (kv != 0)[:, None]
    uses = (q == before[:, None]) & (q != 0)
    return sees, uses, (kv == after) & (kv != 0), (before == after[:, 0]) & (before != 0)


def _exact(arrays: Arrays) -> Arrays:
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return Arrays(*(x if x is None else wide(x) for x in arrays.differentiable), *arrays[9:])
