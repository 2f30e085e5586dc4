"""Attention kernels against a brute-force oracle, and what they promise besides numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.flash_attention import flash_attention, xla
from pallas_kernels.flash_attention.reference import Options
from pallas_kernels.flash_attention.specs import Spec, tagged
from tests.pallas_kernels.attention_oracle import cotangents, mask, oracle

EPS = float(np.finfo(np.float32).eps)
CI = {spec.name: spec for spec in tagged("ci")}
# What differs for loops: positions, padded tiles, documents, grouped heads.
LOOPED = ("bert", "unmasked", "gemma2", "more_keys", "more_queries", "one_token")
LOOPED += ("lambda", "lambda_packed", "lambda_both_sides")


@pytest.fixture(params=["reference", "xla", "xla_loop"])
def implementation(request, monkeypatch):
    """A name for flash_attention; 'xla_loop' is 'xla' with every shape taking its loops."""
    if request.param == "xla_loop":
        monkeypatch.setattr(xla, "SMALL", 0)
        monkeypatch.setitem(xla.TILE, "cpu", (16, 8))
    return request.param.removesuffix("_loop")


def attend(implementation, spec):
    """(inputs, do, dlse) -> o, lse and gradients by name, compiled."""
    call = spec.call(implementation)

    @jax.jit
    def run(inputs, do, dlse):
        others = {n: x for n, x in inputs.items() if n not in spec.differentiable}
        differ = {n: inputs[n] for n in spec.differentiable}
        out, pull = jax.vjp(lambda differ: call(**differ, **others), differ)
        return dict(zip(("o", "lse"), out, strict=True)) | pull((do, dlse))[0]

    return lambda *args: jax.tree.map(np.asarray, run(*args))


def assert_close(ours, true):
    """Sums of at most 71 x 3 terms of order 1, rounded at random: within 32 eps of the largest."""
    for name, exact in true.items():
        blind = np.isinf(exact)
        np.testing.assert_array_equal(ours[name][blind], exact[blind])
        size = max(1.0, np.abs(exact[~blind]).max())
        np.testing.assert_allclose(
            ours[name][~blind], exact[~blind], rtol=0, atol=32 * EPS * size, err_msg=name
        )


# The contract's test, as of every op, compares the others with the reference in float64.
@pytest.mark.parametrize(
    ("implementation", "name"),
    [("reference", name) for name in CI] + [("xla_loop", name) for name in LOOPED],
    indirect=["implementation"],
)
def test_outputs_and_gradients_equal_the_oracle(implementation, name):
    spec = CI[name]
    args = spec.inputs(), *cotangents(spec)
    assert_close(attend(implementation, spec)(*args), oracle(spec, *args))


def scattered(spec, seed=3):
    """The spec's inputs with documents in several pieces, whose ids come in no order."""
    rng, inputs = np.random.default_rng(seed), spec.inputs()
    L, S = spec.shapes["q"][1], spec.shapes["k"][1]
    ids = rng.integers(0, 4, (spec.B, -(-max(L, S) // 5))).astype(np.int32)
    row = np.repeat(ids, 5, axis=1)
    return inputs | {"q_segments": row[:, -L:], "kv_segments": row[:, -S:]}


@pytest.mark.parametrize("implementation", ["reference", "xla_loop"], indirect=True)
@pytest.mark.parametrize("name", ["lambda_packed", "sinks", "more_keys"])
def test_segments_need_not_be_sorted(implementation, name):
    spec = CI[name]
    args = scattered(spec), *cotangents(spec)
    assert_close(attend(implementation, spec)(*args), oracle(spec, *args))


@pytest.mark.parametrize(("platform", "kind"), [("tpu", "TPU v5"), ("gpu", "NVIDIA H200")])
def test_kernels_get_segments_of_32_bits(platform, kind):
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int8)
    both = {"q_segments": ids, "kv_segments": ids}
    run = functools.partial(flash_attention, implementation=f"pallas_{platform}")
    device = AbstractDevice(device_kind=kind, num_cores=132, platform=platform)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        assert jax.eval_shape(run, x, x, x, **both).shape == x.shape


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
@pytest.mark.parametrize("sizes", [{"L": 0, "S": 4}, {"L": 4, "S": 0}, {"L": 4, "B": 0}])
def test_none_takes_arrays_without_elements(platform, sizes):
    B, L, S = (({"B": 2, "S": 4} | sizes)[n] for n in "BLS")
    q, kv = (jax.ShapeDtypeStruct((B, n, 2, 8), jnp.bfloat16) for n in (L, S))
    kind = {"cpu": "cpu", "tpu": "TPU v5", "gpu": "NVIDIA H200"}[platform]
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    run = jax.grad(lambda *args: flash_attention(*args).astype(jnp.float32).sum(), (0, 1, 2))
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        assert [x.shape for x in jax.eval_shape(run, q, kv, kv)] == [q.shape, kv.shape, kv.shape]


@pytest.mark.parametrize("name", ["packed", "gemma2", "more_queries", "sinks"])
def test_oracle_gradients_equal_finite_differences(name):
    spec = CI[name]
    inputs, (do, dlse) = spec.inputs(), cotangents(spec)
    rng = np.random.default_rng(2)
    names = spec.differentiable
    step = {n: rng.standard_normal(inputs[n].shape) for n in names}

    def value(t):
        moved = inputs | {n: inputs[n].astype(np.float64) + t * step[n] for n in names}
        out = oracle(spec, moved, do, dlse)
        seen = np.where(np.isinf(out["lse"]), 0, out["lse"])
        return (out["o"] * do).sum() + (seen * dlse).sum()

    grads = oracle(spec, inputs, do, dlse)
    slope = sum((grads[n] * step[n]).sum() for n in names)
    h = 1e-5  # its square, the error of a central difference, is 1e-10
    assert (value(h) - value(-h)) / (2 * h) == pytest.approx(slope, rel=1e-6)


def bf16_attention(q, k, v, seen):
    """Everything in bfloat16 but the softmax, as a user would write it."""
    s = jnp.einsum("blhk,bshk->bhls", q, k) * jnp.bfloat16(q.shape[3] ** -0.5)
    p = jax.nn.softmax(jnp.where(seen[:, None], s.astype(jnp.float32), -1e30), -1)
    return jnp.einsum("bhls,bshv->blhv", p.astype(jnp.bfloat16), v)


def test_bfloat16_errs_at_most_twice_as_much_as_plain_bfloat16(implementation):
    spec = Spec("bf16", "ci", B=2, L=64, H=2, K=32, documents=2)
    inputs = spec.inputs()
    halves = [jnp.asarray(inputs[n], jnp.bfloat16) for n in "qkv"]
    inputs |= {n: np.float32(x) for n, x in zip("qkv", halves, strict=True)}
    seen = mask(spec, inputs["q_segments"], inputs["kv_segments"])
    do, dlse = cotangents(spec)
    do = jnp.where(seen.any(2)[:, :, None, None], do, 0).astype(jnp.bfloat16)
    true = oracle(spec, inputs, np.float32(do), 0 * dlse)
    rounded = inputs | dict(zip("qkv", halves, strict=True))
    ours = attend(implementation, spec)(rounded, do, 0 * dlse)
    plain, pull = jax.vjp(jax.jit(lambda *qkv: bf16_attention(*qkv, jnp.asarray(seen))), *halves)
    assert ours["o"].dtype == jnp.bfloat16
    error = lambda x, y: np.abs(np.float32(x) - y)[seen.any(2)].max()
    for name, theirs in zip("oqkv", (plain, *pull(do)), strict=True):
        assert error(ours[name], true[name]) <= 2 * error(theirs, true[name])


def test_gradients_are_zero_where_a_query_does_not_see(implementation):
    spec = CI["gemma2"]
    inputs = spec.inputs()
    seen = mask(spec, inputs["q_segments"], inputs["kv_segments"])
    run = attend(implementation, spec)
    for t in (5, 30, 60):
        do, dlse = (np.zeros_like(x) for x in cotangents(spec))
        do[:, t], dlse[:, t] = 1, 1
        o, lse, dq, dk, dv = (run(inputs, do, dlse)[n] for n in ("o", "lse", *"qkv"))
        assert not np.delete(dq, t, axis=1).any()
        assert not dk[~seen[:, t]].any()
        assert not dv[~seen[:, t]].any()
        assert np.abs(dv[seen[:, t]]).min() > 0
    assert not o[~seen.any(2)].any()
    assert np.isneginf(lse[~seen.any(2)]).all()


def test_blocks_out_of_reach_are_not_read(monkeypatch):
    """A key that is NaN spoils what reads it, even masked: so rows that pass by it stay clean."""
    monkeypatch.setattr(xla, "SMALL", 0)
    monkeypatch.setitem(xla.TILE, "cpu", (16, 8))
    spec = Spec("reach", "ci", B=1, L=64, H=1, K=8, window=8)
    inputs = spec.inputs()
    inputs["k"][:, 24:32] = np.nan
    got = attend("xla", spec)(inputs, *cotangents(spec))
    read = np.zeros(64, bool)
    read[16:48] = True  # tokens 16-31 hold the keys, 32-47 look back at them
    np.testing.assert_array_equal(np.isnan(got["lse"])[0, :, 0], read)
    np.testing.assert_array_equal(np.isnan(got["q"])[0, :, 0].any(1), read)


def test_leading_keys_and_the_window_are_read_and_nothing_between(monkeypatch):
    monkeypatch.setattr(xla, "SMALL", 0)
    monkeypatch.setitem(xla.TILE, "cpu", (8, 8))
    spec = Spec("reach", "ci", B=1, L=64, H=1, K=8, window=8, first=3)
    to_visit, count = xla.visits(8, 8, 64, 64, None, None, Options(True, 8, None, 1.0, 3))
    assert [list(x[:n]) for x, n in zip(to_visit, count, strict=True)] == [
        sorted({0, max(i - 1, 0), i}) for i in range(8)
    ]
    inputs = spec.inputs()
    inputs["k"][:, 24:32] = np.nan
    lse = attend("xla", spec)(inputs, *cotangents(spec))["lse"]
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(lse[0, :, 0])), np.arange(24, 40))


def test_documents_of_other_blocks_are_not_read(monkeypatch):
    """In order or not, as long as blocks hold whole documents."""
    monkeypatch.setattr(xla, "SMALL", 0)
    monkeypatch.setitem(xla.TILE, "cpu", (8, 8))
    spec = Spec("reach", "ci", B=1, L=64, H=1, K=8, documents=4)
    inputs = spec.inputs()
    row = np.repeat(np.int32([[5, 2, 9, 1]]), 16, axis=1)
    inputs |= {"q_segments": row, "kv_segments": row}
    inputs["k"][:, 16:24] = np.nan
    lse = attend("xla", spec)(inputs, *cotangents(spec))["lse"]
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(lse[0, :, 0])), np.arange(16, 32))


@pytest.mark.parametrize(
    ("platform", "kind", "dtype", "documents", "taken"),
    [
        ("tpu", "TPU v5", "float32", 2, "flash_attention_forward"),
        ("gpu", "NVIDIA H200", "bfloat16", 0, "dot_product_attention_fwd"),
        ("gpu", "NVIDIA H200", "bfloat16", 2, "dot_general"),
        ("gpu", "NVIDIA H200", "float32", 0, "dot_general"),
        ("cpu", "cpu", "bfloat16", 0, "dot_general"),
    ],
)
def test_none_takes_the_first_that_can(platform, kind, dtype, documents, taken):
    spec = Spec("none", "ci", B=1, L=256, H=2, K=64, documents=documents)
    arrays = {n: jax.ShapeDtypeStruct(*x) for n, x in spec.abstract(jnp.dtype(dtype)).items()}
    device = AbstractDevice(device_kind=kind, num_cores=132, platform=platform)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        program = str(jax.make_jaxpr(lambda arrays: spec.call(None)(**arrays))(arrays))
    known = "flash_attention_forward", "dot_product_attention_fwd", "dot_general"
    assert next(name for name in known if name in program) == taken


def test_memory_grows_with_length_not_its_square():
    def temporaries(length, implementation):
        x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        loss = lambda q, k, v: flash_attention(q, k, v, implementation=implementation).sum()
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(2048, "xla"), temporaries(4096, "xla")
    assert long < 2.2 * short
    assert temporaries(2048, "reference") > 10 * short


def test_remat_can_keep_the_output_and_then_runs_the_forward_pass_once():
    inputs = [jnp.asarray(CI["plain"].inputs()[n]) for n in "qkv"]
    run = lambda q, k, v: jnp.sin(flash_attention(q, k, v, implementation="xla")).sum()
    keep = jax.checkpoint_policies.save_only_these_names("attention")

    def exponentials(fn):
        return str(jax.make_jaxpr(jax.grad(fn, (0, 1, 2)))(*inputs)).count(" exp ")

    assert exponentials(jax.checkpoint(run, policy=keep)) == exponentials(run)
    assert exponentials(jax.checkpoint(run)) > exponentials(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.ones((2, 37, 3, 8))}, r"3 query heads cannot share 2 key heads"),
        ({"k": jnp.ones((2, 37, 2, 8), jnp.bfloat16)}, "need one dtype"),
        ({"kv_segments": jnp.ones((2, 37), jnp.int32)}, "both q_segments and kv_segments, or"),
        ({"window": 0}, "0 is less than 1"),
        ({"softcap": 0.0}, "0.0 is not positive"),
        ({"first": 4}, "so 4 with window None means nothing"),
        ({"first": -1, "window": 3}, "so -1 with window 3 means nothing"),
        ({"implementation": "cuda"}, "'cuda'; there are: pallas_tpu, cudnn, xla, pallas_gpu, ref"),
        ({"config": 7}, "config 7 is for one of the implementations pallas_tpu, pallas_gpu: name"),
        ({"config": 7, "implementation": "xla"}, "config 7 is for one of the implementations"),
    ],
)
def test_errors_are_sentences(change, message):
    args = {n: jnp.asarray(x) for n, x in CI["plain"].inputs().items()}
    with pytest.raises(ValueError, match=message):
        flash_attention(**(args | change))
