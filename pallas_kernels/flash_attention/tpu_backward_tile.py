"""One tile of the TPU's backward pass: its scores once more, and what they add to the gradients.

Scores stand as [keys, queries], so that lse and delta are rows. Where the head is narrower than the
matrix unit, sums stand transposed, [head, tokens]: then the unit holds the wide tiles of p and dS,
and only the head's rows stream through it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.flash_attention.reference import Options
from pallas_kernels.flash_attention.tpu_tiles import LANES, LOG2E
from pallas_kernels.products import NN, NT, dot


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when the kernel is traced.

    T, C: queries and keys a tile; part: of both, at once; ahead: parts with scores and no sums.
    n: tiles of keys in VMEM; N: tiles of keys in all.
    K, V: head sizes without the padding to whole lanes.
    shift: S - L; S: the keys' true length.
    cuts: places `t T + shift - c C` of tiles whose mask is known by position alone.
    full, rest: whether there are tiles without a mask, and such as need all of the mask.
    chunks: passes over the queries, one for each group of keys that VMEM holds.
    """

    T: int
    C: int
    part: int
    ahead: int
    n: int
    N: int
    K: int
    V: int
    S: int
    shift: int
    options: Options
    cuts: tuple[int, ...]
    full: bool
    rest: bool
    segments: bool
    transposed: bool
    chunks: int

    @property
    def slice(self) -> int:
        """Queries at once where no products are taken."""
        return next((x for x in (512, 256) if self.T % x == 0 and x < self.T), LANES)


@dataclasses.dataclass
class Refs:
    """The kernel's memory; names as in `kernel`."""

    kinds: jax.Ref
    bounds: jax.Ref
    q: jax.Ref
    k: jax.Ref
    v: jax.Ref
    do: jax.Ref
    stats: jax.Ref
    q_segments: jax.Ref | None
    kv_segments: jax.Ref | None
    dq: jax.Ref
    dk: jax.Ref
    dv: jax.Ref
    dq_sum: jax.Ref
    dk_sum: jax.Ref
    dv_sum: jax.Ref
    q_turned: jax.Ref | None
    k_turned: jax.Ref | None
    do_turned: jax.Ref | None
    dq_before: jax.Ref | None
    semaphores: jax.Ref | None


def parts_of(plan: Plan):
    """The parts of a tile: first key, keys, first query, queries."""
    for row in range(0, plan.T, plan.part):
        for key in range(0, plan.C, plan.part):
            yield key, min(plan.part, plan.C - key), row, min(plan.part, plan.T - row)


def add_seen(plan: Plan, refs: Refs, position, first_key, place, known: bool):
    """Adds a tile that is seen in part; where its place is known, only parts that are seen.

    position: of the tile's first key. place: how far its first query stands after that key.
    """
    parts = []
    for key, keys, row, rows in parts_of(plan):
        here = place + row - key
        if not known or is_seen(here, keys, rows, plan.options):
            at = (first_key + key, keys, row, rows)
            parts.append((*at, _mask(plan, refs, *at, position + key, here, known)))
    add(plan, refs, parts)


def is_seen(place: int, keys: int, rows: int, options: Options) -> bool:
    """Whether some query of a part sees some key, by position."""
    least, most = place - keys + 1, place + rows - 1
    if options.causal and most < 0:
        return False
    window = math.inf if options.window is None else options.window
    return least < window and (options.causal or most > -window)


def _mask(plan: Plan, refs: Refs, key, keys: int, row: int, rows: int, position, place, known):
    """Which keys each query of a part sees, [keys, rows], or None for all."""
    options, conditions = plan.options, []
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32, (keys, rows))
    distance = iota(1) - iota(0)
    far = iota(0) < options.first - position  # seen from any distance
    if plan.segments:
        segment = _column(refs.kv_segments, key, keys)
        far, ids = segment < 0, jnp.abs(segment) if options.first else segment
        conditions += [(refs.q_segments[0, :, row : row + rows] == ids) & (ids != 0)]
    either = (lambda near: near | far) if options.first and not known else (lambda near: near)
    if options.causal and not (known and place - keys + 1 >= 0):
        conditions += [distance >= -place]
    if options.window is not None and not (known and place + rows <= options.window):
        conditions += [either(distance < options.window - place)]
    ahead = options.window is not None and not options.causal
    if ahead and not (known and place - keys + 1 > -options.window):
        conditions += [either(distance > -options.window - place)]
    if plan.S % plan.C and not options.causal and not plan.segments:
        conditions += [iota(0) < plan.S - position]
    return functools.reduce(jnp.logical_and, conditions) if conditions else None


def _column(segments, key, keys: int):
    """A row of segments [keys] as a column."""
    row = segments[0, :, pl.ds(pl.multiple_of(key, LANES), keys)]
    return jnp.broadcast_to(row, (LANES, keys)).T[:, :1]


def add(plan: Plan, refs: Refs, parts):
    """Adds to the gradients what parts (key, keys, row, rows, mask) of the scores give.

    Scores run ahead of the sums, so that the matrix unit has work while the vector unit takes
    exponentials: the compiler schedules near to the order in which it is told.
    """
    ready = []
    for part in parts:
        ready.append((*part[:4], *_scores(plan, refs, *part)))
        if len(ready) > plan.ahead:
            _sums(plan, refs, *ready.pop(0))
    for part in ready:
        _sums(plan, refs, *part)


def _scores(plan: Plan, refs: Refs, key, keys: int, row: int, rows: int, mask):
    """p and dS of a part, [keys, rows]."""
    options = plan.options
    at_keys = pl.ds(pl.multiple_of(key, LANES), keys)
    at_rows = slice(row, row + rows)
    lse, delta = refs.stats[0, 0, 0:1, at_rows], refs.stats[0, 0, 1:2, at_rows]
    k, v = refs.k[0, at_keys, :], refs.v[0, at_keys, :]
    if plan.transposed:
        q, do, of_queries = refs.q_turned[:, at_rows], refs.do_turned[:, at_rows], (1, 0)
    else:
        q, do, of_queries = refs.q[0, at_rows, :], refs.do[0, at_rows, :], (1, 1)
    s, slope = dot(k, q, of_queries), None
    if options.softcap is None:
        s = s * (options.scale * LOG2E)
    else:
        capped = jnp.tanh(s * (options.scale / options.softcap))
        s, slope = capped * (options.softcap * LOG2E), 1.0 - capped * capped
    s = s if mask is None else jnp.where(mask, s, -jnp.inf)
    p = jnp.exp2(s - lse)
    ds = p * (dot(v, do, of_queries) - delta)
    ds = ds if slope is None else ds * slope
    return p.astype(v.dtype), ds.astype(k.dtype)


def _sums(plan: Plan, refs: Refs, key, keys: int, row: int, rows: int, p, ds):
    at_keys = pl.ds(pl.multiple_of(key, LANES), keys)
    at_rows = slice(row, row + rows)
    if plan.transposed:
        refs.dv_sum[:, at_keys] += dot(refs.do_turned[: plan.V, at_rows], p, NT)
        refs.dk_sum[:, at_keys] += dot(refs.q_turned[: plan.K, at_rows], ds, NT)
        refs.dq_sum[:, at_rows] += dot(refs.k_turned[: plan.K, at_keys], ds, NN)
    else:
        refs.dv_sum[at_keys, :] += dot(p, refs.do[0, at_rows, :], NN)
        refs.dk_sum[at_keys, :] += dot(ds, refs.q[0, at_rows, :], NN)
        refs.dq_sum[at_rows, :] += dot(ds, refs.k[0, at_keys, :], (0, 0))
