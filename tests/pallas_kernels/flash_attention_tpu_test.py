"""The TPU's forward kernel, interpreted with its races watched, against a brute-force oracle."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.flash_attention import blocks, pallas_tpu, tpu_forward, tpu_tiles
from pallas_kernels.flash_attention.pallas_tpu import Config
from pallas_kernels.flash_attention.reference import Options, mark
from pallas_kernels.flash_attention.specs import SPECS, Spec
from tests.pallas_kernels.flash_attention_test import EPS

V5P = AbstractDevice(device_kind="TPU v5p", num_cores=1, platform="tpu")
BFLOAT16 = 2.0**-8


def target(device=V5P):
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def config(T=128, C=128, D=128, P=512, ahead=0) -> Config:
    x = jax.ShapeDtypeStruct((1, 128, 1, 128), jnp.float32)
    with target():
        guess = pallas_tpu.heuristic(x, x, x, False, options_of(BASE))
    return dataclasses.replace(guess, T=T, C=C, D=D, P=P, ahead=ahead)


def options_of(spec: Spec, **changes) -> Options:
    return Options(**spec.options, **{"scale": spec.K**-0.5} | changes)


def seen(spec: Spec, q_segments, kv_segments) -> np.ndarray:
    """[B L S] by the docstring's words; a document's first keys are found by counting."""
    (_, L, *_), (_, S, *_) = spec.shapes["q"], spec.shapes["k"]
    ahead = np.arange(S)[None] - np.arange(L)[:, None] - (S - L)
    q = np.ones((spec.B, L), int) if q_segments is None else q_segments
    kv = np.ones((spec.B, S), int) if kv_segments is None else kv_segments
    rank = np.stack([[np.sum(row[:j] == row[j]) for j in range(S)] for row in kv])
    ok = (q[:, :, None] == kv[:, None]) & (kv != 0)[:, None]
    ok &= (ahead <= 0) if spec.causal else True
    if spec.window is not None:
        ok &= (abs(ahead) < spec.window) | (rank < spec.first)[:, None]
    return ok


def oracle(spec: Spec, q, k, v, ok, options: Options):
    """o and lse in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    R = q.shape[2] // k.shape[2]
    s = options.scale * np.einsum("blhk,bshk->bhls", q, k.repeat(R, 2))
    s = s if spec.softcap is None else spec.softcap * np.tanh(s / spec.softcap)
    e = np.where(ok[:, None], np.exp(s), 0)
    total = e.sum(3)
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    o = np.einsum("bhls,bshv->blhv", e / np.maximum(total, 1e-300)[..., None], v.repeat(R, 2))
    return o, lse.swapaxes(1, 2)


def run(spec: Spec, dtype, segments, options: Options):
    inputs = {n: jnp.asarray(spec.inputs()[n], dtype) for n in "qkv"}
    args = (*inputs.values(), *segments)
    with target(), pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        got = jax.jit(lambda *args: pallas_tpu.forward(*args, options))(*args)
        got = [np.asarray(x, np.float64) for x in got]
    assert not interpreter.races.races_found
    return got, inputs


def document_ids(spec: Spec, shuffled: bool):
    """Segments of a spec; shuffled: in no order, so that a document lies in pieces."""
    segments = spec.segments()
    if not segments:
        return None, None
    rows = [segments[n] for n in ("q_segments", "kv_segments")]
    if shuffled:
        rng = np.random.default_rng(3)
        rows = [rng.permuted(np.repeat(x[:, ::8], 8, 1)[:, : x.shape[1]], axis=1) for x in rows]
    return tuple(rows)


BASE = Spec("tpu", "ci", B=1, L=384, H=1, K=128)
CASES = {
    "causal": ({}, {"P": 384}),
    "strips": ({"L": 640}, {"T": 256, "P": 768, "ahead": 1}),
    "keys_stream": ({"L": 512}, {"P": 128, "ahead": 3}),
    "tiles_of_more_queries": ({"L": 512, "window": 256}, {"T": 256, "P": 256}),
    "tiles_of_more_keys": ({"L": 300, "S": 556}, {"C": 256}),
    "unmasked": ({"L": 200, "S": 300, "causal": False, "K": 64, "V": 80}, {"C": 256}),
    "window": ({"L": 512, "window": 128, "H": 2, "G": 1}, {"P": 128}),
    "window_in_tile": ({"L": 512, "window": 77}, {"T": 256, "C": 256, "P": 256}),
    "window_in_band": ({"L": 600, "window": 77}, {"T": 256, "C": 256, "P": 768}),
    "band_both_sides": ({"L": 500, "window": 130, "causal": False}, {"T": 256, "P": 512}),
    "both_sides": ({"window": 130, "causal": False, "S": 470}, {}),
    "window_at_the_end": ({"L": 250, "S": 506, "window": 128}, {}),
    "first": ({"L": 512, "window": 140, "first": 5}, {}),
    "first_packed": ({"window": 60, "first": 9, "documents": 3, "B": 2}, {"P": 256}),
    "first_both_sides": ({"window": 60, "first": 9, "documents": 3, "causal": False}, {}),
    "packed": ({"documents": 4, "B": 2, "H": 4, "G": 2, "K": 64}, {}),
    "packed_strips": ({"L": 512, "documents": 3, "window": 256}, {"T": 256, "C": 256, "D": 256}),
    "packed_band": ({"L": 512, "documents": 3, "window": 50}, {"T": 256, "P": 512}),
    "packed_unmasked": ({"documents": 3, "causal": False, "S": 300}, {"ahead": 1, "T": 256}),
    "softcap": ({"L": 200, "softcap": 2.0, "H": 3, "G": 1, "K": 96}, {}),
    "more_queries": ({"S": 128}, {}),
    "more_queries_unaligned": ({"S": 200, "documents": 2}, {}),
    "heads_of_80": ({"L": 130, "K": 80, "B": 2}, {}),
    "heads_of_256": ({"L": 256, "K": 256, "V": 128}, {"T": 256, "C": 256}),
    "one_query": ({"L": 1, "S": 300, "H": 4, "G": 2}, {}),
}


def check(spec: Spec, dtype, segments, options: Options):
    (o, lse), inputs = run(spec, dtype, segments, options)
    ok = seen(spec, *segments)
    true_o, true_lse = oracle(spec, *inputs.values(), ok, options)
    blind = ~ok.any(2)
    assert not o[blind].any()
    assert np.isneginf(lse[blind]).all()
    # Scores are sums of K terms and o of S, of order 1, each rounded once and at random. With
    # bfloat16 weights are rounded before they multiply v, and o at the end.
    size = 2 if dtype == jnp.bfloat16 else 0
    np.testing.assert_allclose(o, true_o, rtol=0, atol=32 * EPS + size * BFLOAT16)
    np.testing.assert_allclose(lse[~blind], true_lse[~blind], rtol=0, atol=32 * EPS)


@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_the_oracle_without_a_race(name):
    changes, sizes = CASES[name]
    spec = dataclasses.replace(BASE, **changes)
    check(spec, jnp.float32, document_ids(spec, False), options_of(spec, config=config(**sizes)))


@pytest.mark.parametrize("changes", [{}, {"documents": 4, "window": 200, "softcap": 3.0}])
def test_bfloat16_outputs_equal_the_oracle(changes):
    spec = dataclasses.replace(BASE, **changes)
    check(spec, jnp.bfloat16, document_ids(spec, False), options_of(spec, config=config()))


@pytest.mark.parametrize("first", [0, 20])
def test_documents_in_pieces_and_in_no_order(first):
    spec = dataclasses.replace(BASE, documents=5, window=200, first=first)
    segments = document_ids(spec, True)
    assert (np.diff(segments[1][0]) < 0).sum() > 20
    check(spec, jnp.float32, segments, options_of(spec, config=config()))


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_any_scale(scale):
    spec = dataclasses.replace(BASE, L=130, K=64)
    check(spec, jnp.float32, (None, None), options_of(spec, config=config(), scale=scale))


@pytest.mark.parametrize("name", CASES)
def test_every_visible_pair_is_in_one_visited_tile(name):
    """The table against the tiles' own definition, START and FAR standing for T keys."""
    changes, sizes = CASES[name]
    spec, sizes = dataclasses.replace(BASE, **changes), config(**sizes)
    (_, L, *_), (_, S, *_) = spec.shapes["q"], spec.shapes["k"]
    segments, options = document_ids(spec, False), options_of(spec)
    table = tpu_tiles.table(sizes.T, sizes.C, sizes.P, L, S, *segments, options)
    kinds = blocks.kinds(sizes.T, sizes.C, L, S, segments[0], mark(segments[1], options), options)
    words, (_, n, m) = tpu_tiles.pack(table.codes), table.codes.shape
    for (b, i, j), code in np.ndenumerate(table.codes):
        assert tpu_tiles.code_at(words, b * n + i, m, j) == code
        start, stop, first = table.ranges[b, i]
        visited = start <= j < stop or j == first
        assert code in table.present if visited else code == tpu_tiles.SKIP
    if table.band is None:
        wide = np.isin(table.codes, (tpu_tiles.START, tpu_tiles.FAR))
        ends = np.where(wide, max(1, sizes.T // sizes.C), table.codes != tpu_tiles.SKIP)
        for (b, i, j), kind in np.ndenumerate(kinds):
            visits = sum(j - k < ends[b, i, k] for k in range(j + 1))
            assert visits == 1 or (kind == 0 and visits < 2)


def test_a_causal_row_visits_each_whole_tile_once_and_half_of_the_diagonal():
    spec = next(spec for spec in SPECS if spec.name == "llama-7b-8k")
    with target():
        runs = pallas_tpu.executions(spec, config(1024, 1024, 128, 8192))[tpu_forward.NAME]
    heads, n = spec.B * spec.H, 8
    assert runs == [heads * n, heads * n * (n - 1) / 2, heads * n]


@pytest.mark.parametrize("kind", ["TPU v5e", "TPU v5p", "TPU v6e", "TPU7x"])
def test_the_heuristic_fits_every_shape(kind):
    lengths, heads = (1, 130, 1025, 1100, 3000, 8192, 10**6), (8, 128, 192, 256)
    with target(dataclasses.replace(V5P, device_kind=kind)):
        half = pltpu.get_tpu_info().vmem_capacity_bytes // 2
        for L, S, K, window in itertools.product(lengths, lengths, heads, (None, 128, 4096, 5000)):
            q, k = (jax.ShapeDtypeStruct((1, x, 1, K), jnp.bfloat16) for x in (L, S))
            found = pallas_tpu.heuristic(q, k, k, False, Options(True, window, None, 1.0))
            assert found.T < L + 1024
            assert half >= found.P * 4 * -(-K // 128) * 128 * 2
            if L == S and window is None:
                assert tpu_tiles.aligned(found.T, found.C, found.P, 0)


def test_wrong_sizes_are_errors_of_one_sentence():
    for wrong in ({"T": 100}, {"T": 256, "C": 128, "D": 256}, {"C": 256, "P": 128}):
        with pytest.raises(ValueError, match="choose"):
            config(**wrong)


def test_what_it_cannot_do_it_declines():
    x = jnp.ones((1, 8, 1, 8), jnp.float16)
    options = options_of(BASE)
    with pytest.raises(NotImplementedError, match="for a TPU, not a cpu"):
        pallas_tpu.forward(x, x, x, None, None, options)
    with target(), pytest.raises(NotImplementedError, match="not float16"):
        pallas_tpu.forward(x, x, x, None, None, options)


def test_tables_beyond_the_scalar_memory_are_declined():
    x = jax.ShapeDtypeStruct((1, 2**21, 1, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 2**21), jnp.int32)
    run = lambda q, ids: pallas_tpu.forward(q, q, q, ids, ids, options_of(BASE))
    with target(), pytest.raises(NotImplementedError, match="scalar memory"):
        jax.eval_shape(run, x, ids)
