"""The whole model: the papers' equations, the padded vocabulary, who sees whom."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.lm import padded
from tests.models import papers
from tests.models.built import build, close, context, packed
from training.loss import log_likelihood

V, DOCUMENTS = 29, ((5, 7), (3, 4, 2))
BIASED = {"heads": 2, "rope": False, "bias": True}
GPT2 = dict(mixers={"attention": BIASED}, ffn="gelu", norm="layernorm", norm_eps=1e-5, tied=True)
GPT2 |= dict(ffns={"gelu": {"width": 20, "bias": True}}, positions="learned", layers=3)
LLAMA = dict(mixers={"attention": {"heads": 4, "kv_heads": 2, "rope_base": 500.0}}, norm_eps=1e-3)
BERT = dict(mixers={"attention": BIASED}, ffn="gelu", norm="layernorm", norm_eps=1e-12, tied=True)
BERT |= dict(ffns={"gelu": {"width": 20, "bias": True, "approximate": "none"}})
BERT |= dict(positions="learned", token_types=2, embed_norm=True, norm_position="post", head="mlm")
LOCAL = {"mixer": "attention", "heads": 4, "window": 3, "rope_base": 100.0, "softcap": 2.0}
GLOBAL = {"mixer": "attention", "heads": 2, "kv_heads": 1, "softcap": 2.0, "ffn": "relu2"}
GEMMA2 = dict(blocks={"local": LOCAL, "global": GLOBAL}, pattern=("local", "global"), layers=4)
GEMMA2 |= dict(norm_position="sandwich", softcap=3.0, embed_scale=4.0, mixers={})
GEMMA2 |= dict(ffns={"swiglu": {"width": 24}, "relu2": {"width": 20}})


def _tokens(seed=0, vocab=V):
    return np.random.default_rng(seed).integers(0, vocab, (2, 12), dtype=np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, inputs, ctx):
    return model(params)(inputs, ctx)[0]


def _each_document(fn, *fields):
    """fn of every document of DOCUMENTS alone, put where the packed rows have it."""
    out = np.zeros((2, 12, padded(V)))
    for row, sizes in enumerate(DOCUMENTS):
        start = 0
        for size in sizes:
            here = slice(start, start + size)
            out[row, here] = fn(*[field[row, here] for field in fields])
            start += size
    return out


def _compare(built, expected, inputs, **changes):
    segments, positions = packed(DOCUMENTS)
    ctx = context(segments, positions, **changes)
    actual = np.asarray(_logits(built.model, built.params, inputs, ctx))
    assert actual.dtype == np.float32
    valid = segments > 0
    close(actual[valid][:, :V], expected[valid][:, :V], 1e-5)
    assert np.all(actual[:, :, V:] == -np.inf)


def test_gpt2():
    built, inputs = build(**GPT2), _tokens()
    of_one = lambda tokens: papers.gpt2(built.params, tokens, 3, 1e-5)
    _compare(built, _each_document(of_one, inputs), inputs)


def test_llama():
    built, inputs = build(**LLAMA), _tokens()
    of_one = lambda tokens: papers.llama(built.params, tokens, 2, 1e-3, 500.0)
    _compare(built, _each_document(of_one, inputs), inputs)


def test_bert():
    built, inputs, types = build(**BERT), _tokens(), _tokens(1, 2)
    of_one = lambda tokens, types: papers.bert(built.params, tokens, types, 2, 1e-12)
    expected = _each_document(of_one, inputs, types)
    _compare(built, expected, inputs, causal=False, token_types=jnp.asarray(types))


def test_gemma2_a_hybrid_of_two_entries_with_arguments_of_their_own():
    built, inputs = build(**GEMMA2), _tokens()
    assert built.table["blocks/0/mixer/q"].shape == (2, 16, 4, 4)
    assert built.table["blocks/1/mixer/kv"].shape == (2, 16, 2, 1, 8)
    own = dict(scale=4.0, window=3, cap=2.0, final_cap=3.0)
    of_one = lambda tokens: papers.gemma2(built.params, tokens, 2, 1e-6, **own)
    _compare(built, _each_document(of_one, inputs), inputs)


# Every place has a token of its own, so an embedding's gradient is that of its place.
PLACES = np.arange(24, dtype=np.int32).reshape(2, 12)


@pytest.fixture(scope="module")
def reads():
    """reads(row, t): gradients of a random projection of that place's logits, by parameter."""
    built = build(**(LLAMA | dict(prefix=("attention",), layers=3)))
    segments, positions = packed(DOCUMENTS)
    ctx, weight = context(segments, positions), np.random.default_rng(5).normal(size=V)

    @jax.jit
    def gradient(params, row, t):
        def seen(params):
            logits = built.model(params)(jnp.asarray(PLACES), ctx)[0]
            return jnp.sum(jnp.float32(weight) * logits[row, t, :V])

        return jax.grad(seen)(params)

    return lambda row, t: jax.tree.map(np.asarray, gradient(built.params, row, t))


@pytest.mark.parametrize(("row", "t"), [(0, 0), (0, 3), (0, 5), (0, 11), (1, 2), (1, 8)])
def test_a_place_reads_its_own_documents_past_and_nothing_else(reads, row, t):
    segments, _ = packed(DOCUMENTS)
    size = np.abs(reads(row, t)["tokens"]).max(-1)[PLACES]
    past = (np.arange(12) <= t) & (segments[row] == segments[row, t])
    expected = np.zeros((2, 12), bool)
    expected[row] = past
    np.testing.assert_array_equal(size > 0, expected)


def test_padding_reads_nothing_but_itself(reads):
    size = np.abs(reads(1, 10)["tokens"]).max(-1)[PLACES]
    assert size[1, 10] > 0
    assert np.count_nonzero(size) == 1


def test_padded_vocabulary_gets_no_gradient(reads):
    gradients = reads(0, 3)
    assert gradients["head/kernel"].shape == (16, 128)
    assert np.all(gradients["head/kernel"][:, V:] == 0)
    assert np.all(gradients["head/kernel"][:, :V] != 0)
    assert np.all(gradients["tokens"][V:] == 0)


def test_padded_vocabulary_under_the_loss_and_tied_in_bfloat16():
    """Through log-likelihood's own -inf, in bfloat16: everything finite, the rest exactly 0."""
    built, inputs = build(**GPT2), jnp.asarray(_tokens())
    segments, positions = packed(DOCUMENTS)
    ctx = context(segments, positions, dtype="bfloat16")

    def loss(params):
        logits, _ = built.model(params)(inputs, ctx)
        log_p, log_z = log_likelihood(logits, jnp.asarray(_tokens(1)))
        return jnp.sum(log_z**2 - log_p) / log_p.size

    value, gradients = jax.jit(jax.value_and_grad(loss))(built.params)
    assert value.dtype == jnp.float32
    assert np.isfinite(value)
    for path, gradient in gradients.items():
        assert gradient.dtype == jnp.float32, path
        assert np.all(np.isfinite(gradient)), path
    assert np.all(gradients["tokens"][V:] == 0)
    assert np.all(np.abs(gradients["tokens"][:V]).max(-1) > 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(layers=4, prefix=("attention",), pattern=("attention",) * 2),
            "4 layers are not 1 of",
        ),
        (dict(layers=1, prefix=("attention",), suffix=("attention",)), "1 layers are not"),
        (dict(remat="some"), "remat 'some' is unknown; known: none, full, dots, named"),
        (dict(positions="sinus"), "positions 'sinus' is unknown"),
        (dict(norm_position="mid"), "norm_position 'mid' is unknown; known: pre, post, sandwich"),
    ],
)
def test_errors(changes, words):
    with pytest.raises(ValueError, match=words):
        build(**changes)


def test_padded_sizes():
    assert [padded(n) for n in (1, 127, 128, 129, 257, 50257)] == [128, 128, 128, 256, 384, 50304]
