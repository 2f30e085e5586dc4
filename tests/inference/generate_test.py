"""Cached decoding against one parallel pass a token, whatever else is in the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.generate import BUCKET, generate
from models.context import Context
from tests import tiny

TOKENS, EOS = 8, 256
# Ragged, on both sides of the length that prompts are padded to.
LONG = np.arange(BUCKET + 6) * 11 % 250
PROMPTS = [*(np.arange(n) * 7 % 250 for n in (5, 1, 30, 3)), LONG]
CHANGES = dict(model__tied=False, model__layers=2, model__mixers__attention__kv_heads=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def built(root):
    built = tiny.setup(root, **CHANGES)
    with jax.set_mesh(built.mesh):
        yield built


@pytest.fixture(scope="module")
def params(built):
    return built.program.init().params


@pytest.fixture(scope="module")
def write(built, params):
    own = dict(tokens=TOKENS, eos=EOS, context={"dtype": "float32"}, temperature=0.0)
    return lambda prompts, **options: generate(
        built.program.model, params, prompts, **(own | options)
    )


@pytest.fixture(scope="module")
def slowly(built, params):
    """Greedy continuation of one prompt by a full parallel pass for every token."""
    length = BUCKET * 2

    @jax.jit
    def logits(ids):
        at = jnp.arange(length, dtype=jnp.int32)[None]
        ctx = Context(positions=at, segment_ids=jnp.ones_like(at))
        return built.program.model(params)(ids[None], ctx)[0][0]

    def run(prompt, tokens=TOKENS):
        ids = np.zeros(length, np.int32)  # causal: what comes later does not matter
        ids[: len(prompt)] = prompt
        for n in range(len(prompt), len(prompt) + tokens):
            ids[n] = np.argmax(logits(ids)[n - 1])
        return ids[len(prompt) : len(prompt) + tokens]

    return run


def until(ids, eos):
    stops = np.flatnonzero(ids == eos)
    return ids[: stops[0]] if len(stops) else ids


def equal(actual, expected):
    assert [a.tolist() for a in actual] == [e.tolist() for e in expected]


def test_greedy_decoding_equals_repeated_parallel_passes(write, slowly):
    found = write(PROMPTS)
    equal(found, [until(slowly(prompt), EOS) for prompt in PROMPTS])
    assert len({tuple(ids) for ids in found}) == len(PROMPTS)


def test_eos_ends_a_row_and_is_not_part_of_it(write):
    """Any id may be the end; padding takes it too, and must not matter. Top-1 is greedy."""
    whole = write(PROMPTS)
    eos = int(whole[0][4])
    cut = write(PROMPTS, eos=eos, top_k=1, temperature=1.0)
    equal(cut, [until(ids, eos) for ids in whole])
    assert len(cut[0]) <= 4


def test_a_row_does_not_depend_on_the_others_nor_on_how_long_it_gets(write):
    for temperature in (0.0, 1.0):
        first, second, *_ = write(PROMPTS, temperature=temperature)
        others = [*PROMPTS[:2], PROMPTS[1], PROMPTS[0], LONG[::-1]]
        equal(write(others, temperature=temperature)[:2], [first, second])
        alone = write(PROMPTS[:1], temperature=temperature, tokens=1)
        equal(alone, [first[:1]])


def test_a_seed_gives_one_text(write):
    draw = functools.partial(write, PROMPTS, temperature=1.0)
    equal(draw(seed=3), draw(seed=3))
    assert [a.tolist() for a in draw(seed=3)] != [a.tolist() for a in draw(seed=4)]


def test_temperature_and_nucleus_reach_the_sampler(write):
    greedy = write(PROMPTS)
    equal(write(PROMPTS, temperature=1.0, top_p=1e-6), greedy)
    equal(write(PROMPTS, temperature=1e-4), greedy)
    assert [a.tolist() for a in write(PROMPTS, temperature=1.0)] != [g.tolist() for g in greedy]


def test_eight_devices_write_the_same_text(root, params, write):
    """Queries in groups of 2 over 1 head, and on a mesh with 2 shards of heads over 2 equal ones.

    Three rows over four shards of the batch.
    """
    sizes = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, model__mixers__attention__kv_heads=2)
    eight = tiny.setup(root, 8, **(CHANGES | sizes))
    twice = lambda path, p: np.repeat(np.asarray(p), 2, 3) if path.endswith("/kv") else p
    own = dict(tokens=TOKENS, eos=EOS, context={"dtype": "float32"})
    expected = {t: write(PROMPTS, temperature=t)[:3] for t in (0.0, 1.0)}
    with jax.set_mesh(eight.mesh):
        like = eight.program.state.params
        placed = {k: jax.device_put(twice(k, p), like[k].sharding) for k, p in params.items()}
        for temperature, texts in expected.items():
            own["temperature"] = temperature
            equal(generate(eight.program.model, placed, PROMPTS[:3], **own), texts)


def test_mistakes_are_sentences(write):
    with pytest.raises(ValueError, match="tokens is 0; at least 1"):
        write(PROMPTS, tokens=0)
    with pytest.raises(ValueError, match="prompt 1 has no tokens; begin it with the separator"):
        write([PROMPTS[0], PROMPTS[0][:0]])
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        write(PROMPTS, temperature=1.0, top_k=0)
