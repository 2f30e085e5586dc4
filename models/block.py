"""A layer: a mixer over positions and a feed-forward network, each added to the residual stream."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.context import Context, over_tokens
from models.layers import Norm, dropout
from models.param import Dims
from parallel.named import named

NORM_POSITIONS = ("pre", "post", "sandwich")


@dataclasses.dataclass(frozen=True)
class Style:
    """How sublayers are wrapped.

    norm: 'rmsnorm' or 'layernorm', with eps.  dropout: on each sublayer's output.
    norm_position: 'pre' x + f(norm(x)); 'post' norm(x + f(x)) (arXiv 1706.03762); 'sandwich'
      x + norm(f(norm(x))) (arXiv 2105.13290).
    """

    norm: str
    norm_position: str
    norm_eps: float
    dropout: float


@dataclasses.dataclass(frozen=True)
class Layer:
    """Which methods a pattern entry names, with their own arguments."""

    mixer: str
    mixer_args: Mapping
    ffn: str
    ffn_args: Mapping


def layer(entry: str, *, blocks: Mapping, mixers: Mapping, ffns: Mapping, ffn: str) -> Layer:
    """The layer a pattern entry means: one of `blocks` by name, else a mixer's file name."""
    if entry not in blocks:
        return Layer(entry, mixers.get(entry, {}), ffn, ffns.get(ffn, {}))
    own = dict(blocks[entry])
    mixer, its_ffn = own.pop("mixer"), own.pop("ffn", ffn)
    return Layer(mixer, own, its_ffn, ffns.get(its_ffn, {}))


class Block(nnx.Module):
    def __init__(self, dims: Dims, layer: Layer, style: Style, *, rngs: nnx.Rngs):
        if style.norm_position not in NORM_POSITIONS:
            raise ValueError(
                f"norm_position {style.norm_position!r} is unknown; "
                f"known: {', '.join(NORM_POSITIONS)}"
            )
        self.style = style
        mixer = importlib.import_module(f"models.mixers.{layer.mixer}").Mixer
        ffn = importlib.import_module(f"models.ffns.{layer.ffn}").FFN
        self.mixer = mixer(dims, rngs=rngs, **layer.mixer_args)
        self.ffn = ffn(dims, rngs=rngs, **layer.ffn_args)
        norms = 4 if style.norm_position == "sandwich" else 2
        norm = dict(rngs=rngs, kind=style.norm, eps=style.norm_eps)
        self.norms = nnx.List([Norm(dims.d_model, **norm) for _ in range(norms)])

    def __call__(
        self, x: Float[Array, "B L D"], ctx: Context
    ) -> tuple[Float[Array, "B L D"], dict]:
        mode = "causal" if ctx.causal else "bidirectional"
        if mode not in self.mixer.modes:
            raise ValueError(
                f"{type(self.mixer).__module__} can be {', '.join(sorted(self.mixer.modes))} and "
                f"model.causal={ctx.causal} asks for {mode}"
            )
        of = lambda part: ctx.replace(totals=ctx.totals_of(part))
        x, mixer_aux = self._add(x, lambda h: self.mixer(h, of("mixer")), ctx, 0)
        x, ffn_aux = self._add(x, lambda h: self.ffn(h, of("ffn")), ctx, 1)
        aux = {f"mixer/{n}": a for n, a in mixer_aux.items()}
        aux |= {f"ffn/{n}": a for n, a in ffn_aux.items()}
        if "residual" in ctx.taps:
            aux["residual"] = over_tokens(jnp.mean(jnp.square(x.astype(jnp.float32)), -1), ctx)
        return x, aux

    def prefill(self, x: Float[Array, "B L D"], ctx: Context, cache) -> tuple[Array, Any]:
        """As `__call__`, filling the mixer's cache, which is any pytree."""
        x, cache = self._add(x, lambda h: self.mixer.prefill(h, ctx, cache), ctx, 0)
        return self._add(x, lambda h: self.ffn(h, ctx), ctx, 1)[0], cache

    def decode(self, x: Float[Array, "B 1 D"], ctx: Context, cache) -> tuple[Array, Any]:
        """One token a row against the mixer's cache."""
        x, cache = self._add(x, lambda h: self.mixer.decode(h, ctx, cache), ctx, 0)
        return self._add(x, lambda h: self.ffn(h, ctx), ctx, 1)[0], cache

    def _add(self, x, sublayer, ctx, i):
        position = self.style.norm_position
        y, second = sublayer(x if position == "post" else self.norms[i](x))
        y = named(y, ("mixer", "ffn")[i], "batch", "length", None)
        y = self.norms[2 + i](y) if position == "sandwich" else y
        x = x + dropout(y, self.style.dropout, ctx, salt=i)
        x = self.norms[i](x) if position == "post" else x
        return named(x, "residual", "batch", "length", None), second
