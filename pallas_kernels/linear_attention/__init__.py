"""Causal linear attention with its normaliser, feature maps, packed segments and a state."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.linear_attention import features as maps
from pallas_kernels.linear_attention.reference import Arrays, Options
from pallas_kernels.linear_attention.state import State, held, merge

__all__ = ["IMPLEMENTATIONS", "State", "linear_attention", "merge"]

# The modules, in the order in which implementation=None tries them, and the platform of those that
# are for one. Each offers `forward` and `backward`. What no GPU has run yet is asked for by name.
IMPLEMENTATIONS = {"pallas_tpu": "tpu", "xla": None, "pallas_gpu": "gpu", "reference": None}
TUNED = ("pallas_tpu", "pallas_gpu")
# Dimensions that a kernel needs in one piece, by the argument's place in `Arrays`.
WHOLE = {0: {1: "length of q", 3: "head size of q"}, 1: {1: "length of k", 3: "head size of k"}}
WHOLE |= {2: {1: "length of v", 3: "head size of v"}, 7: {2: "features", 3: "head size of v"}}


def linear_attention(
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L G K"],
    v: Float[Array, "B L G V"],
    *,
    features: str = "identity",
    q_map: Float[Array, "H K f"] | None = None,
    k_map: Float[Array, "G K f"] | None = None,
    q_bias: Float[Array, "H f"] | None = None,
    k_bias: Float[Array, "G f"] | None = None,
    q_segments: Int[Array, "B L"] | None = None,
    kv_segments: Int[Array, "B L"] | None = None,
    state: State | None = None,
    implementation: str | None = None,
    config: Any = None,
) -> tuple[Float[Array, "B L H V"], Float[Array, "B L H"], State]:
    """Linear attention, `o_i = sum_j a_ij v_j / total_i`, `total_i = eps + sum_j a_ij`.

    `a_ij = phi(q_i) . phi(k_j)` over the keys `j <= i` of query i's document, and eps 1e-12. Query
    head h reads key head `h // (H / G)`. Key j is of query i's document if their segments are equal
    and not 0. A document's queries and keys must be one run each of the row, but for padding, and
    its keys may come later than its queries, not earlier: a row of keys shifted to the right by w
    is attention to what is w or more tokens back. With `state` the row goes on where another ended:
    queries of the state's document see its keys too; without segments the row is of that document.
    A query that sees nothing has o = 0 and total = eps.

    Features and sums are float32; products are of the inputs' dtype, that with the normaliser's sum
    excepted. Cost and memory grow with L, not its square.

    Under Explicit mesh axes batch and heads may be split; differentiable once, in reverse mode,
    state in and out included. o and total bear the checkpoint name 'attention'.

    Args:
      q, k, v: queries, keys and values of one dtype.
      features: the form of phi, see `linear_attention.features`.
      q_map, k_map: W of z = x W, for each head; both or neither.
      q_bias, k_bias: b of z = x W + b; both or neither, and only with maps.
      q_segments, kv_segments: documents of a packed row, 0 is padding; both or neither.
      state: of the tokens before, none by default.
      implementation: name in IMPLEMENTATIONS; None takes the first that can.
      config: of the named implementation, its module's Config.

    Returns:
      o [B L H V] in q's dtype; total [B L H] float32; the State after the last key that is not
      padding, float32, of its document.

    Raises:
      ValueError: shapes, dtypes, features or config do not fit, an unknown implementation, or
        length, head or value dimension split over a mesh axis, or heads split in different ways.
      NotImplementedError: a named implementation cannot do this.

    Source: Transformers are RNNs, arXiv 2006.16236, eqs. 4 and 9; the maps' in `features`.
    """
    given = Arrays(q, k, v, q_map, k_map, q_bias, k_bias)
    _check(given, features, q_segments, kv_segments, state)
    if config is not None and implementation not in TUNED:
        known = ", ".join(TUNED) or "none has one"
        raise ValueError(
            f"config {config} is for one of the implementations {known}: name the one."
        )
    given = _with_rows(given, q_segments, kv_segments, state)
    dispatch.check_heads(q, k, v)
    o, total, values, keys = _attend(
        Options(features, config), implementation, *dispatch.vary(*given)
    )
    return o, total, State(values, keys, _last(given))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(options: Options, implementation: str | None, *args):
    choices = dispatch.choices(__name__, IMPLEMENTATIONS, "forward")

    def run(*args):
        found = dispatch.pick(choices, implementation, Arrays(*args), options)
        return dispatch.like(args, found)

    def follow(q, k, v, *_):
        return q, PartitionSpec(*q[:3]), *_state_specs(k)

    return dispatch.local(run, follow=follow, whole=WHOLE)(*args)


def _attend_fwd(options: Options, implementation: str | None, *args):
    o, total, *state = _attend(options, implementation, *args)
    o, total = (checkpoint_name(x, "attention") for x in (o, total))
    return (o, total, *state), (*args, o, total)


def _attend_bwd(options: Options, implementation: str | None, kept, cotangents):
    q, k, given = kept[0], kept[1], len(Arrays._fields)
    choices = dispatch.choices(__name__, IMPLEMENTATIONS, "backward")
    # One key head for all queries may be whole where query heads are split: its gradients add up,
    # and the state's are counted on one shard.
    shared = tuple(a for a in dispatch.split(q, 2) if a not in dispatch.split(k, 2))
    batch = dispatch.split(q, 0)

    def run(*args):
        arrays, rest = Arrays(*args[:given]), list(args[given:])
        if shared:
            once = functools.reduce(jnp.logical_and, [jax.lax.axis_index(a) == 0 for a in shared])
            rest[-2:] = [jnp.where(once, x, 0) for x in rest[-2:]]
        found = dispatch.pick(choices, implementation, arrays, *rest, options)
        pairs = zip(found, arrays.differentiable, strict=True)
        found = [g if g is None else g.astype(x.dtype) for g, x in pairs]
        found = list(dispatch.like(args, found))
        summed = lambda x, axes: x if x is None or not axes else jax.lax.psum(x, axes)
        for i in (3, 4, 5, 6):
            found[i] = summed(found[i], batch)
        for i in (1, 2, 4, 6, 7, 8):
            found[i] = summed(found[i], shared)
        return tuple(found)

    follow = tuple(None if x is None else i for i, x in enumerate(kept[:9]))
    grads = dispatch.local(run, follow=follow, whole=WHOLE)(*kept, *cotangents)
    return (*grads, *[None] * (given - len(grads)))


_attend.defvjp(_attend_fwd, _attend_bwd)


def _state_specs(k) -> tuple[PartitionSpec, PartitionSpec]:
    batch, _, heads, _ = k
    return PartitionSpec(batch, heads, None, None), PartitionSpec(batch, heads, None)


def _with_rows(given: Arrays, q_segments, kv_segments, state: State | None) -> Arrays:
    """The arguments with segments and state, laid out like q's batch and k's heads."""
    batch, _, heads, _ = dispatch.spec(given.k)
    place = dispatch.place
    maps = [place(x, dispatch.spec(given.q)[2]) for x in (given.q_map, given.q_bias)]
    key_maps = [place(x, heads) for x in (given.k_map, given.k_bias)]
    given = given._replace(q_map=maps[0], q_bias=maps[1], k_map=key_maps[0], k_bias=key_maps[1])
    if q_segments is not None:
        pair = (place(x.astype(jnp.int32), batch) for x in (q_segments, kv_segments))
        given = given._replace(**dict(zip(("q_segments", "kv_segments"), pair, strict=True)))
    if state is None:
        return given
    exact = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    values, keys = (place(exact(x), batch, heads) for x in (state.values, state.keys))
    segment = place(state.segment.astype(jnp.int32), batch)
    return given._replace(values=values, keys=keys, segment=segment)


def _last(given: Arrays):
    """The document that the state holds at the end, [B]."""
    B, L = given.k.shape[:2]
    if given.q_segments is None:
        return given.segment if given.segment is not None else jnp.ones(B, jnp.int32)
    before = jnp.zeros_like(given.kv_segments[:, 0]) if given.segment is None else given.segment
    return held(given.kv_segments, before, L)[:, -1]


def _check(given: Arrays, features: str, q_segments, kv_segments, state: State | None):
    q, k, v = given[:3]
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
        raise ValueError(f"Attention takes q [B L H K], k [B L G K], v [B L G V], not {shapes}.")
    (B, L, H, K), G, V = q.shape, k.shape[2], v.shape[3]
    if k.shape != (B, L, G, K) or v.shape != (B, L, G, V):
        raise ValueError(
            f"q {q.shape} wants k {(B, L, 'G', K)} and v {(B, L, 'G', 'V')}, but they are "
            f"{k.shape} and {v.shape}."
        )
    if H % G:
        raise ValueError(f"{H} query heads cannot share {G} key heads: {H} % {G} is {H % G}.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v need one dtype, not {q.dtype}, {k.dtype}, {v.dtype}.")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("Give both q_segments and kv_segments, or neither.")
    if q_segments is not None and not q_segments.shape == kv_segments.shape == (B, L):
        raise ValueError(
            f"Segments must be {(B, L)}, not {q_segments.shape} and {kv_segments.shape}."
        )
    f = _check_maps(given, features)
    F = maps.count(features, f)
    if state is not None and (state.values.shape, state.keys.shape, state.segment.shape) != (
        (B, G, F, V),
        (B, G, F),
        (B,),
    ):
        shapes = f"{state.values.shape}, {state.keys.shape} and {state.segment.shape}"
        raise ValueError(f"The state must be {(B, G, F, V)}, {(B, G, F)} and {(B,)}, not {shapes}.")


def _check_maps(given: Arrays, features: str) -> int:
    """The width of z."""
    maps.count(features, 1)
    (H, K), G = given.q.shape[2:], given.k.shape[2]
    pairs = (given.q_map, given.k_map), (given.q_bias, given.k_bias)
    if any((a is None) != (b is None) for a, b in pairs):
        raise ValueError("Give the map or bias of both queries and keys, or of neither.")
    if given.q_map is None:
        if given.q_bias is not None:
            raise ValueError("A bias is a map's: give q_map and k_map with q_bias and k_bias.")
        return K
    f = given.q_map.shape[-1]
    if (given.q_map.shape, given.k_map.shape) != ((H, K, f), (G, K, f)):
        raise ValueError(
            f"Maps must be {(H, K, 'f')} and {(G, K, 'f')}, not {given.q_map.shape} and "
            f"{given.k_map.shape}."
        )
    if given.q_bias is not None and (given.q_bias.shape, given.k_bias.shape) != ((H, f), (G, f)):
        raise ValueError(
            f"Biases must be {(H, f)} and {(G, f)}, not {given.q_bias.shape} and "
            f"{given.k_bias.shape}."
        )
    return f
