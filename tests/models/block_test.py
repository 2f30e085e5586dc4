"""Which methods a pattern entry names, and what a layer reports."""

import jax
import jax.numpy as jnp
import numpy as np

from models.block import Layer, layer
from tests.models.built import build, close, context, packed

NAMES = dict(
    blocks={
        "local": {"mixer": "attention", "window": 5},
        "wide": {"mixer": "attention", "ffn": "gelu", "heads": 8},
    },
    mixers={"attention": {"heads": 2}},
    ffns={"swiglu": {"width": 48}, "gelu": {"bias": True}},
    ffn="swiglu",
)


def test_a_mixers_file_name_takes_the_sections_arguments():
    assert layer("attention", **NAMES) == Layer("attention", {"heads": 2}, "swiglu", {"width": 48})
    assert layer("other", **NAMES) == Layer("other", {}, "swiglu", {"width": 48})


def test_an_entry_has_arguments_of_its_own():
    assert layer("local", **NAMES) == Layer("attention", {"window": 5}, "swiglu", {"width": 48})
    assert layer("wide", **NAMES) == Layer("attention", {"heads": 8}, "gelu", {"bias": True})
    assert NAMES["blocks"]["wide"]["mixer"] == "attention"  # the config is not consumed


def test_a_tap_reports_the_streams_mean_square_over_valid_tokens():
    built = build(prefix=("attention",), layers=3)
    segments, positions = packed([(5, 4)])
    inputs = jnp.asarray(np.arange(12, dtype=np.int32)[None])
    run = jax.jit(lambda p, ctx: built.model(p)(inputs, ctx)[1])
    assert jax.eval_shape(run, built.params, context(segments, positions)) == {}
    # Without anything that writes to the stream, it is the embeddings: nine valid ones of twelve.
    quiet = {p: 0 * a if p.endswith(("out", "down")) else a for p, a in built.params.items()}
    sums = run(quiet, context(segments, positions, taps=("residual",)))
    assert {path: leaf.shape for path, leaf in sums.items()} == {
        "prefix/0/residual": (),
        "blocks/0/residual": (2,),
    }
    embedded = np.float64(built.params["tokens"][:9])
    close(sums["blocks/0/residual"], np.full(2, np.mean(embedded**2, -1).sum()))
