"""The state of a piece of a row by itself: sums over its keys, for which no query is needed.

Half of a forward pass at most: key features and one product. Whoever divides a row gives each piece
the state before it so, without running the piece twice.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.linear_attention import features as maps
from pallas_kernels.linear_attention.features import dot
from pallas_kernels.linear_attention.state import State, held

# The modules, in the order in which they are tried, and the platform of those that are for one.
IMPLEMENTATIONS = {"tpu_summary": "tpu", "summary": None}
CHUNK = 512  # tokens whose features exist at one time
WHOLE = {0: {3: "head size of k"}, 1: {3: "head size of v"}}


def state_of(
    k: Float[Array, "B L G K"],
    v: Float[Array, "B L G V"],
    *,
    features: str = "identity",
    k_map: Float[Array, "G K f"] | None = None,
    k_bias: Float[Array, "G f"] | None = None,
    kv_segments: Int[Array, "B L"] | None = None,
) -> State:
    """The State that `linear_attention` would give after these keys, with none given before them.

    That is of the last document: 1 without segments, 0 where all is padding. Memory beside the
    arguments and their gradients does not grow with L. Under Explicit mesh axes batch and heads may
    be split; differentiable once, in reverse mode.

    Raises:
      ValueError: shapes, dtypes or features do not fit, k and v are split in different ways, or
        length or head size over a mesh axis.
    """
    _check(k, v, features, k_map, k_bias, kv_segments)
    batch, _, heads, _ = dispatch.spec(k)
    if kv_segments is None:
        last, adds = dispatch.place(jnp.ones(k.shape[0], jnp.int32), batch), None
    else:
        kv_segments = dispatch.place(kv_segments.astype(jnp.int32), batch)
        last = held(kv_segments, jnp.zeros_like(kv_segments[:, 0]), k.shape[1])[:, -1]
        adds = (kv_segments == last[:, None]) & (kv_segments != 0)
    weights = dispatch.place(k_map, heads), dispatch.place(k_bias, heads)
    return State(*_sums(features, *dispatch.vary(k, v, *weights, adds)), last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(form: str, *args):
    def follow(k, *_):
        batch, _, heads, _ = k
        return PartitionSpec(batch, heads, None, None), PartitionSpec(batch, heads, None)

    run = lambda *args: dispatch.like(args, _pick("forward", form, *args))
    return dispatch.local(run, follow=follow, whole=WHOLE)(*args)


def _sums_bwd(form: str, args, cotangents):
    batch = dispatch.split(args[0], 0)

    def run(*args):
        *tokens, dmap, dbias = dispatch.like(args, _pick("backward", form, *args))
        summed = lambda x, of: x if x is None else _sum(x, batch).astype(of.dtype)
        return *tokens, summed(dmap, args[2]), summed(dbias, args[3])

    follow = tuple(None if x is None else i for i, x in enumerate(args[:4]))
    return *dispatch.local(run, follow=follow, whole=WHOLE)(*args, *cotangents), None


_sums.defvjp(lambda form, *args: (_sums(form, *args), args), _sums_bwd)


def _sum(x, axes):
    return jax.lax.psum(x, axes) if axes else x


def _pick(part: str, *args):
    package = __name__.rpartition(".")[0]
    return dispatch.pick(dispatch.choices(package, IMPLEMENTATIONS, part), None, *args)


def forward(form: str, k, v, k_map, k_bias, adds):
    """values [B G F V] and keys [B G F]."""
    chunk, N = _chunks(k, v, adds)

    def step(sums, n):
        k, v, adds = chunk(n)
        phi = _features(form, adds, k, k_map, k_bias).astype(k.dtype)
        new = dot("bjgf,bjgv->bgfv", phi, v), jnp.sum(phi.astype(sums[1].dtype), 1)
        return jax.tree.map(jnp.add, sums, new), None

    (B, _, G, V), exact = v.shape, jnp.promote_types(k.dtype, jnp.float32)
    F = maps.count(form, (k if k_map is None else k_map).shape[-1])
    zeros = jnp.zeros((B, G, F, V), exact), jnp.zeros((B, G, F), exact)
    zeros = dispatch.like((k, v, k_map, k_bias, adds), zeros)
    return jax.lax.scan(step, zeros, jnp.arange(N))[0]


def backward(form: str, k, v, k_map, k_bias, adds, dvalues, dkeys):
    """Gradients of k, v, k_map and k_bias."""
    chunk, N = _chunks(k, v, adds)
    dvalues = dvalues.astype(v.dtype)

    def step(dweights, n):
        k, v, adds = chunk(n)
        phi, pull = jax.vjp(functools.partial(_features, form, adds), k, k_map, k_bias)
        dphi = dot("bjgv,bgfv->bjgf", v, dvalues) + dkeys[:, None]
        dv = dot("bjgf,bgfv->bjgv", phi.astype(k.dtype), dvalues).astype(v.dtype)
        dk, *new = pull(dphi)
        return jax.tree.map(jnp.add, dweights, tuple(new)), (dk, dv)

    zeros = jax.tree.map(jnp.zeros_like, (k_map, k_bias))
    zeros = dispatch.like((k, v, k_map, k_bias, adds, dvalues, dkeys), zeros)
    dweights, of_tokens = jax.lax.scan(step, zeros, jnp.arange(N))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, : k.shape[1]]
    return *map(join, of_tokens), *dweights


def _chunks(k, v, adds):
    """The n-th chunk of k, v and adds, the last one filled up, and how many there are."""
    B, L = k.shape[:2]
    C = min(CHUNK, L)
    N = -(-L // C)
    if L % C and adds is None:
        adds = dispatch.like(k, jnp.ones((B, L), bool))
    fill = lambda x: jnp.pad(x, [(0, 0), (0, N * C - L)] + [(0, 0)] * (x.ndim - 2))
    k, v, adds = jax.tree.map(fill, (k, v, adds))
    cut = lambda n: lambda x: jax.lax.dynamic_slice_in_dim(x, n * C, C, 1)
    return lambda n: jax.tree.map(cut(n), (k, v, adds)), N


def _features(form: str, adds, *given):
    """[B C G F] in float32 or wider, 0 for keys that do not count."""
    phi = maps.of(form, maps.project(*given))
    return phi if adds is None else jnp.where(adds[:, :, None, None], phi, 0)


def _check(k, v, features: str, k_map, k_bias, kv_segments):
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"A state is of k [B L G K] and v [B L G V], not {k.shape}, {v.shape}.")
    if k.dtype != v.dtype:
        raise ValueError(f"k and v need one dtype, not {k.dtype} and {v.dtype}.")
    if any(dispatch.split(k, dim) != dispatch.split(v, dim) for dim in (0, 1, 2)):
        raise ValueError(
            f"k {k.shape} is split like {dispatch.spec(k)}, but v {v.shape} like "
            f"{dispatch.spec(v)}: split them alike."
        )
    if axes := dispatch.split(k, 1):
        raise ValueError(
            f"The length of k, {k.shape[1]}, is split over mesh axes {axes}, and a state is of one "
            f"piece: call this inside a region over them, and join the states by merge."
        )
    (B, L, G, K), f = k.shape, k.shape[3]
    if k_map is not None:
        f = k_map.shape[-1]
        if k_map.shape != (G, K, f):
            raise ValueError(f"k_map must be {(G, K, 'f')}, not {k_map.shape}.")
    if k_bias is not None and (k_map is None or k_bias.shape != (G, f)):
        raise ValueError(f"k_bias must be {(G, f)} and come with k_map, not {k_bias.shape}.")
    if kv_segments is not None and kv_segments.shape != (B, L):
        raise ValueError(f"kv_segments must be {(B, L)}, not {kv_segments.shape}.")
    maps.count(features, f)
