"""The program of the TPU's backward pass: T queries at a time, against the keys held in VMEM."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention.blocks import ALL, SOME
from pallas_kernels.flash_attention.tpu_backward_tile import Plan, Refs, add, add_seen, parts_of


def kernel(plan: Plan, *refs):
    """One step: T queries of one head, and the keys of one chunk that they see.

    The grid is (B G, chunks, R, tiles of queries). dk and dv of a chunk are summed in VMEM over
    the last two; dq over the keys of a chunk, and over the chunks in HBM.
    """
    refs = _named(plan, refs)
    j, r, t = (pl.program_id(axis) for axis in (1, 2, 3))
    last = (r == pl.num_programs(2) - 1) & (t == pl.num_programs(3) - 1)
    start = jnp.maximum(refs.bounds[0, 0, 2 * t], j * plan.n)
    stop = jnp.minimum(refs.bounds[0, 0, 2 * t + 1], (j + 1) * plan.n)
    pl.when((r == 0) & (t == 0))(functools.partial(_start_keys, plan, refs))

    @pl.when((start < stop) | (j == 0))
    def _():
        if plan.chunks > 1:
            pl.when((j > 0) | (r > 0) | (t > 0))(_write_dq(refs).wait)
            pl.when(j > 0)(_read_dq(refs).start)
        _start_queries(plan, refs)
        jax.lax.fori_loop(start, stop, functools.partial(_visit, plan, refs, j, t), None)
        if plan.chunks > 1:
            pl.when(j > 0)(_read_dq(refs).wait)
        _finish_queries(plan, refs, j)
        if plan.chunks > 1:
            _write_dq(refs).start()

    pl.when(last)(functools.partial(_finish_keys, plan, refs))
    if plan.chunks > 1:
        pl.when(last & (j == plan.chunks - 1))(_write_dq(refs).wait)


def _named(plan: Plan, refs) -> Refs:
    turned = ("q_turned", "k_turned", "do_turned")
    present = dict.fromkeys(("q_segments", "kv_segments"), plan.segments)
    present |= dict.fromkeys(turned, plan.transposed)
    present |= dict.fromkeys(("dq_before", "semaphores"), plan.chunks > 1)
    refs = iter(refs)
    names = Refs.__dataclass_fields__
    return Refs(**{name: next(refs) if present.get(name, True) else None for name in names})


def _part(index, size: int):
    return pl.ds(pl.multiple_of(index * size, size), size)


def _each(size: int, length: int, fn):
    """Calls fn with one slice after another; a loop, so that the program stays short."""
    jax.lax.fori_loop(0, length // size, lambda i, _: fn(_part(i, size)), None)


def _at(plan: Plan, tokens):
    """Where a sum holds these tokens."""
    return (slice(None), tokens) if plan.transposed else (tokens, slice(None))


def _start_keys(plan: Plan, refs: Refs):
    def tile(keys):
        for total in (refs.dk_sum, refs.dv_sum):
            total[_at(plan, keys)] = jnp.zeros_like(total[_at(plan, keys)])
        if plan.transposed:
            refs.k_turned[:, keys] = refs.k[0, keys, :].T

    _each(plan.C, plan.n * plan.C, tile)


def _finish_keys(plan: Plan, refs: Refs):
    def tile(keys):
        dk, dv = (total[_at(plan, keys)] for total in (refs.dk_sum, refs.dv_sum))
        for x, out in ((dk * plan.options.scale, refs.dk), (dv, refs.dv)):
            x = x.astype(out.dtype)
            x = x.T if plan.transposed else x
            out[0, keys, : x.shape[1]] = x

    _each(plan.C, plan.n * plan.C, tile)


def _start_queries(plan: Plan, refs: Refs):
    def some(rows):
        refs.dq_sum[_at(plan, rows)] = jnp.zeros_like(refs.dq_sum[_at(plan, rows)])
        if plan.transposed:
            refs.q_turned[:, rows] = refs.q[0, rows, :].T
            refs.do_turned[:, rows] = refs.do[0, rows, :].T

    _each(plan.slice, plan.T, some)


def _finish_queries(plan: Plan, refs: Refs, j):
    def some(rows):
        x = (refs.dq_sum[_at(plan, rows)] * plan.options.scale).astype(refs.dq.dtype)
        x = x.T if plan.transposed else x
        if plan.chunks == 1:
            refs.dq[0, rows, : x.shape[1]] = x
        else:
            at = rows, slice(0, x.shape[1])
            refs.dq_before[at] = x + jnp.where(j > 0, refs.dq_before[at], 0.0)

    _each(plan.slice, plan.T, some)


def _read_dq(refs: Refs):
    """The copy of what earlier chunks of keys gave to this step's dq."""
    return pltpu.make_async_copy(_place(refs), refs.dq_before, refs.semaphores.at[0])


def _write_dq(refs: Refs):
    """The copy of this step's dq, awaited by the next step that needs the memory."""
    return pltpu.make_async_copy(refs.dq_before, _place(refs), refs.semaphores.at[1])


def _place(refs: Refs):
    """Where this step's dq lies in HBM."""
    T = refs.dq_before.shape[0]
    g, r, t = (pl.program_id(axis) for axis in (0, 2, 3))
    R = pl.num_programs(2)
    G = refs.dq.shape[1] // R
    h = jax.lax.rem(g, G) * R + r
    return refs.dq.at[jax.lax.div(g, G), h, _part(t, T)]


def _visit(plan: Plan, refs: Refs, j, t, c, _):
    """Lets the queries see tile c of the keys, in the cheapest way that its kind allows."""
    kind = refs.kinds[0, 0, t * plan.N + c]
    place = t * plan.T + plan.shift - c * plan.C
    first_key = (c - j * plan.n) * plan.C
    if plan.full:
        bare = [(first_key + key, keys, *rows, None) for key, keys, *rows in parts_of(plan)]
        pl.when(kind == ALL)(functools.partial(add, plan, refs, bare))
    rest = kind == SOME
    for cut in plan.cuts:
        seen = functools.partial(add_seen, plan, refs, c * plan.C, first_key, cut, True)
        pl.when((kind == SOME) & (place == cut))(seen)
        rest &= place != cut
    if plan.rest:
        pl.when(rest)(functools.partial(add_seen, plan, refs, c * plan.C, first_key, place, False))
