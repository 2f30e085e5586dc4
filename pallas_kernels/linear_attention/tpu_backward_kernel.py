"""The programs of the TPU's backward pass: the keys' states, then gradients from the end on.

Tokens are the lanes of features, [F, C], so that a sum over features adds registers and what
belongs to a token is a row. The weights of a chunk stand as [keys, queries]. States are [F, V].
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention import tpu_tiles
from pallas_kernels.linear_attention.tpu_tiles import LANES, ROWS, folded, turned, whole
from pallas_kernels.products import NN, NT, dot

AHEAD = 4  # chunks whose features are there before the current one's state


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when the kernels are traced.

    form, f: of the features.  R: query heads a step.  T, C: tokens a step and a chunk.
    groups: steps that share a key head, each with R of its query heads.
    mapped, biased: whether z = x W, and + b.  masked: whether there are rows of `tpu_tiles.tokens`.
    state: whether the given state has a gradient.
    """

    form: str
    f: int
    R: int
    T: int
    C: int
    groups: int
    mapped: bool
    biased: bool
    masked: bool
    state: bool

    @property
    def m(self) -> int:
        """Chunks a step."""
        return self.T // self.C

    @property
    def halves(self) -> int:
        """Pieces of the features: one of z, and one of -z where the form has it."""
        return 1 + (self.form in tpu_tiles.PAIRED)

    @property
    def F(self) -> int:
        """Rows of features."""
        return tpu_tiles.width(self.form, self.f)


@dataclasses.dataclass
class Refs:
    """The kernels' memory, None for what is not there. Of one key head and T tokens:

    tokens [8 T]; q, g, dq [R T ..], k, v, dk, dv [T ..]; e [R 1 T]; maps [R f K] and [f K], biases
    [R f 128] and [f 128], of which every lane is alike, and of their gradients adds up.
    values [F V] and keys [1 F]: of the state, given and before each chunk (`states`, `counts`).
    dvalues [F V] and dkeys [F 128]: of the state at the end, and those of the given one.
    """

    tokens: jax.Ref | None = None
    q: jax.Ref | None = None
    k: jax.Ref | None = None
    v: jax.Ref | None = None
    g: jax.Ref | None = None
    e: jax.Ref | None = None
    q_map: jax.Ref | None = None
    k_map: jax.Ref | None = None
    q_bias: jax.Ref | None = None
    k_bias: jax.Ref | None = None
    values: jax.Ref | None = None
    keys: jax.Ref | None = None
    states: jax.Ref | None = None
    counts: jax.Ref | None = None
    last_values: jax.Ref | None = None
    last_keys: jax.Ref | None = None
    dq: jax.Ref | None = None
    dk: jax.Ref | None = None
    dv: jax.Ref | None = None
    dq_map: jax.Ref | None = None
    dk_map: jax.Ref | None = None
    dq_bias: jax.Ref | None = None
    dk_bias: jax.Ref | None = None
    dvalues: jax.Ref | None = None
    dkeys: jax.Ref | None = None
    sum_values: jax.Ref | None = None
    sum_keys: jax.Ref | None = None


def states_kernel(plan: Plan, names, *refs):
    """Writes the keys' state before each chunk of T tokens, of the chunks in their order."""
    refs, n = Refs(**dict(zip(names, refs, strict=True))), pl.program_id(1)
    _start(refs, n, refs.values, refs.keys)
    ready = [_key_features(plan, refs, c) for c in range(min(AHEAD, plan.m))]
    for c in range(plan.m):
        if c + AHEAD < plan.m:
            ready.append(_key_features(plan, refs, c + AHEAD))
        refs.states[c] = refs.sum_values[...].astype(refs.states.dtype)
        refs.counts[c] = refs.sum_keys[...]
        rows, v = _rows(plan, refs, c), refs.v[_tokens(plan, c)]
        phi = _masked(ready[c], rows, tpu_tiles.ADDS).astype(v.dtype)
        _keep(refs, rows)
        refs.sum_values[...] += dot(phi, v, NN)
        refs.sum_keys[...] += dot(jnp.ones((ROWS, plan.C), v.dtype), phi, NT)[:1]


def _key_features(plan: Plan, refs: Refs, c: int):
    k = refs.k[_tokens(plan, c)]
    return tpu_tiles.features(plan.form, _project(plan, k, refs.k_map, refs.k_bias), plan.f)


def kernel(plan: Plan, names, *refs):
    """Gradients of T tokens, of the last ones first, from those of all that the state after sees.

    The sums over queries R = sum phi_q g^T are in `sum_values`, those of phi_q e, each lane for its
    own tokens, in `sum_keys`. Each stage of the work is a chunk ahead of the next, so that the
    vector unit has work beside each chunk's products.
    """
    refs, n = Refs(**dict(zip(names, refs, strict=True))), pl.program_id(1)
    _start(refs, n, refs.last_values, refs.last_keys)
    for total in (refs.dq_map, refs.dk_map, refs.dq_bias, refs.dk_bias):
        if total is not None:
            total[...] = jnp.where(n == 0, 0.0, total[...])
    chunks = {c: Chunk(plan, refs, c) for c in reversed(range(plan.m))}
    items = [(chunk, r) for chunk in chunks.values() for r in range(plan.R)]
    stages = [Chunk.features, Chunk.weights, Chunk.sums, Chunk.finish]
    for t in range(len(items) + len(stages) - 1):
        for late, stage in enumerate(stages):
            if 0 <= t - late < len(items):
                stage(*items[t - late])
    if plan.state:
        refs.dvalues[...], refs.dkeys[...] = refs.sum_values[...], refs.sum_keys[...]


class Chunk:
    """A chunk's gradients in four stages, each of them for one query head after the other."""

    def __init__(self, plan: Plan, refs: Refs, c: int):
        self.plan, self.refs, self.c = plan, refs, c
        self.at, self.own = _tokens(plan, c), {}

    def features(self, r: int):
        """Features of the keys, once, and of the queries."""
        plan, refs = self.plan, self.refs
        if r == 0:
            self.rows = _rows(plan, refs, self.c)
            k = refs.k[self.at]
            self.z = _project(plan, k, refs.k_map, refs.k_bias)
            # Padding inside a document lies between keys that are seen.
            exact = tpu_tiles.features(plan.form, self.z, plan.f)
            self.exact = _masked(exact, self.rows, tpu_tiles.REAL)
            self.phi = self.exact.astype(k.dtype)
            self.keys = turned(self.phi)[:, : plan.F]
        q = refs.q[r, self.at]
        z = _project(plan, q, _of(refs.q_map, r), _of(refs.q_bias, r))
        exact = tpu_tiles.features(plan.form, z, plan.f)
        self.own[r] = z, exact, exact.astype(q.dtype)

    def weights(self, r: int):
        """The weights and their derivatives, [keys, queries]."""
        plan, refs = self.plan, self.refs
        v, g, e = refs.v[self.at], refs.g[r, self.at], refs.e[r, :, self.at]
        ends = self.rows[: tpu_tiles.LAST + 1] if self.rows else (None, None)
        seen = tpu_tiles.seen(*ends, plan.C)
        a = jnp.where(seen, dot(self.keys, self.own[r][2], NN), 0.0)
        da = jnp.where(seen, dot(v, g, NT) + e, 0.0)
        self.own[r] += a.astype(v.dtype), da.astype(v.dtype)

    def sums(self, r: int):
        """Gradients of features and values; goes on with the sums over queries."""
        refs, (z, exact, phi, a, da) = self.refs, self.own[r]
        g, e, v = refs.g[r, self.at], refs.e[r, :, self.at], refs.v[self.at]
        if r == 0:
            self.start_keys(v)
        self.dv += dot(a, g, NN)
        self.dphi += dot(phi, da, NT)
        used = dot(refs.states[self.c], g, NT) + self.counts * e
        dphi = dot(self.phi, da, NN) + _masked(used, self.rows, tpu_tiles.USES)
        refs.sum_values[...] += dot(_masked(phi, self.rows, tpu_tiles.USES), g, NN)
        e = _masked(e, self.rows, tpu_tiles.USES)
        refs.sum_keys[...] += folded(phi.astype(jnp.float32) * e)
        self.own[r] = z, exact, dphi

    def start_keys(self, v):
        """What the keys get from the queries of later chunks."""
        refs, width = self.refs, self.plan.C
        after = refs.sum_values[...].astype(v.dtype)
        each = jnp.sum(refs.sum_keys[...], 1, keepdims=True)
        self.dphi = _masked(dot(after, v, NT) + each, self.rows, tpu_tiles.ADDS)
        added = self.keys
        if self.rows:
            added = turned(_masked(self.phi, self.rows, tpu_tiles.ADDS))[:, : self.plan.F]
        self.dv = dot(added, after, NN)
        _keep(refs, self.rows)
        column = turned(jnp.broadcast_to(refs.counts[self.c], (LANES, self.plan.F)))
        self.counts = jnp.tile(column[: self.plan.F], (1, width // LANES))

    def finish(self, r: int):
        """Gradients of q, and after the last head of k and v."""
        plan, refs, (z, exact, dphi) = self.plan, self.refs, self.own.pop(r)
        dz = tpu_tiles.features_back(plan.form, z, exact, dphi, plan.f)
        weight = refs.q_map, refs.dq_map, refs.dq_bias
        q = refs.q[r, self.at]
        refs.dq[r, self.at] = _unproject(dz, q, *(_of(x, r) for x in weight)).astype(q.dtype)
        if r < plan.R - 1:
            return
        refs.dv[self.at] = self.dv.astype(refs.dv.dtype)
        dphi = _masked(self.dphi, self.rows, tpu_tiles.REAL)
        dz = tpu_tiles.features_back(plan.form, self.z, self.exact, dphi, plan.f)
        k = refs.k[self.at]
        dk = _unproject(dz, k, refs.k_map, refs.dk_map, refs.dk_bias)
        refs.dk[self.at] = dk.astype(refs.dk.dtype)


def _start(refs: Refs, n, values, keys):
    """Takes what the sums are before the first step."""
    for total, given in ((refs.sum_values, values), (refs.sum_keys, keys)):
        total[...] = jnp.where(n == 0, given[...], total[...])


def _keep(refs: Refs, rows):
    """Drops the sums where the state does not go on."""
    if rows:
        keeps = rows[tpu_tiles.KEEPS][:, :1].astype(jnp.float32)
        for total in (refs.sum_values, refs.sum_keys):
            total[...] = total[...] * keeps


def _tokens(plan: Plan, c: int):
    return pl.ds(c * plan.C, plan.C)


def _rows(plan: Plan, refs: Refs, c: int):
    """Rows [1, C] of `tpu_tiles.tokens`, or None."""
    if not plan.masked:
        return None
    return [refs.tokens[pl.ds(n, 1), _tokens(plan, c)] for n in range(6)]


def _masked(x, rows, which: int):
    """x [.., tokens], 0 where the row has 0."""
    return x if rows is None else x * rows[which].astype(jnp.float32).astype(x.dtype)


def _of(ref, r: int):
    return ref if ref is None else ref.at[r]


def _project(plan: Plan, x, weight, bias):
    """z [f, C] of x [C, K]."""
    if weight is None:
        return turned(x)[: whole(plan.f, ROWS)].astype(jnp.float32)
    z = dot(weight[...], x, NT)
    return z if bias is None else z + jnp.tile(bias[...], (1, x.shape[0] // LANES))


def _unproject(dz, x, weight, dweight, dbias):
    """The gradient of x [C, K] from that of z [f, C]; adds those of the map and the bias."""
    if dbias is not None:
        dbias[...] += folded(dz)
    dz = dz.astype(x.dtype)
    back = turned(dz)
    if weight is None:
        return back[:, : x.shape[1]]
    dweight[...] += dot(dz, x, NN)
    return dot(back[:, : dz.shape[0]], weight[...], NN)
