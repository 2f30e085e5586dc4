"""Linear attention in chunks, in plain XLA: a scan that carries the state, and two for gradients.

With g = do / total and e = dtotal - g . o, the derivative of weight a_ij is g_i . v_j + e_i. A
query's gradient so needs the state of the keys before it, and a key's that of the queries after
it, sum_i phi_q g^T and sum_i phi_q e: one sweep goes forward and one comes back, and nothing that
grows with the length is kept but what `linear_attention` took and gave.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.linear_attention import features
from pallas_kernels.linear_attention.features import dot
from pallas_kernels.linear_attention.reference import EPS, Arrays, Options
from pallas_kernels.linear_attention.state import held

CHUNK = {"cpu": 64}  # tokens; the weights inside a chunk cost as many products a token
LARGE_CHUNK = 256  # where launching a step costs more


class Who(NamedTuple):
    """Who meets whom in a chunk: masks that broadcast to what they are for.

    sees [B 1 1 C C]: query i sees key j.  uses [B C 1 1]: the state before.  adds [B C 1 1]: key j
    is in the state after.  keeps [B 1 1]: so is the state before.
    """

    sees: Any
    uses: Any
    adds: Any
    keeps: Any


def forward(arrays: Arrays, options: Options):
    """o, total, values and keys, as `reference.forward`."""
    B, L, H, _ = arrays.q.shape
    cut = _Cut(arrays, options)

    def step(state, n):
        who, v = cut.who(n), cut("v", n)
        phi_q, phi_k = cut.queries(n), cut.keys(n)
        a = jnp.where(who.sees, dot("bigrf,bjgf->bgrij", phi_q, phi_k), 0)
        used = jnp.where(who.uses[..., None], phi_q, 0)
        num = dot("bgrij,bjgv->bigrv", a.astype(v.dtype), v)
        num = num + dot("bigrf,bgfv->bigrv", used, state[0].astype(v.dtype))
        total = jnp.einsum("bgrij->bigr", a) + _exact("bigrf,bgf->bigr", used, state[1]) + EPS
        o = (num / total[..., None]).astype(arrays.q.dtype)
        return _after(who, state, phi_k, v), (o, total)

    state, (o, total) = jax.lax.scan(step, cut.start(), jnp.arange(cut.N))
    return cut.tokens(o).reshape(B, L, H, -1), cut.tokens(total).reshape(B, L, H), *state


def backward(arrays: Arrays, o, total, do, dtotal, dvalues, dkeys, options: Options):
    """Gradients of `arrays.differentiable`, None for what is None."""
    g = do.astype(jnp.float32) / total[..., None]
    e = dtotal - jnp.sum(g * o.astype(jnp.float32), -1)
    cut = _Cut(arrays, options, g=g.astype(arrays.v.dtype), e=e)
    dq, dq_map, dq_bias = _queries_back(cut)
    dk, dv, dk_map, dk_bias, dstate = _keys_back(cut, (dvalues, dkeys))
    dstate = (None, None) if arrays.values is None else dstate
    return dq, dk, dv, dq_map, dk_map, dq_bias, dk_bias, *dstate


def _queries_back(cut):
    """Gradients of q, q_map and q_bias: forward through the keys' state."""

    def step(carry, n):
        state, dmap, dbias = carry
        who, v, g, e = cut.who(n), cut("v", n), cut("g", n), cut("e", n)
        (_, pull), phi_k = cut.queries(n, vjp=True), cut.keys(n)
        da = _weights_back(who, g, e, v)
        dphi = dot("bgrij,bjgf->bigrf", da.astype(v.dtype), phi_k)
        used = dot("bigrv,bgfv->bigrf", g, state[0].astype(v.dtype))
        used = used + e[..., None] * state[1][:, None, :, None]
        dphi = dphi + jnp.where(who.uses[..., None], used, 0)
        dq, *of_map = pull(dphi)
        return (_after(who, state, phi_k, v), *_add((dmap, dbias), of_map)), dq

    zeros = cut.zeros(cut.arrays.q_map), cut.zeros(cut.arrays.q_bias)
    (_, dmap, dbias), dq = jax.lax.scan(step, (cut.start(), *zeros), jnp.arange(cut.N))
    return cut.tokens(dq), dmap, dbias


def _keys_back(cut, dstate):
    """Gradients of k, v, k_map, k_bias and the given state: back through the queries' sums."""

    def step(carry, n):
        (values, keys), dmap, dbias = carry
        who, v, g, e = cut.who(n), cut("v", n), cut("g", n), cut("e", n)
        phi_q, (phi_k, pull) = cut.queries(n), cut.keys(n, vjp=True)
        a = jnp.where(who.sees, dot("bigrf,bjgf->bgrij", phi_q, phi_k), 0).astype(v.dtype)
        da = _weights_back(who, g, e, v).astype(v.dtype)
        added = jnp.where(who.adds, phi_k, 0)
        dv = dot("bgrij,bigrv->bjgv", a, g) + dot("bjgf,bgfv->bjgv", added, values.astype(v.dtype))
        dadded = dot("bjgv,bgfv->bjgf", v, values.astype(v.dtype)) + keys[:, None]
        dphi = dot("bgrij,bigrf->bjgf", da, phi_q) + jnp.where(who.adds, dadded, 0)
        dk, *of_map = pull(dphi)
        used = jnp.where(who.uses[..., None], phi_q, 0)
        keep = lambda x: jnp.where(who.keeps.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
        values = keep(values) + dot("bigrf,bigrv->bgfv", used, g)
        keys = keep(keys) + _exact("bigrf,bigr->bgf", used, e)
        return ((values, keys), *_add((dmap, dbias), of_map)), (dk, dv.astype(cut.arrays.v.dtype))

    zeros = cut.zeros(cut.arrays.k_map), cut.zeros(cut.arrays.k_bias)
    carry = (dstate, *zeros)
    carry, (dk, dv) = jax.lax.scan(step, carry, jnp.arange(cut.N), reverse=True)
    dstate, dmap, dbias = carry
    return cut.tokens(dk), cut.tokens(dv), dmap, dbias, dstate


def _weights_back(who: Who, g, e, v):
    """Derivatives of the weights [B G R C C], 0 where nothing is seen."""
    da = dot("bigrv,bjgv->bgrij", g, v) + jnp.einsum("bigr->bgri", e)[..., None]
    return jnp.where(who.sees, da, 0)


def _after(who: Who, state, phi_k, v):
    """The state after a chunk, from that before it."""
    added = jnp.where(who.adds, phi_k, 0)
    new = dot("bjgf,bjgv->bgfv", added, v), jnp.sum(added.astype(jnp.float32), 1)
    keep = lambda x: jnp.where(who.keeps.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
    return tuple(keep(old) + n for old, n in zip(state, new, strict=True))


class _Cut:
    """The arguments in N chunks of C tokens, the last one filled up with padding."""

    def __init__(self, arrays: Arrays, options: Options, **rows):
        B, L = arrays.q.shape[:2]
        C = min(CHUNK.get(dispatch.platform(), LARGE_CHUNK), L)
        self.N = -(-L // C)
        if arrays.q_segments is None and L % C:
            ones = jnp.ones((B, L), jnp.int32)
            arrays = arrays._replace(q_segments=ones, kv_segments=ones, segment=ones[:, 0])
        self.arrays, self.options, self.C, self.L = arrays, options, C, L
        R = arrays.q.shape[2] // arrays.k.shape[2]
        rows = {n: x.reshape(B, L, -1, R, *x.shape[3:]) for n, x in rows.items()}
        rows |= dict(q=arrays.q, k=arrays.k, v=arrays.v)
        if arrays.q_segments is not None:
            rows |= dict(q_segments=arrays.q_segments, kv_segments=arrays.kv_segments)
            before = jnp.zeros(B, jnp.int32) if arrays.segment is None else arrays.segment
        fill = lambda x: jnp.pad(x, [(0, 0), (0, self.N * C - L)] + [(0, 0)] * (x.ndim - 2))
        self.rows = {n: fill(x) for n, x in rows.items()}
        if arrays.q_segments is not None:
            self.held = held(self.rows["kv_segments"], before, C)

    def __call__(self, name: str, n):
        """Chunk n of an array, [B C ..]."""
        return jax.lax.dynamic_slice_in_dim(self.rows[name], n * self.C, self.C, 1)

    def tokens(self, chunks):
        """[N B C ..] as [B L ..]."""
        x = jnp.moveaxis(chunks, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.L]

    def queries(self, n, vjp: bool = False):
        """Features [B C G R F] of a chunk's queries, with what pulls their gradients back."""
        G = self.arrays.k.shape[2]
        split = lambda x: x.reshape(*x.shape[:2], G, -1, x.shape[3])
        given = self("q", n), self.arrays.q_map, self.arrays.q_bias
        return _features(self.options.features, split, given, vjp)

    def keys(self, n, vjp: bool = False):
        """Features [B C G F] of a chunk's keys, with what pulls their gradients back."""
        given = self("k", n), self.arrays.k_map, self.arrays.k_bias
        return _features(self.options.features, lambda x: x, given, vjp)

    def who(self, n) -> Who:
        causal = jnp.tril(jnp.ones((self.C, self.C), bool))[None, None, None]
        if self.arrays.q_segments is None:
            every = jnp.ones((1, 1, 1, 1), bool)
            return Who(causal, every, every, every[0])
        q, kv = self("q_segments", n), self("kv_segments", n)
        before, after = self.held[:, n, None], self.held[:, n + 1, None]
        sees = causal & ((q[:, :, None] == kv[:, None]) & (kv != 0)[:, None])[:, None, None]
        wide = lambda x: x[:, :, None, None]
        keeps = (before == after)[:, :, None]
        return Who(sees, wide((q == before) & (q != 0)), wide((kv == after) & (kv != 0)), keeps)

    def start(self):
        """The state before the first chunk."""
        if self.arrays.values is not None:
            return self.arrays.values, self.arrays.keys
        B, _, G, V = self.arrays.v.shape
        widest = self.arrays.k if self.arrays.k_map is None else self.arrays.k_map
        F = features.count(self.options.features, widest.shape[-1])
        zeros = jnp.zeros((B, G, F, V), jnp.float32), jnp.zeros((B, G, F), jnp.float32)
        return dispatch.like(self.arrays, zeros)

    def zeros(self, weight):
        """For sums of a weight's gradient; None for None."""
        zeros = None if weight is None else jnp.zeros(weight.shape, jnp.float32)
        return dispatch.like(self.arrays, zeros)


def _features(form: str, shape, given, vjp: bool):
    """Features in the dtype of the products, rounded once; with vjp also the way back."""
    run = lambda *given: shape(features.of(form, features.project(*given)))
    if not vjp:
        return run(*given).astype(given[0].dtype)
    phi, pull = jax.vjp(run, *given)
    return phi.astype(given[0].dtype), pull


def _add(sums, more):
    return tuple(s if s is None else s + m for s, m in zip(sums, more, strict=True))


def _exact(subscripts: str, a, b):
    """A product with a float32 sum that stays float32: the normaliser is not rounded."""
    return jnp.einsum(subscripts, a.astype(jnp.float32), b)
