"""The language model: embed, scan over periods of layers, logits."""

import functools
import importlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.block import Block, Style, layer
from models.context import Context
from models.layers import Norm, dropout
from models.param import Dims, param
from parallel.fsdp import gather
from parallel.named import named
from parallel.vocab import look_up, numbers

VOCAB_MULTIPLE = 128
EMBEDDING_SALT = 2
# Who goes to which expert is kept in any case: computed anew it could fall otherwise, by rounding.
ROUTES = jax.checkpoint_policies.save_only_these_names("routes")
POLICIES = {
    "full": ROUTES,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, ROUTES
    ),
    "named": jax.checkpoint_policies.save_only_these_names("attention", "mixer", "ffn", "routes"),
}


def padded(vocab: int) -> int:
    """The vocabulary rounded up so that it divides over devices; the rest has logits of -inf."""
    return -(-vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class LM(nnx.Module):
    """A decoder, or an encoder where the context says `causal=False`.

    pattern: layers of one period, repeated; prefix, suffix: layers before and after. An entry is a
    mixer's file name or a name in `blocks`. positions: 'none' (rotary ones belong to the mixer) or
    'learned'. remat: what the backward pass recomputes, 'none', 'full' (all), 'dots' (all but
    matrix products), 'named' (all but the outputs of mixers and feed-forward networks).
    unroll: periods a step of the scan. base_d_model: the width at which learning rates were tuned;
    this model then starts, and weighs scores and logits, so that they are right at its own (muP,
    arXiv 2203.03466; learning rates by optim/widths.py). The model of that width is taken to be
    this one with sizes given by number in proportion: as many heads, smaller ones, where head_dim
    is None, and fewer where it is given. None is d_model.

    Raises:
      ValueError: layers that are not prefix + whole periods + suffix, or an unknown remat.
    """

    def __init__(
        self,
        *,
        rngs: nnx.Rngs,
        vocab: int,
        length: int,
        d_model: int,
        layers: int,
        pattern: tuple[str, ...],
        prefix: tuple[str, ...] = (),
        suffix: tuple[str, ...] = (),
        blocks: Mapping = {},
        mixers: Mapping = {},
        ffn: str = "swiglu",
        ffns: Mapping = {},
        head: str = "linear",
        heads: Mapping = {},
        tied: bool = False,
        norm: str = "rmsnorm",
        norm_position: str = "pre",
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        positions: str = "none",
        token_types: int = 0,
        embed_norm: bool = False,
        embed_scale: float = 1.0,
        softcap: float | None = None,
        init_std: float | None = None,
        scale_residual: bool = True,
        remat: str = "none",
        unroll: int = 1,
        base_d_model: int | None = None,
    ):
        periods, rest = divmod(layers - len(prefix) - len(suffix), len(pattern))
        if rest or periods < 0:
            raise ValueError(
                f"{layers} layers are not {len(prefix)} of prefix + whole periods of "
                f"{len(pattern)} ({', '.join(pattern)}) + {len(suffix)} of suffix"
            )
        if remat != "none" and remat not in POLICIES:
            raise ValueError(f"remat {remat!r} is unknown; known: none, {', '.join(POLICIES)}")
        if positions not in ("none", "learned"):
            raise ValueError(f"positions {positions!r} is unknown; known: none, learned")
        base = d_model if base_d_model is None else base_d_model
        if base < 1:
            raise ValueError(f"base_d_model is {base} and must be at least 1")
        dims = Dims(d_model, length, layers, base, init_std, scale_residual)
        style = Style(norm, norm_position, norm_eps, dropout)
        self.vocab, self.remat, self.unroll, self.softcap = vocab, remat, unroll, softcap
        self.dropout, self.embed_scale = dropout, embed_scale
        names = dict(blocks=blocks, mixers=mixers, ffns=ffns, ffn=ffn)
        make = lambda entry, key: Block(dims, layer(entry, **names), style, rngs=nnx.Rngs(key))
        stack = lambda entry: jax.vmap(functools.partial(make, entry))(
            jax.random.split(rngs.params(), periods)
        )
        self.prefix = nnx.List([make(entry, rngs.params()) for entry in prefix])
        self.blocks = nnx.List([stack(entry) for entry in pattern] if periods else [])
        self.suffix = nnx.List([make(entry, rngs.params()) for entry in suffix])
        self.periods = periods

        D, W = d_model, padded(vocab)
        start = ("normal", init_std if init_std is not None else 1.0 if not tied else base**-0.5)
        embedding = functools.partial(param, rngs, fan_out=(1,), init=start, group="embed")
        self.tokens = embedding((W, D), ("vocab", "embed"))
        learned = positions == "learned"
        self.positions = embedding((length, D), (None, "embed")) if learned else None
        self.types = embedding((token_types, D), (None, "embed")) if token_types else None
        make_norm = functools.partial(Norm, D, rngs=rngs, kind=norm, eps=norm_eps)
        self.embed_norm = make_norm() if embed_norm else None
        self.final_norm = make_norm() if norm_position != "post" else None
        head_class = importlib.import_module(f"models.heads.{head}").Head
        self.head = head_class(dims, W, rngs=rngs, tied=tied, **heads.get(head, {}))

    def __call__(
        self, inputs: Int[Array, "B L"], ctx: Context
    ) -> tuple[Float[Array, "B L W"], dict]:
        """Logits (float32, -inf for padded vocabulary) and the layers' sums, `{path: [N]}`."""
        forward = lambda block, x, ctx, cache: block(x, ctx)
        x, aux = self._layers(forward, self._embed(inputs, ctx), ctx, {})
        return self._logits(x), {
            f"{at}/{n}": a for at, sums in aux.items() for n, a in sums.items()
        }

    def init_cache(self, B: int, length: int, dtype: str) -> dict:
        """An empty decoding cache for B rows of at most `length` tokens."""
        alone = lambda block: block.mixer.init_cache(B, length, dtype)
        stacked = lambda block: jax.vmap(alone, axis_size=self.periods)(block)
        cache = {f"prefix/{i}": alone(block) for i, block in enumerate(self.prefix)}
        cache |= {f"blocks/{i}": stacked(block) for i, block in enumerate(self.blocks)}
        return cache | {f"suffix/{i}": alone(block) for i, block in enumerate(self.suffix)}

    def prefill(self, inputs: Int[Array, "B L"], ctx: Context, cache: dict) -> tuple[Array, dict]:
        """Logits `[B L W]` of right-padded prompts (segment 1, padding 0), and the cache filled."""
        prefill = lambda block, x, ctx, cache: block.prefill(x, ctx, cache)
        x, cache = self._layers(prefill, self._embed(inputs, ctx), ctx, cache)
        return self._logits(x), cache

    def decode(self, inputs: Int[Array, "B 1"], ctx: Context, cache: dict) -> tuple[Array, dict]:
        """Logits `[B 1 W]` of one more token a row, at ctx.positions `[B 1]`."""
        ctx = ctx.replace(decoding=True)
        decode = lambda block, x, ctx, cache: block.decode(x, ctx, cache)
        x, cache = self._layers(decode, self._embed(inputs, ctx), ctx, cache)
        return self._logits(x), cache

    @property
    def decodes(self) -> bool:
        """Whether every mixer can continue text token by token."""
        blocks = (*self.prefix, *self.blocks, *self.suffix)
        return all(hasattr(block.mixer, "decode") for block in blocks)

    @property
    def longest(self) -> int | None:
        """The longest sequence the model can take; None where nothing limits it."""
        return None if self.positions is None else self.positions.shape[0]

    def masked_flops(self, length: int) -> float:
        """Forward FLOPs a token that full attention squares spend on what a causal mask forbids."""
        mixers = [block.mixer for block in (*self.prefix, *self.suffix)]
        mixers += [block.mixer for block in self.blocks for _ in range(self.periods)]
        return sum(getattr(m, "masked_flops", lambda length: 0.0)(length) for m in mixers)

    def _embed(self, inputs, ctx):
        rows = lambda table, at: look_up(gather(table[...].astype(ctx.dtype)), at, ctx.stream)
        x = rows(self.tokens, inputs) * self.embed_scale
        if self.positions is not None:
            x = x + rows(self.positions, ctx.positions)
        if self.types is not None:
            types = jnp.zeros_like(inputs) if ctx.token_types is None else ctx.token_types
            x = x + rows(self.types, types)
        x = x if self.embed_norm is None else self.embed_norm(x)
        x = dropout(x, self.dropout, ctx, EMBEDDING_SALT)
        return named(x, "embedded", "batch", "length", None)

    def _layers(self, call, x, ctx, caches):
        """Every layer in order; call is `(block, x, ctx, cache) -> (x, out)`. Outs come by path."""
        outs, offset = {}, len(self.prefix)
        for i, block in enumerate(self.prefix):
            path = f"prefix/{i}"
            x, outs[path] = self._alone(call, block, x, ctx, i, path, caches)
        if self.periods:
            x, scanned = self._scan(call, x, ctx, offset, caches)
            outs |= scanned
        offset += self.periods * len(self.blocks)
        for i, block in enumerate(self.suffix):
            path = f"suffix/{i}"
            x, outs[path] = self._alone(call, block, x, ctx, offset + i, path, caches)
        return x, outs

    def _alone(self, call, block, x, ctx, number, path, caches):
        cache = caches.get(path)
        graph, state = nnx.split(block)
        ctx = ctx.replace(layer=jnp.int32(number), totals=ctx.totals_of(path))
        return self._one(call, graph, True)(state, x, ctx, cache)

    def _scan(self, call, x, ctx, offset, caches):
        graphs, states = zip(*map(nnx.split, self.blocks), strict=True)
        paths = [f"blocks/{j}" for j in range(len(graphs))]
        looped = self.periods > self.unroll
        ones = [self._one(call, graph, not looped) for graph in graphs]

        def period(x, scanned):
            first, states, caches, totals = scanned
            outs = {}
            for j, (path, one) in enumerate(zip(paths, ones, strict=True)):
                own = ctx.replace(layer=first + j, totals=totals[path])
                x, outs[path] = one(states[j], x, own, caches.get(path))
            return x, outs

        first = offset + len(graphs) * jnp.arange(self.periods, dtype=jnp.int32)
        caches = {path: caches[path] for path in paths if path in caches}
        totals = {path: ctx.totals_of(path) for path in paths}
        return jax.lax.scan(period, x, (first, states, caches, totals), unroll=self.unroll)

    def _one(self, call, graph, prevent_cse):
        def run(state, x, ctx, cache):
            return call(nnx.merge(graph, _ready(state, x.dtype)), x, ctx, cache)

        if self.remat == "none":
            return run
        return jax.checkpoint(run, policy=POLICIES[self.remat], prevent_cse=prevent_cse)

    def _logits(self, x):
        x = x if self.final_norm is None else self.final_norm(x)
        graph, state = nnx.split(self.head)
        head = nnx.merge(graph, _ready(state, x.dtype))
        logits = head(x, gather(self.tokens[...].astype(x.dtype)))
        logits = logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)
        logits = jnp.where(numbers(logits) < self.vocab, logits, -jnp.inf)
        return named(logits, "logits", "batch", "length", "vocab")


def _ready(state, dtype):
    """Weights as a layer computes with them: matrices in the computation's dtype, then gathered."""

    def ready(leaf: nnx.Param) -> nnx.Param:
        cast = leaf.get_metadata("weight").group in ("hidden", "head")
        return leaf.replace(gather(leaf[...].astype(dtype) if cast else leaf[...]))

    return jax.tree.map(ready, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
