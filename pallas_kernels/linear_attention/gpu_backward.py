"""Gradients of linear attention on Hopper: a sweep forward for queries, one back for keys.

With g = do / total and e = dtotal - g . o the derivative of a weight a_ij is g_i . v_j + e_i. The
sweep forward carries the keys' sums S = sum phi_k v^T and z = sum phi_k, the one back the queries'
R = sum phi_q g^T and r = sum phi_q e. Feature maps and what leads back through them are XLA's, as
are the states between the pieces of a row that is cut to keep all multiprocessors busy.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention import gpu_tiles as tiles
from pallas_kernels.linear_attention import features, gpu_backward_rings
from pallas_kernels.linear_attention.gpu_backward_keys import Keys
from pallas_kernels.linear_attention.gpu_backward_queries import Queries
from pallas_kernels.linear_attention.gpu_backward_sweep import (
    EIGHT,
    PARTIAL_KEYS,
    RESET,
    UNUSED,
    C,
    Plan,
)
from pallas_kernels.linear_attention.reference import Arrays, Options
from pallas_kernels.linear_attention.state import held

SIZES = {"queries_f": (64, 128, 256), "keys_f": (64, 128, 256), "block_v": (64, 128)}


@dataclasses.dataclass(frozen=True)
class Backward:
    """How the gradients' kernels are cut; None leaves a size to `heuristic`.

    Attributes:
      queries_f, keys_f: features a thread block of each sweep has, 64, 128 or 256.
      block_v: columns of values a thread block has, 64 or 128.
      stages: tiles in shared memory at once, as many as fit but at most this.
      pieces: in which a row is cut, whose states XLA works out first.

    Raises:
      ValueError: sizes that the kernels are not made for.
    """

    queries_f: int | None = None
    keys_f: int | None = None
    block_v: int | None = None
    stages: int = 2
    pieces: int | None = None

    def __post_init__(self):
        for name, sizes in SIZES.items():
            if getattr(self, name) not in (None, *sizes):
                known = ", ".join(map(str, sizes))
                raise ValueError(f"{name} is one of {known} or None, not {getattr(self, name)}.")
        for name in ("stages", "pieces"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")


def heuristic(B: int, L: int, H: int, G: int, F: int, V: int) -> Backward:
    """What fits registers and keeps the multiprocessors busy, for F features and values of V."""
    most = next((size for size in (64, 128) if size >= F), 256)
    # A loop over the query heads of a key head takes registers that 256 features leave not.
    most = most if H == G else min(most, 128)
    block_v = 64 if V <= 64 else 128
    blocks = B * G * -(-F // most) * -(-V // block_v)
    # A piece of fewer than eight chunks costs more in states than it gains.
    pieces = max(1, min(tiles.cores() // blocks, -(-L // C) // 8))
    return Backward(most, most, block_v, 2, pieces)


def backward(
    arrays: Arrays, o, total, do, dtotal, dvalues, dkeys, options: Options, config: Backward
):
    """Gradients of `arrays.differentiable`, None for what is None, as `xla.backward`.

    Args:
      arrays: q, k, v of 16 bits.
      o, do: [B L H V].  total, dtotal: [B L H].  dvalues: [B G F V].  dkeys: [B G F].
      options: `features`, any form.
      config: None in it is filled in.

    Raises:
      ValueError: a configuration that registers or shared memory do not allow.
    """
    dtype = arrays.q.dtype
    q, k = (arrays.q, arrays.q_map, arrays.q_bias), (arrays.k, arrays.k_map, arrays.k_bias)
    phi_q, phi_k = (features.of(options.features, _project(*x)).astype(dtype) for x in (q, k))
    g = do.astype(jnp.float32) / total[..., None]
    e = dtotal - jnp.sum(g * o.astype(jnp.float32), -1)
    row = _Row(arrays, phi_q, phi_k, g.astype(dtype), e, config)
    dphi_q = row.queries()
    dphi_k, dv, dstate = row.keys(dvalues, dkeys)
    dq, dq_map, dq_bias = _map_back(options.features, *q, dphi_q)
    dk, dk_map, dk_bias = _map_back(options.features, *k, dphi_k)
    return dq, dk, dv, dq_map, dk_map, dq_bias, dk_bias, *dstate


def _project(x, weight, bias):
    """As `features.project`; the CPU has no products of 16-bit factors for every layout."""
    if tiles.interpreting() and weight is not None:
        x, weight = x.astype(jnp.float32), weight.astype(x.dtype)
    return features.project(x, weight, bias)


def _map_back(form: str, x, weight, bias, dphi):
    """Gradients of x, weight and bias: products of 16-bit factors, as tensor cores take them."""
    _, pull = jax.vjp(lambda z: features.of(form, z), _project(x, weight, bias))
    (dz,) = pull(dphi)
    if weight is None:
        return dz, None, None
    rounded = dz.astype(x.dtype)
    dx = _dot("blhf,hkf->blhk", rounded, weight.astype(x.dtype))
    dweight = _dot("blhk,blhf->hkf", x, rounded)
    return dx, dweight, None if bias is None else dz.sum((0, 1))


def _dot(subscripts: str, a, b):
    if tiles.interpreting():
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


class _Row:
    """The arrays of both sweeps, padded to whole chunks, pieces and tiles."""

    def __init__(self, arrays: Arrays, phi_q, phi_k, g, e, config: Backward):
        (B, L, H, self.F), (G, self.V) = phi_q.shape, arrays.v.shape[2:]
        guess = heuristic(B, L, H, G, self.F, self.V)
        missing = {n: x for n, x in vars(guess).items() if getattr(config, n) is None}
        config = dataclasses.replace(config, **missing)
        if H != G and config.keys_f > 128:
            raise ValueError(
                f"{H} query heads for {G} key heads leave registers for keys_f up to 128, not "
                f"{config.keys_f}."
            )
        self.arrays, self.config, self.L = arrays, config, L
        self.pieces = min(config.pieces, -(-L // C))
        self.N = -(-L // (C * self.pieces))
        widest = max(config.queries_f, config.keys_f)
        self.wide = -(-self.F // widest) * widest
        self.given = dict(
            q=self.pad(phi_q, self.wide),
            k=self.pad(phi_k, self.wide),
            v=self.pad(arrays.v, -(-self.V // config.block_v) * config.block_v),
            g=self.pad(g, -(-self.V // config.block_v) * config.block_v),
            e=self.pad(e).swapaxes(1, 2),
        )
        self.sizes = dict(B=B, H=H, G=G, F=self.wide, V=self.given["v"].shape[3])
        self.held = None
        if arrays.q_segments is not None:
            self.given |= self.segments()

    def pad(self, x, columns: int | None = None):
        """Zeros behind the tokens and the columns: what is 0 takes no part in any sum."""
        tokens = self.pieces * self.N * C - self.L
        width = [(0, 0), (0, tokens)] + [(0, 0)] * (x.ndim - 2)
        if columns is not None:
            width[-1] = (0, columns - x.shape[-1])
        return jnp.pad(x, width) if np.any(width) else x

    def segments(self) -> dict:
        q, kv = (self.pad(x) for x in (self.arrays.q_segments, self.arrays.kv_segments))
        segment = self.arrays.segment
        before = jnp.zeros_like(kv[:, 0]) if segment is None else segment
        self.held = held(kv, before, C)
        in_chunks = lambda x: x.reshape(x.shape[0], -1, C)
        mine = lambda x, document: (
            (in_chunks(x) == document[..., None]) & (in_chunks(x) != 0)
        ).all(2)
        before, after = self.held[:, :-1], self.held[:, 1:]
        flags = jnp.where(mine(kv, after), 0, PARTIAL_KEYS) + jnp.where(mine(q, before), 0, UNUSED)
        flags = flags + jnp.where(before == after, 0, RESET)
        return dict(q_ids=q, kv_ids=kv, held=self.held, flags=flags.astype(jnp.int32))

    def plan(self, f: int, enters: bool, leaves: bool) -> Plan:
        own = dict(N=self.N, pieces=self.pieces, f=f, v=self.config.block_v)
        own |= dict(stages=self.config.stages, segments=self.held is not None)
        return Plan(**self.sizes, **own, enters=enters, leaves=leaves)

    def inputs(self, names: str, **more) -> dict:
        segments = ("q_ids", "kv_ids", "held", "flags") if self.held is not None else ()
        return {n: self.given[n] for n in (*names, *segments)} | more

    def queries(self):
        """dphi_q [B L H F]."""
        arrays, dtype = self.arrays, self.arrays.q.dtype
        enters = self.pieces > 1 or arrays.values is not None
        plan = self.plan(self.config.queries_f, enters, False)
        ones = np.zeros((EIGHT, C), dtype)
        ones[0] = 1
        inputs = self.inputs("kvge", ones=jnp.asarray(ones))
        if enters:
            start = arrays.values, arrays.keys
            if arrays.values is None:
                B, G = plan.B, plan.G
                start = jnp.zeros((B, G, self.F, self.V)), jnp.zeros((B, G, self.F))
            inputs |= self.between("k", *start)
        shape = (plan.parts[1], *self.given["q"].shape)
        outputs = dict(dphi=jax.ShapeDtypeStruct(shape, jnp.float32))
        name = "linear_attention_backward_q"
        found = gpu_backward_rings.call(Queries, plan, dtype, name, inputs, outputs)
        return self.total(found["dphi"], self.F)

    def keys(self, dvalues, dkeys):
        """dphi_k [B L G F], dv [B L G V] and the gradients of the state before, or None."""
        dtype, leaves = self.arrays.q.dtype, self.arrays.values is not None
        plan = self.plan(self.config.keys_f, True, leaves)
        inputs = self.inputs("qkvge", e8=self.eight(), **self.between("q", dvalues, dkeys))
        kind = dtype if max(plan.parts) == 1 else jnp.float32
        like = lambda parts, name: (parts, *self.given[name].shape)
        shapes = dict(dphi=like(plan.parts[1], "k"), dv=like(plan.parts[0], "v"))
        outputs = {n: jax.ShapeDtypeStruct(shape, kind) for n, shape in shapes.items()}
        if leaves:
            B, G, F, V = plan.B, plan.G, plan.F, plan.V
            outputs |= dict(values_out=jax.ShapeDtypeStruct((B, G, F, V), jnp.float32))
            outputs |= dict(keys_out=jax.ShapeDtypeStruct((plan.parts[1], B, G, F), jnp.float32))
        name = "linear_attention_backward_k"
        found = gpu_backward_rings.call(Keys, plan, dtype, name, inputs, outputs)
        dstate = None, None
        if leaves:
            values = found["values_out"][:, :, : self.F, : self.V]
            dstate = values, found["keys_out"][0, ..., : self.F]
        dv = self.total(found["dv"], self.V).astype(dtype)
        return self.total(found["dphi"], self.F), dv, dstate

    def total(self, parts, columns: int):
        whole = parts[0] if len(parts) == 1 else parts.sum(0)
        return whole[:, : self.L, :, :columns].astype(jnp.float32)

    def eight(self):
        """e in three terms of 16 bits, [B H 8 L]: products with them are as exact as float32."""
        terms, rest = [], self.given["e"]
        for _ in range(3):
            terms.append(rest.astype(self.arrays.q.dtype))
            rest = rest - terms[-1].astype(jnp.float32)
        x = jnp.stack(terms, 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, EIGHT - 3), (0, 0)))

    def between(self, name: str, values, keys) -> dict:
        """The states on entering each piece: `values_in` [P B G F V] and `keys_in` [P B G F]."""
        G, F, V = (self.sizes[n] for n in "GFV")
        width = (0, 0), (0, 0), (0, F - values.shape[2])
        values, keys = jnp.pad(values, (*width, (0, V - values.shape[3]))), jnp.pad(keys, width)
        if self.pieces == 1:
            return dict(values_in=values[None], keys_in=keys[None])
        phi, right = self.given[name], self.given["v" if name == "k" else "g"]
        if name == "k":
            last = jnp.ones((*right.shape[:3], 1), right.dtype)
        else:
            last = self.eight().transpose(0, 3, 1, 2)
        right = jnp.concatenate([right, last], -1)
        keep = jnp.ones((self.pieces, phi.shape[0]), bool)
        if self.held is not None:
            edges = self.held[:, :: self.N]
            ids, document = ("kv_ids", edges[:, 1:]) if name == "k" else ("q_ids", edges[:, :-1])
            ids = self.cut(self.given[ids])
            mine = (ids == document.T[:, :, None]) & (ids != 0)
            keep = (edges[:, 1:] == edges[:, :-1]).T
        cut = lambda x: self.cut(x).reshape(
            self.pieces, x.shape[0], -1, G, x.shape[2] // G, x.shape[3]
        )
        phi, right = cut(phi), cut(right)
        if self.held is not None:
            phi = jnp.where(mine[..., None, None, None], phi, 0)
        new = _dot("pblgrf,pblgrv->pbgfv", phi, right)
        new = new[..., :V], new[..., V:].sum(-1)

        def step(state, piece):
            *new, keep = piece
            kept = (jnp.where(keep.reshape(-1, *(1,) * (x.ndim - 1)), x, 0) for x in state)
            return tuple(x + n for x, n in zip(kept, new, strict=True)), state

        _, found = jax.lax.scan(step, (values, keys), (*new, keep), reverse=name == "q")
        return dict(zip(("values_in", "keys_in"), found, strict=True))

    def cut(self, x):
        """[B L ..] as [P B l ..]."""
        x = x.reshape(x.shape[0], self.pieces, -1, *x.shape[2:])
        return x.swapaxes(0, 1)
