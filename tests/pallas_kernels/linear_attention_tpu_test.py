"""The TPU's forward kernel in the interpreter, with its race detector, against float64."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.linear_attention import (
    features,
    pallas_tpu,
    reference,
    tpu_forward,
    tpu_forward_features,
    tpu_tiles,
)
from pallas_kernels.linear_attention.pallas_tpu import Config
from pallas_kernels.linear_attention.reference import Arrays, Options
from pallas_kernels.linear_attention.specs import SPECS, Spec
from pallas_kernels.linear_attention.tpu_backward import Backward
from tests.pallas_kernels.interpreted import interpreted

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8}


def target(kind="TPU v5p"):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def cut(T=128, C=128, heads=1, R=1) -> Config:
    return Config(T, C, heads, R, Backward(128, 128, 1))


def spec(name: str, L: int, **more) -> Spec:
    return Spec(name, "", **({"B": 1, "H": 1, "K": 8} | more), L=L)


CASES = [
    # The last block of one row and the first of the next are in scratch one after the other; the
    # sequence of blocks is one for each of two cores; z itself is turned.
    (spec("elu", 300, features="elu", B=2, H=2), cut()),
    # Two rows of query heads share a key head, and each sums up its state.
    (
        spec("groups", 200, H=4, G=1, f=12, bias=True, documents=4, state=True),
        cut(T=256, R=2),
    ),
    # Chunks wider than a row of lanes, heads side by side, and keys that come after their queries.
    (
        spec("lagging", 300, features="exp", H=2, f=8, bias=True, documents=3, lag=30, V=24),
        cut(T=512, C=256, heads=2),
    ),
    (spec("joint", 140, features="joint", H=2, f=20, state=True, K=20, V=130), cut(heads=2)),
]


def compared(spec: Spec, config: Config | None, dtype: str, scale: float = 1.0):
    """(result of the kernel, that of the definition in float64) of o, total, values and keys."""
    options, inputs = Options(spec.features, config), spec.inputs()
    inputs |= {n: scale * inputs[n] for n in ("q_map", "k_map") if n in inputs}
    arrays = {n: jnp.asarray(x, dtype if n in "qkv" else x.dtype) for n, x in inputs.items()}
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(np.float64(x)) if jnp.issubdtype(x.dtype, jnp.floating) else x
        exact = Arrays(**{n: wide(x) for n, x in arrays.items()})
        true = jax.jit(reference.forward, static_argnums=1)(exact, options)
        true = [np.asarray(x) for x in true]
    with interpreted("tpu"):
        ours = jax.jit(lambda arrays: pallas_tpu.forward(arrays, options))(Arrays(**arrays))
        ours = [np.float64(x) for x in ours]
    return list(zip(ours, true, strict=True))


def check(pairs, size: float):
    for ours, true in pairs:
        assert ours.shape == true.shape
        atol = size * max(1.0, np.abs(true).max())
        np.testing.assert_allclose(ours, true, rtol=0, atol=atol)


@pytest.mark.parametrize(("spec", "config"), CASES, ids=lambda x: getattr(x, "name", ""))
def test_results_equal_the_definition(spec, config):
    # Sums of some hundred terms of order 1, each rounded once and at random.
    check(compared(spec, config, "float32"), 32 * EPS["float32"])


def test_bfloat16_errs_by_its_rounding_of_features_and_weights():
    pairs = compared(spec("bfloat16", 200, f=16, H=2), None, "bfloat16")
    # A row's first o is one weight's, rounded before it is divided by itself, and rounded again.
    check(pairs, 1.5 * EPS["bfloat16"])


def test_bfloat16_does_not_round_the_normaliser():
    k = jnp.zeros((1, 450, 1, 16), jnp.bfloat16).at[..., 0].set(1 + 3 / 128)
    options = Options("identity", cut(T=256))
    with interpreted("tpu"):
        run = jax.jit(lambda k: pallas_tpu.forward(Arrays(jnp.ceil(k) / 2, k, k), options))
        _, total, _, keys = run(k)
    # 387 of them and more need more bits than bfloat16 has.
    true = np.cumsum(np.full(450, 1 + 3 / 128))
    np.testing.assert_allclose(total[0, :, 0], true, rtol=4 * EPS["float32"])
    np.testing.assert_allclose(keys[0, 0, 0], true[-1], rtol=4 * EPS["float32"])


@pytest.mark.parametrize("form", ["softmax", "joint"])
def test_exponents_beyond_float32_are_shifted(form):
    case = spec("large", 130, f=8, features=form, H=2)
    # z up to some 300, of which 300 eps are lost before the exponential is taken.
    check(compared(case, cut(heads=2), "float32", scale=100.0), 1024 * EPS["float32"])


@pytest.mark.parametrize("form", ["softmax", "joint"])
@pytest.mark.parametrize(("scale", "unsafe"), [(1.0, False), (200.0, True)])
def test_what_is_not_shifted_is_near_one(form, scale, unsafe):
    z = scale * np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32)
    z[12:] = 0
    run = jax.jit(lambda z: tpu_forward_features.features(form, z, 12, None))
    phi, extremes = run(jnp.asarray(z))
    assert bool(tpu_forward_features.unsafe(extremes)) == unsafe
    if not unsafe:
        exact = jax.jit(lambda z: tpu_tiles.features(form, z, 12))(jnp.asarray(z))
        np.testing.assert_allclose(phi, exact, rtol=16 * EPS["float32"], atol=0)


@pytest.mark.parametrize("form", tpu_tiles.FORMS)
def test_turned_features_are_the_features_and_have_their_gradient(form):
    f, rng = 12, np.random.default_rng(0)
    z, cotangent = rng.standard_normal((5, f)), rng.standard_normal((5, 2, f))
    halves = tpu_tiles.width(form, f) // 16
    with jax.enable_x64(True):
        flat = lambda z: features.of(form, z).reshape(5, halves, f)
        true, pull = jax.vjp(flat, jnp.asarray(z))
        true_z = pull(jnp.asarray(cotangent[:, :halves]))[0]
    lay = lambda x: np.pad(np.float32(x), ((0, 0), (0, 0), (0, 4))).reshape(5, -1).T
    turned = jnp.asarray(lay(z[:, None]))
    phi = jax.jit(lambda z: tpu_tiles.features(form, z, f))(turned)
    np.testing.assert_allclose(phi, lay(true), rtol=0, atol=16 * EPS["float32"])
    dz = tpu_tiles.features_back(form, turned, phi, jnp.asarray(lay(cotangent[:, :halves])), f)
    np.testing.assert_allclose(dz[:f].T, true_z, rtol=0, atol=64 * EPS["float32"])


def test_a_chunk_s_masks_are_those_of_its_documents():
    L, C = 200, 128
    case = spec("masks", L, B=3, documents=5, lag=7, state=True)
    arrays = Arrays(**{n: jnp.asarray(x) for n, x in case.inputs().items()})
    rows = np.asarray(tpu_tiles.tokens(arrays, C, 256))
    q, kv = (np.pad(x, ((0, 0), (0, 56))) for x in (arrays.q_segments, arrays.kv_segments))
    for b, n in itertools.product(range(3), range(2)):
        own = rows[b][:, n * C : (n + 1) * C]
        i, j = q[b, None, n * C : (n + 1) * C], kv[b, n * C : (n + 1) * C, None]
        seen = (i == j) & (j != 0) & (np.arange(C)[:, None] <= np.arange(C)[None])
        first, last = (jnp.asarray(own[x][None]) for x in (tpu_tiles.FIRST, tpu_tiles.LAST))
        np.testing.assert_array_equal(tpu_tiles.seen(first, last, C), seen)
    np.testing.assert_array_equal(rows[:, tpu_tiles.REAL], kv != 0)


def test_every_block_of_a_sequence_is_attended_with_once():
    case = next(x for x in SPECS if x.name == "llama-7b-4k")
    with target():
        runs = pallas_tpu.executions(case, cut(T=1024, heads=2))[tpu_forward.NAME]
        cores = pltpu.get_tpu_info().num_cores
    # One step more a core fills the scratch; features are made again for none of these inputs.
    assert runs == [case.B * case.H // 2 * 4 + cores, 0.0]


@pytest.mark.parametrize("kind", ["TPU v5e", "TPU v5p", "TPU v6e", "TPU7x"])
def test_the_heuristic_fits_every_shape(kind):
    lengths, heads = (1, 130, 1025, 3000, 8192, 10**6), ((1, 1), (4, 4), (6, 2), (32, 1), (71, 1))
    with target(kind):
        half = pltpu.get_tpu_info().vmem_capacity_bytes // 2
        for L, (H, G), K, dtype in itertools.product(lengths, heads, (8, 128, 512), EPS):
            q, k = (jax.ShapeDtypeStruct((2, L, n, K), dtype) for n in (H, G))
            found = pallas_tpu.heuristic(Arrays(q, k, k), Options("softmax"))
            assert G % found.heads == H // G % found.R == 0
            assert found.T < L + found.C * pallas_tpu.PIECES
            block = found.heads * found.T * K * q.dtype.itemsize
            assert half >= 4 * block * (found.R + 1)


def test_what_does_not_fit_is_an_error_of_one_sentence():
    for wrong in ({"C": 100}, {"T": 192}, {"heads": 0}):
        with pytest.raises(ValueError, match="choose"):
            cut(**wrong)
    case = spec("wrong", 128, H=4, G=2)
    for config in (cut(heads=4), cut(R=3), cut(heads=2)):
        with target(), pytest.raises(ValueError, match="choose divisors"):
            pallas_tpu.executions(case, config)


def test_what_it_cannot_do_it_declines():
    x = jnp.ones((1, 8, 1, 8), jnp.float16)
    with pytest.raises(NotImplementedError, match="for a TPU, not a cpu"):
        pallas_tpu.forward(Arrays(x, x, x), Options("elu"))
    with target(), pytest.raises(NotImplementedError, match="not float16"):
        pallas_tpu.forward(Arrays(x, x, x), Options("elu"))
    x = x.astype(jnp.float32)
    with target(), pytest.raises(NotImplementedError, match="not taylor: use xla"):
        pallas_tpu.forward(Arrays(x, x, x), Options("taylor"))


def test_candidates_are_cuts_of_the_heads():
    for case in (dataclasses.replace(x) for x in SPECS if "aot" in x.tag):
        with target():
            found = list(pallas_tpu.candidates(case))
            assert len(found) == len(set(found)) > 3
            for config in found:
                pallas_tpu.executions(case, config)
