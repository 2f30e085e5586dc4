"""Tiles of the score matrix: none, some or all of it seen."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import blocks
from pallas_kernels.flash_attention.reference import Options, mark
from pallas_kernels.flash_attention.specs import Spec
from tests.pallas_kernels.attention_oracle import mask

TILES = ((8, 8), (16, 5), (5, 16), (64, 3))


def spec_of(L, S, **options):
    return Spec("blocks", "ci", B=2, L=L, S=S, H=1, K=1, **options)


def options_of(spec):
    return Options(spec.causal, spec.window, spec.softcap, 1.0, spec.first)


def truth(seen, T, C):
    """int32 [B n m], by looking at every pair of every tile."""
    B, L, S = seen.shape
    n, m = -(-L // T), -(-S // C)
    kinds = np.zeros((B, n, m), np.int32)
    for b, i, j in itertools.product(range(B), range(n), range(m)):
        tile = seen[b, i * T : (i + 1) * T, j * C : (j + 1) * C]
        kinds[b, i, j] = 2 if tile.all() and tile.shape == (T, C) else tile.any()
    return kinds


@pytest.mark.parametrize(("L", "S"), [(40, 40), (37, 61), (61, 37), (1, 50)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("window", "first"), [(None, 0), (1, 0), (11, 0), (100, 0), (1, 3), (11, 8), (7, 70)]
)
def test_positions_are_exact_and_static(L, S, causal, window, first):
    spec = spec_of(L, S, causal=causal, window=window, first=first)
    seen = mask(spec)
    assert spec.flops == 4 * seen.sum()
    for T, C in TILES:
        kinds = blocks.kinds(T, C, L, S, None, None, options_of(spec))
        assert isinstance(kinds, np.ndarray)
        assert kinds.dtype == np.int32
        np.testing.assert_array_equal(kinds, truth(seen, T, C)[:1])


def rows(rng, kind, length):
    """Segments [2 length]: in order with padding behind, in any order, or all of one."""
    if kind == "sorted":
        row = np.sort(rng.integers(1, 5, (2, length)), axis=1)
        row[:, length - length // 8 :] = 0
        return row.astype(np.int32)
    if kind == "one":
        return np.full((2, length), 3, np.int32)
    return np.repeat(rng.integers(0, 5, (2, length)), 6, axis=1)[:, :length].astype(np.int32)


@pytest.mark.parametrize("kind", ["sorted", "scattered", "one"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "first"), [(None, 0), (9, 0), (9, 4)])
def test_segments_never_hide_a_pair_nor_promise_one(kind, causal, window, first):
    rng, sharp = np.random.default_rng(0), 0
    for (L, S), (T, C) in itertools.product([(48, 48), (31, 50)], TILES):
        spec = spec_of(L, S, causal=causal, window=window, first=first)
        q, kv = rows(rng, kind, L), rows(rng, kind, S)
        true = truth(mask(spec, q, kv), T, C)
        kinds = blocks.kinds(T, C, L, S, q, kv, options_of(spec))
        assert kinds.dtype == np.int32
        assert isinstance(kinds, np.ndarray)
        assert np.all((kinds == true) | (kinds == 1))
        sharp += np.mean(kinds == true) / len(TILES) / 2
        if T == 16:
            run = functools.partial(blocks.kinds, T, C, L, S, options=options_of(spec))
            traced = jax.jit(lambda q, kv, run=run: run(q_segments=q, kv_segments=kv))(q, kv)
            np.testing.assert_array_equal(traced, kinds)
    # Where ids are in order, or all one, only tiles at a cut or with a mixed start are in doubt.
    assert sharp > {"sorted": 0.9, "one": 0.95, "scattered": 0.5}[kind]


def test_causal_blocks_are_half_of_all():
    n = 16
    kinds = blocks.kinds(8, 8, n * 8, n * 8, None, None, Options(True, None, None, 1.0))
    assert (kinds == 2).sum() == n * (n - 1) // 2
    assert (kinds == 1).sum() == n


def test_long_packed_rows_keep_only_their_documents_tiles():
    row = np.repeat(np.arange(1, 9, dtype=np.int32), 2048)[None]
    kinds = blocks.kinds(512, 512, 16384, 16384, row, row, Options(True, None, None, 1.0))
    assert ((kinds > 0).sum(), (kinds == 2).sum()) == (8 * 10, 8 * 6)


@pytest.mark.parametrize("first", [0, 1, 3, 99])
def test_marks_are_the_first_keys_of_each_document(first):
    kv = rows(np.random.default_rng(1), "scattered", 40)
    options = Options(True, 5, None, 1.0, first)
    marked = mark(kv, options)
    earlier = np.array([[(r[:j] == r[j]).sum() for j in range(40)] for r in kv])
    np.testing.assert_array_equal(marked, np.where(earlier < first, -kv, kv))
    np.testing.assert_array_equal(mark(marked, options), marked)
    traced = jax.jit(lambda kv: mark(kv, options))(jnp.asarray(kv))
    np.testing.assert_array_equal(traced, marked)
    assert traced.dtype == marked.dtype == np.int32
