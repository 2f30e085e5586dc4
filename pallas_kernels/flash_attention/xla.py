"""Attention in blocks, in plain XLA: memory grows with L, and blocks nobody sees are skipped.

The R = H/G query heads of a key head are rows of one matrix, N = L R rows with a token's heads
together: keys are never repeated, and a block of tokens is a slice of rows. A small problem takes a
few unrolled tiles, each as wide as its tokens see; a large one two nested loops over those tiles of
T tokens and C keys that hold something to see.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.flash_attention import blocks
from pallas_kernels.flash_attention.reference import Options, mark, row_terms, visible

# Timed on a 2-core CPU, forward and backward, where scores that leave the cache cost most.
SMALL = 2**21  # scores B H L S up to which tiles are unrolled
UNROLLED = (64, 4)  # then at least 64 tokens a tile, and at most 4 tiles
TILE = {"cpu": (128, 128)}  # T, C of the loops
LARGE_TILE = (512, 512)  # where launching a step costs more than a miss of the cache
FLOOR = float(np.finfo(np.float32).min)


def key_range(start: int, stop: int, L: int, S: int, options: Options) -> tuple[int, int]:
    """The keys [start, stop) outside of which queries [start, stop) see none by position."""
    i, last = start + S - L, stop + S - L
    start, stop = 0, S
    if options.causal:
        stop = min(stop, last)
    elif options.window is not None and not options.first:
        stop = min(stop, last + options.window - 1)
    if options.window is not None and not options.first:
        start = max(start, i - options.window + 1)
    return (start, stop) if start < stop else (0, 0)


def visits(T: int, C: int, L: int, S: int, q_segments, kv_segments, options: Options):
    """The blocks of C keys that each block of T queries visits, in some row of the batch.

    Returns:
      int32 [n m], those to visit in order and then the others; how many to visit, int32 [n].
    """
    kinds = blocks.kinds(T, C, L, S, q_segments, kv_segments, options)
    return blocks.in_front((kinds != blocks.NONE).any(0))


def forward(q, k, v, q_segments, kv_segments, options: Options):
    """o [B L H V] in q's dtype and lse [B L H] float32, as `reference.forward`."""
    L, H, G = *q.shape[1:3], k.shape[2]
    run = _forward_unrolled if _is_small(q, k) else _forward_loop
    q_segments, kv_segments = _repeat(q_segments, H // G), mark(kv_segments, options)
    o, lse = run(_rows(q, G), _heads(k), _heads(v), q_segments, kv_segments, L, options)
    return _tokens(o, L).astype(q.dtype), _tokens(lse, L)[..., 0]


def backward(q, k, v, q_segments, kv_segments, o, lse, do, dlse, options: Options):
    """dq, dk, dv for cotangents do [B L H V] and dlse [B L H], scores computed again from lse."""
    L, H, G = *q.shape[1:3], k.shape[2]
    run = _backward_unrolled if _is_small(q, k) else _backward_loop
    lse, delta = row_terms(o, lse, do, dlse)
    of_rows = [_rows(x, G) for x in (q, do, lse[..., None], delta[..., None])]
    q_segments, kv_segments = _repeat(q_segments, H // G), mark(kv_segments, options)
    dq, dk, dv = run(*of_rows, _heads(k), _heads(v), q_segments, kv_segments, L, options)
    return _tokens(dq, L).astype(q.dtype), _heads(dk).astype(k.dtype), _heads(dv).astype(v.dtype)


def _is_small(q, k) -> bool:
    B, L, H, _ = q.shape
    return B * L * H * k.shape[1] <= SMALL


def _heads(x):
    """[B S G X] -> [B G S X], and back."""
    return x.swapaxes(1, 2)


def _rows(x, G: int):
    """[B L H X] -> [B G LR X]: the R heads of a token, then those of the next."""
    B, L, H, X = x.shape
    return x.reshape(B, L, G, H // G, X).swapaxes(1, 2).reshape(B, G, L * H // G, X)


def _tokens(x, L: int):
    """[B G LR X] -> [B L H X]."""
    B, G, N, X = x.shape
    return x.reshape(B, G, L, N // L, X).swapaxes(1, 2).reshape(B, L, G * N // L, X)


def _repeat(segments, R: int):
    return segments if segments is None or R == 1 else jnp.repeat(segments, R, axis=1)


def _product(a, b, contract: tuple[int, int]):
    """A matrix product per batch row and key head, summed in float32."""
    dims = ((contract[:1], contract[1:]), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _bias(rows, columns, q_segments, kv_segments, options: Options):
    """0 where a row sees a key and -inf elsewhere, [B N C], or None where all is seen.

    The barrier keeps XLA from working the comparisons out once more for every head.
    """
    seen = visible(rows, columns, q_segments, kv_segments, options)
    if seen is None:
        return None
    return jax.lax.optimization_barrier(jnp.where(seen, 0.0, -jnp.inf))


def _scores(q, k, bias, options: Options):
    """Capped, masked scores [B G N C] and the cap's derivative (None without a cap)."""
    s = _product(q, k, (3, 3)) * options.scale
    slope = None
    if options.softcap is not None:
        t = jnp.tanh(s / options.softcap)
        s, slope = options.softcap * t, 1 - t * t
    return s if bias is None else s + bias[:, None], slope


def _start(q, v):
    """What rows have before they saw a key: maximum, sum, weighted sum of values."""
    like = lambda size, fill: jnp.full_like(q, fill, jnp.float32, shape=(*q.shape[:3], size))
    return like(1, FLOOR), like(1, 0), like(v.shape[3], 0)


def _add_tile(carry, q, k, v, bias, options: Options):
    """Lets rows see the keys of one more tile."""
    m, total, acc = carry
    s, _ = _scores(q, k, bias, options)
    peak = jnp.maximum(m, jnp.max(s, -1, keepdims=True, initial=FLOOR))
    p, old = jnp.exp(s - peak), jnp.exp(m - peak)
    total = total * old + jnp.sum(p, -1, keepdims=True)
    return peak, total, acc * old + _product(p.astype(v.dtype), v, (3, 2))


def _finish(carry):
    """o [B G N V] and lse [B G N 1], float32; 0 and -inf for a row that saw nothing.

    The largest score counts 1, so a total below 1 is 0. (A `where` instead of the maximum keeps XLA
    on CPU from fusing the tile; it was 4 times slower at B 8, L 512, H 4, K 32.)
    """
    m, total, acc = carry
    return acc / jnp.maximum(total, 1.0), m + jnp.log(total)


def _tile_gradients(q, do, lse, delta, k, v, bias, options: Options):
    """What one tile adds to dq [B G N K], dk [B G C K] and dv [B G C V], float32."""
    s, slope = _scores(q, k, bias, options)
    p = jnp.exp(s - lse)
    dv = _product(p.astype(v.dtype), do, (2, 2))
    ds = p * (_product(do, v, (3, 3)) - delta)
    ds = ds if slope is None else ds * slope
    ds = (ds * options.scale).astype(q.dtype)
    return _product(ds, k, (3, 2)), _product(ds, q, (2, 2)), dv


def _tiles(q, k, q_segments, kv_segments, L: int, options: Options):
    """Slices of rows, with the slice of keys that they need and what they see of it."""
    S, R = k.shape[2], q.shape[2] // L
    least, most = UNROLLED
    T = max(least, math.ceil(L / most))
    cut = lambda x, part: None if x is None else x[:, part]
    for i in range(0, L, T):
        stop = min(i + T, L)
        rows, keys = slice(i * R, stop * R), slice(*key_range(i, stop, L, S, options))
        positions = jnp.arange(rows.start, rows.stop) // R + S - L, jnp.arange(S)[keys]
        segments = cut(q_segments, rows), cut(kv_segments, keys)
        yield rows, keys, _bias(*positions, *segments, options)


def _forward_unrolled(q, k, v, q_segments, kv_segments, L: int, options: Options):
    done = []
    for rows, keys, bias in _tiles(q, k, q_segments, kv_segments, L, options):
        part = q[:, :, rows]
        carry = _add_tile(_start(part, v), part, k[:, :, keys], v[:, :, keys], bias, options)
        done.append(_finish(carry))
    return tuple(jnp.concatenate(x, 2) for x in zip(*done, strict=True))


def _backward_unrolled(q, do, lse, delta, k, v, q_segments, kv_segments, L: int, options: Options):
    S, dq, dk, dv = k.shape[2], [], 0.0, 0.0
    for rows, keys, bias in _tiles(q, k, q_segments, kv_segments, L, options):
        of_rows = (x[:, :, rows] for x in (q, do, lse, delta))
        part = _tile_gradients(*of_rows, k[:, :, keys], v[:, :, keys], bias, options)
        around = ((0, 0), (0, 0), (keys.start, S - keys.stop), (0, 0))
        dq.append(part[0])
        dk, dv = dk + jnp.pad(part[1], around), dv + jnp.pad(part[2], around)
    return jnp.concatenate(dq, 2), dk, dv


def _forward_loop(q, k, v, q_segments, kv_segments, L: int, options: Options):
    xs, fetch, _ = _blocks((q,), k, v, q_segments, kv_segments, L, options)

    def query_block(_, block):
        (order, count), positions, segments, q_i = block

        def key_block(t, carry):
            return _add_tile(carry, q_i, *fetch(order[t], positions, segments), options)

        return None, _finish(jax.lax.fori_loop(0, count, key_block, _start(q_i, v)))

    _, done = jax.lax.scan(query_block, None, xs)
    return tuple(_joined(x, q.shape[2]) for x in done)


def _backward_loop(q, do, lse, delta, k, v, q_segments, kv_segments, L: int, options: Options):
    of_rows = (q, do, lse, delta)
    xs, fetch, padded = _blocks(of_rows, k, v, q_segments, kv_segments, L, options)
    zeros = lambda x: jnp.zeros_like(x, jnp.float32)

    def query_block(dkv, block):
        (order, count), positions, segments, *of_rows = block

        def key_block(t, carry):
            j = order[t]
            k_j, v_j, bias = fetch(j, positions, segments)
            dq, dk, dv = carry
            part = _tile_gradients(*of_rows, k_j, v_j, bias, options)
            return dq + part[0], _add_at(dk, j, part[1]), _add_at(dv, j, part[2])

        dq, *dkv = jax.lax.fori_loop(0, count, key_block, (zeros(of_rows[0]), *dkv))
        return tuple(dkv), dq

    (dk, dv), dq = jax.lax.scan(query_block, tuple(map(zeros, padded)), xs)
    S = k.shape[2]
    return _joined(dq, q.shape[2]), dk[:, :, :S], dv[:, :, :S]


def _blocks(of_rows, k, v, q_segments, kv_segments, L: int, options: Options):
    """Cuts rows into blocks to scan over, and keys into blocks to be fetched.

    Returns:
      What the scan runs over: key blocks to visit ([n m], [n]), positions [n N], segments [n B N]
      or None, then of_rows, each [n B G N X]; fetch(j, positions, segments) -> k, v and bias of key
      block j; k and v padded to whole blocks.
    """
    N, S = of_rows[0].shape[2], k.shape[2]
    T, C = TILE.get(dispatch.platform(), LARGE_TILE)
    T, C, R = min(T, L), min(C, S), N // L
    tokens = None if q_segments is None else q_segments[:, ::R]
    to_visit = visits(T, C, L, S, tokens, kv_segments, options)
    if S % C and kv_segments is None:  # so that nobody sees the padding, which gets segment 0
        q_segments, kv_segments = jnp.ones((1, N), jnp.int32), jnp.ones((1, S), jnp.int32)
        kv_segments = mark(kv_segments, options)
    k, v, kv_segments = _pad(k, C, 2), _pad(v, C, 2), _pad(kv_segments, C, 1)

    def fetch(j, positions, segments):
        columns = j * C + jnp.arange(C)
        others = None if kv_segments is None else _cut(kv_segments, j, C, 1)
        return _cut(k, j, C), _cut(v, j, C), _bias(positions, columns, segments, others, options)

    positions = jnp.arange(N) // R + S - L
    xs = (to_visit, _split(positions, T * R, 0))
    xs = (*xs, _split(q_segments, T * R, 1), *(_split(x, T * R, 2) for x in of_rows))
    return xs, fetch, (k, v)


def _pad(x, block: int, dim: int):
    """Zeros behind dimension `dim`, up to a whole number of blocks."""
    if x is None or x.shape[dim] % block == 0:
        return x
    width = [(0, 0)] * x.ndim
    width[dim] = (0, -x.shape[dim] % block)
    return jnp.pad(x, width)


def _split(x, block: int, dim: int):
    """[.. N ..] -> [n .. block ..], the last block padded with zeros."""
    if x is None:
        return None
    x = _pad(x, block, dim)
    x = x.reshape(*x.shape[:dim], -1, block, *x.shape[dim + 1 :])
    return jnp.moveaxis(x, dim, 0)


def _joined(x, N: int):
    """[n B G block X] -> [B G N X], without the padding."""
    n, B, G, block, X = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(B, G, n * block, X)[:, :, :N]


def _cut(x, j, block: int, dim: int = 2):
    return jax.lax.dynamic_slice_in_dim(x, j * block, block, dim)


def _add_at(total, j, part):
    block = part.shape[2]
    part = part + _cut(total, j, block)
    return jax.lax.dynamic_update_slice_in_dim(total, part, j * block, 2)
