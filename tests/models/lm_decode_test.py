"""Decoding with a cache against one pass over the whole rows, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.generate import generate
from parallel import mesh as meshes
from tests.models.built import build, close, context

V, L, EOS = 29, 12, 28
LOCAL = {"mixer": "attention", "heads": 2, "window": 4}
GLOBAL = {"mixer": "attention", "heads": 4, "kv_heads": 2, "qk_norm": True, "softcap": 5.0}
# A layer of its own and two of another kind, so that every kind of cache is there.
HYBRID = dict(blocks={"local": LOCAL, "global": GLOBAL}, prefix=("local",), pattern=("global",))
HYBRID |= dict(layers=3, mixers={}, norm_position="sandwich", tied=True)
PROMPTS = np.array([3, 8, 1, 5])


@pytest.fixture(scope="module")
def built():
    return build(**HYBRID, vocab=V, length=L, softcap=8.0)


@pytest.fixture(scope="module")
def forward(built):
    @jax.jit
    def logits(params, inputs, segments, positions):
        return built.model(params)(inputs, context(segments, positions))[0]

    def whole(inputs):
        at = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
        return np.asarray(logits(built.params, inputs, np.ones_like(at), at))[:, :, :V]

    return whole


def test_prefill_and_decode_equal_one_pass(built, forward):
    inputs = np.random.default_rng(1).integers(0, V, (4, L), dtype=np.int32)
    whole = forward(inputs)
    at = np.arange(L, dtype=np.int32)[None]
    inside = (at < PROMPTS[:, None]).astype(np.int32)
    padded = np.where(inside, inputs, EOS).astype(np.int32)

    @jax.jit
    def prefill(params, inputs, segments, positions):
        lm = built.model(params)
        return lm.prefill(inputs, context(segments, positions), lm.init_cache(4, L, "float32"))

    logits, cache = prefill(built.params, padded, inside, at * inside)
    for row, size in enumerate(PROMPTS):
        close(logits[row, :size, :V], whole[row, :size])
    assert {path: leaf["k"].shape[:-2] for path, leaf in cache.items()} == {
        "prefix/0": (4, 4),
        "blocks/0": (2, 4, L),
    }

    @jax.jit
    def decode(params, token, position, cache):
        ctx = context(jnp.ones_like(position), position)
        return built.model(params).decode(token, ctx, cache)

    rows = np.arange(4)
    for offset in range(L - PROMPTS.max()):
        at = (PROMPTS + offset).astype(np.int32)
        logits, cache = decode(built.params, inputs[rows, at][:, None], at[:, None], cache)
        close(logits[:, 0, :V], whole[rows, at])
        assert np.all(logits[:, 0, V:] == -np.inf)


def test_generate_on_eight_devices_writes_the_likeliest_tokens_of_one_pass(built, forward):
    """Greedy text, each token against the parallel form's logits of all that stands before it."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, EOS, size, dtype=np.int32) for size in PROMPTS]
    own = dict(tokens=L - 8, eos=EOS, context={"dtype": "float32"}, temperature=0.0)
    with jax.set_mesh(meshes.make(data=2, fsdp=2, tensor=2)):
        texts = generate(built.model, built.place(), prompts, **own)
    assert sum(map(len, texts)) > 8  # the random model does not end its texts at once
    inputs = np.full((4, L), EOS, np.int32)
    for row, prompt, text in zip(inputs, prompts, texts, strict=True):
        row[: len(prompt) + len(text)] = np.concatenate([prompt, text])
    logits = forward(inputs)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        # A text shorter than asked for was ended by the separator, which is drawn like the rest.
        drawn = range(len(prompt), len(prompt) + min(len(text) + 1, L - 8))
        for t in drawn:
            # Logits closer than this are a tie between two orders of summation.
            assert logits[row, t - 1, inputs[row, t]] > logits[row, t - 1].max() - 1e-4
