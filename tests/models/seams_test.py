"""What the model passes on and refuses: totals by layer, modes, lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from inference.generate import generate
from models.context import Context
from models.lm import LM


class _Echo(nnx.Module):
    """Reports the total it is told, so that the test sees which one that is."""

    def __call__(self, x, ctx):
        return jnp.zeros_like(x), {"load": jnp.sum(ctx.totals["load"])}


def _tokens(**changes):
    positions = jnp.tile(jnp.arange(8, dtype=jnp.int32), (2, 1))
    return Context(positions=positions, segment_ids=jnp.ones_like(positions), **changes)


@pytest.mark.parametrize("unroll", [1, 2])
def test_layers_see_their_slice(unroll):
    names = dict(pattern=("attention", "attention"), prefix=("attention",), suffix=("attention",))
    sizes = dict(vocab=8, length=8, d_model=32, layers=6, unroll=unroll)
    lm = LM(rngs=nnx.Rngs(0), **sizes, **names)
    for block in (*lm.prefix, *lm.blocks, *lm.suffix):
        block.ffn = _Echo()
    totals = {
        "prefix/0/ffn/load": jnp.array([1.0, 2.0]),
        "blocks/0/ffn/load": jnp.array([[10.0, 0.0], [20.0, 0.0]]),
        "blocks/1/ffn/load": jnp.array([[30.0, 0.0], [40.0, 0.0]]),
        "suffix/0/ffn/load": jnp.array([50.0, 0.0]),
    }
    _, aux = lm(jnp.zeros((2, 8), jnp.int32), _tokens(totals=totals))
    for path, told in totals.items():
        np.testing.assert_array_equal(aux[path], jnp.sum(told, -1))


def test_a_mixer_is_not_asked_for_a_mode_it_has_not(monkeypatch):
    lm = LM(rngs=nnx.Rngs(0), vocab=8, length=8, d_model=32, layers=1, pattern=("attention",))
    monkeypatch.setattr(type(lm.blocks[0].mixer), "modes", frozenset({"causal"}))
    with pytest.raises(ValueError, match="can be causal and"):
        jax.eval_shape(lm, jnp.zeros((2, 8), jnp.int32), _tokens(causal=False))


def test_text_longer_than_the_learned_positions_is_refused():
    sizes = dict(vocab=8, length=12, d_model=32, layers=1, pattern=("attention",))
    lm = LM(rngs=nnx.Rngs(0), positions="learned", **sizes)
    asked = dict(tokens=7, eos=0, context={"dtype": "float32"})
    with pytest.raises(ValueError, match=r"have 13 tokens .* end at 12"):
        generate(lambda params: lm, {}, [np.arange(6)], **asked)
