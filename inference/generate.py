"""Text from a model: one parallel pass over the prompts, then cached decoding token by token."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from inference import sampling
from models.context import Context
from models.param import read
from parallel.rules import constrain, spec, ways

# Prompts are padded to a multiple of this, so that few lengths compile.
BUCKET = 64


def generate(
    model: Callable,
    params: dict,
    prompts: Sequence[np.ndarray],
    *,
    tokens: int,
    eos: int,
    context: dict,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> list[np.ndarray]:
    """Continuations of ragged prompts, each at most `tokens` ids, cut before `eos`.

    model(params): the module, whose `init_cache`, `prefill` and `decode` are used.
    context: static fields of Context (dtype).  A row's text depends on the seed and its place, not
    on the other rows.

    Raises:
      ValueError: an empty prompt, no tokens asked for, more of them than the model has positions
        for, or sampling that means nothing.
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; at least 1 must be asked for")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} has no tokens; begin it with the separator {eos}")
    sampling.check(temperature, top_k, top_p)
    lm = model(params)
    if not lm.decodes:
        raise ValueError("a mixer of this model has no decode method, so it cannot continue text")
    longest, wanted = lm.longest, max(map(len, prompts)) + tokens
    if longest is not None and wanted > longest:
        raise ValueError(
            f"a prompt and its continuation have {wanted} tokens and the model's learned positions "
            f"end at {longest}; ask for fewer tokens"
        )
    padded, lengths = _pad(prompts, eos)
    drawn = dict(temperature=temperature, top_p=top_p)
    run = _compiled(model, tokens, eos, top_k, tuple(sorted(context.items())))
    ids = np.asarray(run(params, padded, lengths, jnp.uint32(seed), drawn))[: len(prompts)]
    return [_until(row, eos) for row in ids]


def _pad(prompts, eos):
    mesh = jax.sharding.get_abstract_mesh()
    devices = ways(mesh, "batch") if mesh.axis_names else 1
    rows = -(-len(prompts) // devices) * devices
    lengths = np.array([len(p) for p in prompts] + [1] * (rows - len(prompts)), np.int32)
    padded = np.full((rows, -(-int(lengths.max()) // BUCKET) * BUCKET), eos, np.int32)
    for row, prompt in zip(padded, prompts, strict=False):
        row[: len(prompt)] = prompt
    place = lambda x, *names: jnp.asarray(x) if spec() is None else jax.device_put(x, spec(*names))
    return place(padded, "batch", "length"), place(lengths, "batch")


def _until(row: np.ndarray, eos: int) -> np.ndarray:
    stops = np.flatnonzero(row == eos)
    return row[: stops[0]] if len(stops) else row


@functools.lru_cache(maxsize=8)
def _compiled(model, tokens, eos, top_k, context):
    context = dict(context) | {"causal": True}

    def run(params, prompts, lengths, seed, drawn):
        lm = read(model(params))
        B, P = prompts.shape
        at = jnp.arange(P, dtype=jnp.int32)[None]
        segments = (at < lengths[:, None]).astype(jnp.int32)
        ctx = Context(positions=at * segments, segment_ids=segments, **context)
        cache = lm.init_cache(B, P + tokens, context["dtype"])
        logits, cache = lm.prefill(prompts, ctx, cache)
        # A sum against a mask instead of a gather: rows and lengths may be sharded.
        last = (at == lengths[:, None] - 1)[:, :, None]
        logits = jnp.sum(jnp.where(last, logits, 0.0), 1)
        pick = lambda logits, positions: sampling.sample(
            logits, seed, positions, top_k=top_k, **drawn
        )

        def one(carry, _):
            token, position, cache, done = carry
            ctx = Context(
                positions=position[:, None],
                segment_ids=jnp.ones_like(position)[:, None],
                **context,
            )
            logits, cache = lm.decode(token[:, None], ctx, cache)
            following = jnp.where(done, eos, pick(logits[:, 0], position + 1))
            return (following, position + 1, cache, done | (following == eos)), token

        token = pick(logits, lengths)
        carry = (token, lengths, cache, token == eos)
        (token, *_), out = jax.lax.scan(one, carry, None, length=tokens - 1)
        ids = jnp.concatenate([jnp.moveaxis(out, 0, 1), token[:, None]], 1)
        return constrain(ids, None, None)  # Rows of other hosts cannot be read here.

    return jax.jit(run)
