"""The backward pass on a TPU: dq, dk and dv by one kernel that computes each score once.

A tile of C keys and T queries takes five products: S = K Q^T, dP = V dO^T and, with
P = exp(S - lse) and dS = P (dP - delta), the sums dV += P^T dO, dK += dS^T Q, dQ += dS K
(FlashAttention-2, arXiv 2307.08691). A step of the grid has T queries of one head, and walks over
the keys that they see; keys, values and the sums dK and dV of a chunk of keys stay in VMEM.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.flash_attention import blocks, tpu_tiles
from pallas_kernels.flash_attention.reference import Options, mark, row_terms
from pallas_kernels.flash_attention.tpu_backward_kernel import kernel
from pallas_kernels.flash_attention.tpu_backward_tile import Plan
from pallas_kernels.flash_attention.tpu_tiles import LANES, LOG2E

NAME = "flash_attention_backward"
SCORES = 6 * 2**20  # bytes of VMEM for them
MOST_CUTS = 4  # bodies for tiles cut by position; more would only take longer to compile


@dataclasses.dataclass(frozen=True)
class Backward:
    """How the kernel cuts its work; T, C and part are multiples of 128, chunk one of C.

    T, C: queries and keys a tile.
    part: queries and keys at once, inside of a tile. Where the diagonal or a window's edge cuts a
      tile, parts that nobody sees are left out.
    ahead: for how many parts the scores are computed before the sums.
    chunk: keys whose gradients are summed in VMEM; with more keys, the queries pass again.
    transposed: whether sums stand as [head, tokens], which suits heads narrower than the matrix
      unit.
    """

    T: int
    C: int
    part: int
    ahead: int
    chunk: int
    transposed: bool

    def __post_init__(self):
        sizes = {"T": self.T, "C": self.C, "part": self.part, "chunk": self.chunk}
        for name, size in sizes.items():
            if size < 1 or size % LANES:
                raise ValueError(f"{name} {size} is no multiple of {LANES}: choose one.")
        if self.chunk % self.C:
            raise ValueError(f"chunk {self.chunk} is no multiple of C {self.C}: choose one.")


def heuristic(L: int, S: int, K: int, V: int, dtype) -> Backward:
    """Large tiles, as even as L and S allow, and as many keys in VMEM as fit."""
    info, size = pltpu.get_tpu_info(), jnp.dtype(dtype).itemsize
    wide = _whole(K, LANES) + _whole(V, LANES)
    most = 1024 if size == 2 and wide <= 4 * LANES else 512
    T, C = (_whole(math.ceil(x / math.ceil(x / most)), LANES) for x in (L, S))
    narrow = max(K, V) < info.mxu_column_size
    # k, v, dk and dv twice, for the copies on their way; two sums, and k turned.
    key = wide * (4 * size + 4) + narrow * _whole(K, LANES) * size
    # q, do, dq twice, or turned, or in float32; and scores, with what the compiler puts aside.
    spare = info.vmem_capacity_bytes - 12 * T * wide * size - SCORES
    tiles = math.ceil(S / C)
    chunks = math.ceil(tiles / max(1, min(spare // (key * C), tiles)))
    return Backward(T, C, 256, 2, math.ceil(tiles / chunks) * C, narrow)


def backward(q, k, v, q_segments, kv_segments, o, lse, do, dlse, options: Options, config):
    """Gradients of q, k and v for cotangents do [B L H V] and dlse [B L H].

    Args:
      q, k, v: [B L H K], [B S G K], [B S G V], float32 or bfloat16.
      q_segments, kv_segments: [B L], [B S] or None.
      o, lse: what the forward pass returned, [B L H V] and [B L H].
      config: `Backward`.

    Returns:
      dq, dk, dv, like q, k, v. Products are of the inputs' dtype (of float32 in full accuracy),
      sums are float32.
    """
    (L, _, K), (S, G, V) = q.shape[1:], v.shape[1:]
    kv_segments = mark(kv_segments, options)
    plan, kinds = _plan(L, S, K, V, q_segments, kv_segments, options, config)
    lse, delta = row_terms(o, lse, do, dlse)
    # A query that only fills a tile must get p = 0 too.
    padded = (lse * LOG2E, jnp.inf), (delta, 0)
    stats = [_pad(x.swapaxes(1, 2), plan.T, 2, fill) for x, fill in padded]
    q_heads, do = (_by_head(x, plan.T) for x in (q, do))
    k, v = (_by_head(x, config.chunk) for x in (k, v))
    segments = []
    if plan.segments:
        pairs = (q_segments, plan.T), (kv_segments, config.chunk)
        segments = [_pad(x, multiple, 1)[:, None] for x, multiple in pairs]
    args = *_tables(kinds), q_heads, k, v, do, jnp.stack(stats, 2), *segments
    dq, dk, dv = _call(plan, G, *dispatch.vary(*args))
    return _by_token(dq, L, K).astype(q.dtype), _by_token(dk, S, K), _by_token(dv, S, V)


def executions(spec, config: Backward) -> dict[str, list[float]]:
    """How often each heavy piece of the program runs in one call, in its order, cores together.

    Args:
      spec: as in `specs`; segments are those of its seed 0.
      config: how the kernel is cut.
    """
    (B, L, H, K), (_, S, G, V) = spec.shapes["q"], spec.shapes["v"]
    options = Options(**spec.options, scale=1.0)
    q_segments, kv_segments = (spec.segments().get(f"{side}_segments") for side in ("q", "kv"))
    plan, kinds = _plan(L, S, K, V, q_segments, mark(kv_segments, options), options, config)
    heads = B * H // kinds.shape[0]
    place = _places(plan, kinds)
    cut = [(kinds == blocks.SOME) & (place == cut) for cut in plan.cuts]
    rest = (kinds == blocks.SOME) & ~np.isin(place, plan.cuts)
    tiles = [kinds == blocks.ALL] * plan.full + cut + [rest] * plan.rest
    start, stop = np.moveaxis(_bounds(kinds), 2, 0)
    chunk = np.arange(plan.chunks)[:, None, None]
    seen = np.maximum(start, chunk * plan.n) < np.minimum(stop, (chunk + 1) * plan.n)
    queries = int((seen | (chunk == 0)).sum()) * heads * (plan.T // plan.slice)
    keys = B * G * plan.chunks * plan.n
    return {
        NAME: [
            float(x) for x in (keys, queries, *(int(x.sum()) * heads for x in tiles), queries, keys)
        ]
    }


def _plan(L: int, S: int, K: int, V: int, q_segments, kv_segments, options: Options, config):
    T, C = config.T, config.C
    options = dataclasses.replace(options, config=None)
    kinds = blocks.kinds(T, C, L, S, q_segments, kv_segments, options)
    plan = Plan(
        *(T, C, config.part, config.ahead),
        n=config.chunk // C,
        N=kinds.shape[2],
        K=_whole(K, 16),
        V=_whole(V, 16),
        S=S,
        shift=S - L,
        options=options,
        cuts=(),
        full=True,
        rest=True,
        segments=q_segments is not None,
        transposed=config.transposed,
        chunks=math.ceil(S / config.chunk),
    )
    by_position = blocks.kinds(T, C, L, S, None, None, options)[0]
    some, places = by_position == blocks.SOME, _places(plan, kinds)
    cuts = tuple(np.unique(places[some & _is_cut(places, T, C, options)]).tolist())
    cuts = cuts if len(cuts) <= MOST_CUTS else ()
    full = bool((by_position == blocks.ALL).any())
    rest = plan.segments or bool((some & ~np.isin(places, cuts)).any())
    return dataclasses.replace(plan, cuts=cuts, full=full, rest=rest), kinds


def _places(plan: Plan, kinds) -> np.ndarray:
    """How far the first query of each tile stands after its first key, [tiles of queries, N]."""
    t, c = np.arange(kinds.shape[1])[:, None], np.arange(plan.N)[None]
    return t * plan.T + plan.shift - c * plan.C


def _is_cut(places, T: int, C: int, options: Options):
    """Where the diagonal or a window's edge, and nothing else, says what a tile sees."""
    least, most = places - C + 1, places + T - 1
    cut = (least < 0) & options.causal
    if options.window is not None:
        if options.first:
            return cut & (most < options.window)
        back = least if options.causal else -least
        cut |= np.maximum(most, back) >= options.window
    return cut


def _call(plan: Plan, G: int, kinds, bounds, q, k, v, do, stats, *segments):
    (B, H, L, K), V = q.shape, do.shape[3]
    R, chunk = H // G, plan.n * plan.C
    batch, head = lambda g: jax.lax.div(g, G), lambda g, r: jax.lax.rem(g, G) * R + r
    # Copies of small arrays in VMEM would be moved by the vector unit.
    q, k, v, do = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (q, k, v, do))

    def queries(size):
        at = lambda g, j, r, t: (batch(g), head(g, r), t, 0)
        return pl.BlockSpec((1, None, plan.T, size), at)

    def keys(size):
        at = lambda g, j, r, t: (batch(g), jax.lax.rem(g, G), j, 0)
        return pl.BlockSpec((1, None, chunk, size), at)

    def table(x):
        at = lambda g, *_: (batch(g) if x.shape[0] > 1 else 0, 0, 0)
        return pl.BlockSpec((1, 1, x.shape[2]), at, memory_space=pltpu.SMEM)

    own = pl.BlockSpec((1, 1, 2, plan.T), lambda g, j, r, t: (batch(g), head(g, r), 0, t))
    ids = [
        pl.BlockSpec((1, 1, plan.T), lambda g, j, r, t: (batch(g), 0, t)),
        pl.BlockSpec((1, 1, chunk), lambda g, j, r, t: (batch(g), 0, j)),
    ]
    whole, varying = plan.chunks == 1, jax.typeof(q).manual_axis_type
    out = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=varying)
    products = 2 * B * H * L * k.shape[2] * (3 * K + 2 * V)
    return pl.pallas_call(
        functools.partial(kernel, plan),
        name=NAME,
        grid=(B * G, plan.chunks, R, L // plan.T),
        in_specs=[
            *(table(kinds), table(bounds), queries(K), keys(K), keys(V), queries(V), own),
            *ids[: len(segments)],
        ],
        out_specs=[queries(K) if whole else pl.BlockSpec(memory_space=pl.ANY), keys(K), keys(V)],
        out_shape=[
            out(q.shape, q.dtype if whole else jnp.float32),
            *(out(x.shape, x.dtype) for x in (k, v)),
        ],
        scratch_shapes=_scratch(plan, K, V, q.dtype),
        cost_estimate=pl.CostEstimate(
            flops=products // (1 + plan.options.causal),
            transcendentals=B * H * L * k.shape[2],
            bytes_accessed=2 * (q.nbytes + k.nbytes + v.nbytes),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=pltpu.get_tpu_info().vmem_capacity_bytes,
        ),
    )(kinds, bounds, q, k, v, do, stats, *segments)


def _scratch(plan: Plan, K: int, V: int, dtype):
    chunk = plan.n * plan.C
    vmem = lambda rows, columns, dtype=jnp.float32: pltpu.VMEM((rows, columns), dtype)
    total = lambda size, length, wide: vmem(size, length) if plan.transposed else vmem(length, wide)
    scratch = [total(plan.K, plan.T, K), total(plan.K, chunk, K), total(plan.V, chunk, V)]
    if plan.transposed:
        scratch += [vmem(K, plan.T, dtype), vmem(K, chunk, dtype), vmem(V, plan.T, dtype)]
    if plan.chunks > 1:
        scratch += [vmem(plan.T, K), pltpu.SemaphoreType.DMA((2,))]
    return scratch


def _by_head(x, multiple: int):
    """[B L H K] -> [B H L K]: K filled up to whole lanes and L to a multiple.

    XLA's projections can write this order as they are; from [B L H K] it would be copied.
    """
    return _pad(_pad(x, LANES, 3), multiple, 1).swapaxes(1, 2)


def _by_token(x, L: int, K: int):
    """What `_by_head` was given."""
    return x.swapaxes(1, 2)[:, :L, :, :K]


def _whole(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(x, multiple: int, dim: int, fill=0):
    width = [(0, 0)] * x.ndim
    width[dim] = (0, -x.shape[dim] % multiple)
    return jnp.pad(x, width, constant_values=fill) if width[dim][1] else x


def _bounds(kinds):
    """The first tile of keys that each tile of queries sees, and where they end, [B n 2]."""
    xp = np if isinstance(kinds, np.ndarray) else jnp
    seen, N = kinds > 0, kinds.shape[2]
    start, after = xp.argmax(seen, 2), xp.argmax(seen[:, :, ::-1], 2)
    stop = xp.where(seen.any(2), N - after, start)
    return xp.stack([start, stop], 2).astype(xp.int32)


def _tables(kinds):
    """What the scalar core reads, one row for each of the batch, or one for all."""
    tables = [x.reshape(x.shape[0], 1, -1) for x in (kinds, _bounds(kinds))]
    tpu_tiles.check_scalars(sum(2 * 4 * x.shape[2] for x in tables))  # the next one is on its way
    return [jnp.asarray(x) for x in tables]
