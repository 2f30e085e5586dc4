"""Attention kernels against a brute-force oracle, and what they promise besides numbers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import flash_attention, xla
from pallas_kernels.flash_attention.reference import Options
from pallas_kernels.flash_attention.specs import Spec, tagged

EPS = float(np.finfo(np.float32).eps)
CI = {spec.name: spec for spec in tagged("ci")}


@pytest.fixture(params=["reference", "xla", "xla_loop"])
def implementation(request, monkeypatch):
    """A name for flash_attention; 'xla_loop' is 'xla' with every shape taking its loops."""
    if request.param == "xla_loop":
        monkeypatch.setattr(xla, "SMALL", 0)
        monkeypatch.setitem(xla.TILE, "cpu", (16, 8))
    return request.param.removesuffix("_loop")


def mask(spec: Spec, q_segments=None, kv_segments=None) -> np.ndarray:
    """[B L S], pair by pair as the docstring says it."""
    L, S = spec.shapes["q"][1], spec.shapes["k"][1]
    seen = np.zeros((spec.B, L, S), bool)
    for b, i, j in itertools.product(range(spec.B), range(L), range(S)):
        ahead = j - (i + S - L)
        ok = not (spec.causal and ahead > 0)
        ok = ok and (spec.window is None or abs(ahead) < spec.window)
        if q_segments is not None:
            ok = ok and q_segments[b, i] == kv_segments[b, j] != 0
        seen[b, i, j] = ok
    return seen


def oracle(spec: Spec, inputs, do, dlse):
    """o, lse, dq, dk, dv in float64, one head at a time."""
    q, k, v, do, dlse = (np.float64(x) for x in (*(inputs[n] for n in "qkv"), do, dlse))
    seen = mask(spec, inputs.get("q_segments"), inputs.get("kv_segments"))
    o, lse = np.zeros_like(do), np.full(dlse.shape, -np.inf)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    scale, R = spec.K**-0.5, spec.H // k.shape[2]
    for b, h in itertools.product(range(spec.B), range(spec.H)):
        g, some = h // R, seen[b].any(1)
        s = scale * q[b, :, h] @ k[b, :, g].T
        slope = 1.0
        if spec.softcap is not None:
            s = spec.softcap * np.tanh(s / spec.softcap)
            slope = 1 - (s / spec.softcap) ** 2
        e = np.where(seen[b], np.exp(s), 0)
        p = e / np.where(some, e.sum(1), 1)[:, None]
        lse[b, some, h] = np.log(e.sum(1)[some])
        o[b, :, h] = p @ v[b, :, g]
        dp = do[b, :, h] @ v[b, :, g].T
        change = dp - (p * dp).sum(1, keepdims=True) + dlse[b, :, h, None]
        ds = scale * slope * p * change
        dq[b, :, h] = ds @ k[b, :, g]
        dk[b, :, g] += ds.T @ q[b, :, h]
        dv[b, :, g] += p.T @ do[b, :, h]
    return o, lse, dq, dk, dv


def attend(implementation, **options):
    """(inputs, do, dlse) -> o, lse, dq, dk, dv, compiled."""
    call = functools.partial(
        flash_attention, return_lse=True, implementation=implementation, **options
    )

    @jax.jit
    def run(inputs, do, dlse):
        segments = {n: inputs[n] for n in inputs.keys() - set("qkv")}
        out, pull = jax.vjp(functools.partial(call, **segments), *(inputs[n] for n in "qkv"))
        return *out, *pull((do, dlse))

    return lambda *args: [np.asarray(x) for x in run(*args)]


def cotangents(spec: Spec):
    rng = np.random.default_rng(1)
    B, L, H, _ = spec.shapes["q"]
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    return draw(B, L, H, spec.shapes["v"][3]), draw(B, L, H)


@pytest.mark.parametrize("name", CI)
def test_outputs_and_gradients_equal_the_oracle(implementation, name):
    spec = CI[name]
    inputs, (do, dlse) = spec.inputs(), cotangents(spec)

    got = attend(implementation, **spec.options)(inputs, do, dlse)
    for name, ours, true in zip(
        ("o", "lse", "dq", "dk", "dv"), got, oracle(spec, inputs, do, dlse), strict=True
    ):
        blind = np.isinf(true)
        np.testing.assert_array_equal(ours[blind], true[blind])
        # Sums of at most 67 x 3 terms of order 1, rounded at random: within 32 eps of the largest.
        size = max(1.0, np.abs(true[~blind]).max())
        np.testing.assert_allclose(ours[~blind], true[~blind], rtol=0, atol=32 * EPS * size)
        assert np.isfinite(ours[~blind]).all(), name


@pytest.mark.parametrize("name", ["packed", "gemma2", "more_queries"])
def test_oracle_gradients_equal_finite_differences(name):
    spec = CI[name]
    inputs, (do, dlse) = spec.inputs(), cotangents(spec)
    rng = np.random.default_rng(2)
    step = {n: rng.standard_normal(inputs[n].shape) for n in "qkv"}

    def value(t):
        moved = inputs | {n: inputs[n].astype(np.float64) + t * step[n] for n in "qkv"}
        o, lse, *_ = oracle(spec, moved, do, dlse)
        return (o * do).sum() + (np.where(np.isinf(lse), 0, lse) * dlse).sum()

    _, _, *grads = oracle(spec, inputs, do, dlse)
    slope = sum((g * step[n]).sum() for g, n in zip(grads, "qkv", strict=True))
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
    o, _, *grads = attend(implementation, **spec.options)(rounded, do, 0 * dlse)
    plain, pull = jax.vjp(jax.jit(lambda *qkv: bf16_attention(*qkv, jnp.asarray(seen))), *halves)
    assert o.dtype == jnp.bfloat16
    error = lambda x, y: np.abs(np.float32(x) - y)[seen.any(2)].max()
    exact = (true[0], *true[2:])
    for ours, theirs, truth in zip((o, *grads), (plain, *pull(do)), exact, strict=True):
        assert error(ours, truth) <= 2 * error(theirs, truth)


def test_gradients_are_zero_where_a_query_does_not_see(implementation):
    spec = CI["gemma2"]
    inputs = spec.inputs()
    seen = mask(spec, inputs["q_segments"], inputs["kv_segments"])
    run = attend(implementation, **spec.options)
    for t in (5, 30, 60):
        do, dlse = (np.zeros_like(x) for x in cotangents(spec))
        do[:, t], dlse[:, t] = 1, 1
        o, lse, dq, dk, dv = run(inputs, do, dlse)
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
    _, lse, dq, _, _ = attend("xla", **spec.options)(inputs, *cotangents(spec))
    read = np.zeros(64, bool)
    read[16:48] = True  # tokens 16-31 hold the keys, 32-47 look back at them
    np.testing.assert_array_equal(np.isnan(lse)[0, :, 0], read)
    np.testing.assert_array_equal(np.isnan(dq)[0, :, 0].any(1), read)


@pytest.mark.parametrize(("L", "S"), [(40, 40), (37, 61), (61, 37), (1, 50)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 11, 100])
def test_visited_blocks_are_those_that_hold_a_visible_pair(L, S, causal, window):
    spec = Spec("blocks", "ci", B=1, L=L, S=S, H=1, K=1, causal=causal, window=window)
    seen = mask(spec)[0]
    assert spec.flops == 4 * seen.sum()
    for T, C in ((8, 8), (16, 5), (5, 16)):
        visited = xla.key_blocks(L, S, T, C, Options(causal, window, None, 1.0))
        for i, (start, stop) in enumerate(visited):
            rows = seen[i * T : (i + 1) * T]
            held = [j for j in range(-(-S // C)) if rows[:, j * C : (j + 1) * C].any()]
            assert list(range(start, stop)) == held


def test_causal_blocks_are_half_of_all():
    n = 16
    visited = xla.key_blocks(n * 8, n * 8, 8, 8, Options(True, None, None, 1.0))
    assert np.diff(visited).sum() == n * (n + 1) // 2


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
        ({"implementation": "cuda"}, "'cuda'; there are: xla, reference"),
    ],
)
def test_errors_are_sentences(change, message):
    args = {n: jnp.asarray(x) for n, x in CI["plain"].inputs().items()}
    with pytest.raises(ValueError, match=message):
        flash_attention(**(args | change))
