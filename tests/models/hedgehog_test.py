"""Hedgehog by its equations in float64, its window, its constant state, and what it is taught."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import transfer
from models.context import Context
from models.mixers.hedgehog import Mixer
from models.mixers.linear_attention import Mixer as LinearAttention
from models.param import Dims
from pallas_kernels.flash_attention import flash_attention

B, L, H, G, K = 2, 21, 4, 2, 8
RNG = np.random.default_rng(0)
# Sums of some dozens of float32 terms of order 1, in another order.
CLOSE = dict(rtol=0, atol=64 * float(np.finfo(np.float32).eps))


def build(D=32, length=L, **own):
    dims = Dims(d_model=D, length=length, n_layers=2, base_d_model=D)
    own = dict(heads=H, kv_heads=G, head_dim=K) | own
    mixer = Mixer(dims, rngs=nnx.Rngs(0), **own)
    for name in ("q_map", "k_map", "q_map_bias", "k_map_bias", "mix"):
        if hasattr(mixer, name):
            weight = getattr(mixer, name)
            weight[...] += 0.3 * np.float32(RNG.standard_normal(weight.shape))
    return mixer


def context(segments=None, **more):
    segments = np.ones((B, L), np.int32) if segments is None else np.asarray(segments, np.int32)
    positions = np.broadcast_to(np.arange(segments.shape[1], dtype=np.int32), segments.shape)
    return Context(jnp.asarray(positions), jnp.asarray(segments), **more)


def rows(length=L):
    draw = lambda heads: jnp.float32(RNG.standard_normal((B, length, heads, K)))
    return draw(H), draw(G), draw(G)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


FORMS = {
    "paper": lambda z: np.concatenate([np.exp(z), np.exp(-z)], -1),
    "lolcats": lambda z: np.concatenate([softmax(z), softmax(-z)], -1),
    "fla": lambda z: softmax(np.concatenate([2 * z, -2 * z], -1)),
}


def weights(mixer, form, q, k, segments):
    """a_ij [B H L L] by the equations, float64, normalised: rows sum to one."""
    wide = lambda x: np.float64(np.asarray(x))
    q, k = wide(q), np.repeat(wide(k), H // G, 2)
    per_head = lambda x, n: np.repeat(wide(x), H // x.shape[0], 0) if n == "k" else wide(x)
    phi = {}
    for n, x in (("q", q), ("k", k)):
        w = np.broadcast_to(per_head(getattr(mixer, f"{n}_map")[...], n), (H, K, mixer.f))
        z = np.einsum("blhk,hkf->blhf", x, w)
        if hasattr(mixer, f"{n}_map_bias"):
            z = z + wide(getattr(mixer, f"{n}_map_bias")[...])
        phi[n] = FORMS[form](z)
    a = np.einsum("bihf,bjhf->bhij", phi["q"], phi["k"])
    i, j = np.arange(q.shape[1])[:, None], np.arange(q.shape[1])[None]
    seen = (i >= j) & (segments[:, :, None] == segments[:, None]) & (segments != 0)[:, None]
    if mixer.window is not None:
        s = np.einsum("bihk,bjhk->bhij", q, k) * K**-0.5
        near = seen & (i - j < mixer.window)
        peak = np.where(near[:, None], s, -np.inf).max(-1, keepdims=True, initial=-1e30)
        g = 1 / (1 + np.exp(-wide(mixer.mix[...])))[None, :, None, None]
        a = np.where(near[:, None], g * np.exp(np.minimum(s - peak, 0)), a)
    a = np.where(seen[:, None], a, 0)
    return (
        a
        / np.where(segments != 0, 1, np.inf)[:, None, :, None]
        / np.maximum(a.sum(-1, keepdims=True), 1e-30)
    )


@pytest.mark.parametrize("window", [None, 1, 5, 20])
@pytest.mark.parametrize("form", list(FORMS))
def test_it_is_its_equations(form, window):
    mixer = build(form=form, window=window, width=6)
    q, k, v = rows()
    segments = np.repeat([[1] * 8 + [2] * 11 + [0] * 2], B, 0)
    o, _ = mixer.attend(q, k, v, context(segments))
    a = weights(mixer, form, q, k, segments)
    inside = segments[0] != 0
    np.testing.assert_allclose(a.sum(-1)[:, :, inside], 1, rtol=1e-12)
    expected = np.einsum("bhij,bjhv->bihv", a, np.repeat(np.float64(v), H // G, 2))
    np.testing.assert_allclose(np.asarray(o)[:, inside], expected[:, inside], **CLOSE)


def test_a_window_over_everything_is_softmax_attention():
    mixer = build(window=L)
    q, k, v = rows()
    segments = np.repeat([[1] * 9 + [2] * 12], B, 0)
    o, _ = mixer.attend(q, k, v, context(segments))
    segments = jnp.int32(segments)
    exact = flash_attention(q, k, v, q_segments=segments, kv_segments=segments)
    np.testing.assert_allclose(o, exact, **CLOSE)


@pytest.mark.parametrize("window", [None, 64])
def test_decoding_after_64k_tokens_is_the_parallel_form(window):
    """Against the equations for the last queries; the state's size does not know the length."""
    length, D, last = 2**16, 8, 4
    mixer = build(D, length, heads=1, kv_heads=1, head_dim=D, window=window)
    assert mixer.state_size(length) == mixer.state_size(1024)
    x = jnp.float32(RNG.standard_normal((1, length, D)))
    whole = lambda a, b: context(np.ones((1, b - a), np.int32)).replace(
        positions=jnp.arange(a, b)[None]
    )
    start = length - last
    cache = mixer.init_cache(1, length, "float32")
    prefill = jax.jit(lambda x, ctx, cache: mixer.prefill(x, ctx, cache))
    _, cache = prefill(x[:, :start], whole(0, start), cache)
    parallel = jax.jit(lambda x, ctx: mixer(x, ctx)[0])(x, whole(0, length))
    q, k, v = jax.jit(lambda x, ctx: mixer.project(x, ctx))(x, whole(0, length))
    decode = jax.jit(lambda x, ctx, cache: mixer.decode(x, ctx, cache))
    for t in range(start, length):
        y, cache = decode(x[:, t : t + 1], whole(t, t + 1), cache)
        exact = _last_query(mixer, q[:, t], k[:, : t + 1], v[:, : t + 1])
        exact = exact @ np.float64(mixer.out[...])[0]
        # A float32 sum of 65,536 features of one sign errs by some sqrt(65536) eps of itself.
        close = dict(rtol=0, atol=256 * float(np.finfo(np.float32).eps))
        np.testing.assert_allclose(y[0, 0], exact, **close)
        np.testing.assert_allclose(parallel[0, t], exact, **close)


def _last_query(mixer, q, k, v):
    """o [V] of one query [1 1 K] after keys [1 n 1 K], float64."""
    q, k, v = (np.float64(x)[0] for x in (q, k, v))
    q, k, v = q[0], k[:, 0], v[:, 0]
    phi = lambda x, n: FORMS["lolcats"](x @ np.float64(getattr(mixer, f"{n}_map")[...])[0])
    a = phi(k, "k") @ phi(q, "q")
    if mixer.window is not None:
        s = k[-mixer.window :] @ q * q.size**-0.5
        g = 1 / (1 + np.exp(-float(mixer.mix[0])))
        a[-mixer.window :] = g * np.exp(s - s.max())
    return a @ v / a.sum()


@pytest.mark.parametrize(
    ("window", "chunk", "size"), [(None, 4, 1), (3, 8, 1), (3, 128, 5), (None, 128, 20)]
)
def test_the_teacher_is_asked_by_its_weights(window, chunk, size, monkeypatch):
    """The cross-entropy by its equation, at least the teacher's entropy, and its least.

    Large scores too: a better key of another document hides none, and small weights have logs.
    """
    monkeypatch.setattr(transfer, "CHUNK", chunk)
    mixer = build(window=window)
    q, k = (size * x for x in rows()[:2])
    segments = np.repeat([[1] * 8 + [2] * 11 + [0] * 2], B, 0)
    ctx = context(segments)
    found, entropy = transfer.cross_entropy(q, k, mixer.weights(q, k), ctx)
    a = weights(mixer, "lolcats", q, k, segments)
    s = np.einsum("bihk,bjhk->bhij", np.float64(q), np.repeat(np.float64(k), H // G, 2)) * K**-0.5
    seen = np.tril(np.ones((L, L), bool)) & (segments[:, :, None] == segments[:, None])
    t = softmax(np.where(seen[:, None], s, -np.inf))
    inside = (segments != 0)[:, None, :, None]
    log = lambda x: np.log(np.maximum(x, 1e-12))
    total = lambda x: -np.sum(np.where(inside, t * x, 0)) / H
    np.testing.assert_allclose(found, total(log(a)), rtol=1e-5)
    # A weight near 1 has a logarithm of rounding.
    np.testing.assert_allclose(entropy, total(log(t)), rtol=1e-5, atol=1e-6)
    assert found > entropy
    same = lambda s, *_: jnp.exp(s - jnp.max(s, -1, keepdims=True))
    taught, least = transfer.cross_entropy(q, k, same, ctx)
    np.testing.assert_allclose(taught, least, rtol=1e-5, atol=1e-6)


def test_asked_to_imitate_it_gives_the_teachers_output_and_both_losses():
    mixer = build(window=4)
    x, ctx = jnp.float32(RNG.standard_normal((B, L, 32))), context()
    y, aux = mixer(x, ctx.replace(taps=("attention_transfer", "output_transfer")))
    q, k, v = mixer.project(x, ctx)
    rows = dict(q_segments=ctx.segment_ids, kv_segments=ctx.segment_ids)
    teacher, student = flash_attention(q, k, v, **rows), mixer.attend(q, k, v, ctx)[0]
    np.testing.assert_allclose(y, mixer.write(teacher, ctx), **CLOSE)
    assert set(aux) == {"attention_transfer", "teacher_entropy", "output_transfer"}
    error = np.mean(np.square(np.float64(teacher) - np.float64(student)), (2, 3)).sum()
    np.testing.assert_allclose(aux["output_transfer"], error, rtol=1e-5)


@pytest.mark.parametrize(
    ("own", "names"),
    [
        ({"features": "relu", "learned": True}, {"q_map", "k_map", "q_map_bias", "k_map_bias"}),
        ({"features": "elu"}, set()),
    ],
)
def test_other_linear_mixers_imitate_by_their_own_features(own, names):
    """T2R's maps learn from the same loss, whose weights are those that the mixer then gives."""
    dims = Dims(d_model=32, length=L, n_layers=2, base_d_model=32)
    mixer = LinearAttention(dims, rngs=nnx.Rngs(0), heads=H, kv_heads=G, head_dim=K, **own)
    graph, state = nnx.split(mixer)
    x, ctx = jnp.float32(RNG.standard_normal((B, L, 32))), context()
    taps = ("attention_transfer", "attention_weights")
    _, aux = mixer(x, ctx.replace(taps=taps))
    q, k, v = mixer.project(x, ctx)
    student = np.einsum("bhij,bjhv->bihv", aux["student_weights"], np.repeat(v, H // G, 2))
    np.testing.assert_allclose(student, mixer.attend(q, k, v, ctx)[0], **CLOSE)
    assert aux["attention_transfer"] > aux["teacher_entropy"]
    loss = lambda state: nnx.merge(graph, state)(x, ctx.replace(taps=taps))[1]["attention_transfer"]
    gradient = nnx.to_flat_state(jax.jit(jax.grad(loss))(state))
    assert {path[0] for path, leaf in gradient if np.any(leaf[...])} == names


@pytest.mark.parametrize("window", [3, 21])
def test_branches_are_what_is_left_of_the_sums(window):
    """One branch alone divides by its own sum; a query with nothing before its window gets 0."""
    mixer = build(window=window)
    q, k, v = rows()
    segments = np.repeat([[1] * 8 + [2] * 11 + [0] * 2], B, 0)
    a = weights(mixer, "lolcats", q, k, segments)
    inside = np.tril(np.ones((L, L)), 0) - np.tril(np.ones((L, L)), -window)
    wide = np.repeat(np.float64(v), H // G, 2)
    for branches, counted in (("window", inside), ("linear", 1 - inside)):
        alone = build(window=window, branches=branches)
        for name in ("q_map", "k_map", "mix"):
            getattr(alone, name)[...] = getattr(mixer, name)[...]
        left = a * counted
        total = left.sum(-1, keepdims=True)
        left = left / np.where(total > 0, total, 1)
        exact = np.einsum("bhij,bjhv->bihv", left, wide)
        o = np.asarray(alone.attend(q, k, v, context(segments))[0])
        valid = (segments != 0)[..., None, None]
        np.testing.assert_allclose(np.where(valid, o, 0), np.where(valid, exact, 0), **CLOSE)


def test_unknown_branches_and_branches_of_no_hybrid_are_sentences():
    with pytest.raises(ValueError, match="branches 'far' are unknown; known: both, window, linear"):
        build(window=3, branches="far")
    with pytest.raises(ValueError, match="branches 'linear' are those of a hybrid; give it a win"):
        build(branches="linear")


def test_only_maps_and_mix_learn_from_imitation():
    mixer = build(window=4)
    graph, state = nnx.split(mixer)
    ctx = context(taps=("attention_transfer",))
    x = jnp.float32(RNG.standard_normal((B, L, 32)))

    def loss(state):
        return nnx.merge(graph, state)(x, ctx)[1]["attention_transfer"]

    gradient = jax.jit(jax.grad(loss))(state)
    size = {path[0]: float(jnp.abs(g[...]).max()) for path, g in nnx.to_flat_state(gradient)}
    assert all(size[name] > 1e-3 for name in ("q_map", "k_map", "mix"))
    assert {name for name, most in size.items() if most} == {"q_map", "k_map", "mix"}


@pytest.mark.parametrize(
    ("own", "match"),
    [
        ({"form": "taylor"}, "form 'taylor' of Hedgehog is unknown; known: paper, lolcats, fla"),
        ({"width": 0}, "width of the maps is 0 and must be at least 1"),
        ({"window": 0}, "window counts tokens, one's own included: 0 is less than 1"),
    ],
)
def test_what_it_cannot_be_is_refused(own, match):
    with pytest.raises(ValueError, match=match):
        build(**own)
