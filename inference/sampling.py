"""The next token from logits: greedy, temperature, top-k and nucleus sampling.

A row's draw depends on (seed, row, position) and its own logits, never on the batch it sits in.
Noise belongs to token ids, so that two runs whose logits differ by rounding agree where they can.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt


def keys(
    seed: int | UInt[Array, ""], rows: Int[Array, "B"], positions: Int[Array, "B"]
) -> Key[Array, "B"]:
    """One key a row, from the seed, the row's own number and the position drawn.

    Always Threefry: the keys of other generators give other bits when they are used in a batch.
    """
    key = jax.random.key(seed, impl="threefry2x32")
    # Both must be sharded alike to be mapped over; a sum takes the sharding of either.
    rows, positions = rows + jnp.zeros_like(positions), positions + jnp.zeros_like(rows)
    return jax.vmap(lambda r, p: jax.random.fold_in(jax.random.fold_in(key, r), p))(rows, positions)


def sample(
    logits: Float[Array, "B W"],
    seed: int | UInt[Array, ""],
    positions: Int[Array, "B"],
    *,
    rows: Int[Array, "B"] | None = None,
    temperature: float | Float[Array, "*B"] = 1.0,
    top_k: int | None = None,
    top_p: float | Float[Array, "*B"] = 1.0,
) -> Int[Array, "B"]:
    """Draws one token a row; see `truncate` for the last three arguments and what is raised.

    positions: of the tokens drawn. rows: the rows' own numbers, by default their places here.
    At temperature 0 the largest logit, the first of equal ones. A logit of -inf (the padded
    vocabulary) is never drawn; a row of nothing else gives token 0.
    """
    rows = jnp.arange(len(logits)) if rows is None else rows
    logits = _whole_rows(logits)
    kept = truncate(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    noise = lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32)
    drawn = jnp.argmax(kept + jax.vmap(noise)(keys(seed, rows, positions)), -1)
    greedy = _is_greedy(jnp.asarray(temperature, jnp.float32))
    return jnp.where(greedy, jnp.argmax(logits, -1), drawn).astype(jnp.int32)


def truncate(
    logits: Float[Array, "B W"],
    *,
    temperature: float | Float[Array, "*B"] = 1.0,
    top_k: int | None = None,
    top_p: float | Float[Array, "*B"] = 1.0,
) -> Float[Array, "B W"]:
    """The logits of the distribution that `sample` draws from, -inf where a token is ruled out.

    In this order: temperature divides the logits; top-k keeps the k largest (of equal ones those
    with the smaller ids, so top_k=1 is greedy); top-p keeps, of the distribution over these, the
    smallest set of likeliest tokens whose probability reaches p, and all that tie with the last of
    them (Holtzman et al., arXiv:1904.09751, where ties are cut by rank). The likeliest token
    always stays.

    temperature: finite, >= 0; top_p: in (0, 1]; both a number or one a row, and may be traced.
    top_k: static, >= 1 (more than W keeps all), None for all. Raises ValueError otherwise, as far
    as the numbers are known before running.
    """
    check(temperature, top_k, top_p)
    logits = _whole_rows(logits)
    vocabulary = logits.shape[-1]
    temperature, top_p = _column(temperature), _column(top_p)
    # Relative to the largest logit, a tiny temperature gives 0 and -inf instead of inf - inf.
    top = jnp.max(logits, -1, keepdims=True)
    scaled = (logits - top).astype(jnp.float32)
    scaled = scaled / jnp.where(_is_greedy(temperature), 1.0, temperature)

    k = min(top_k or vocabulary, vocabulary)
    largest, ids = jax.lax.top_k(scaled, k)
    if k < vocabulary:
        kept = jax.vmap(lambda i: jnp.zeros(vocabulary, bool).at[i].set(True))(ids)
        scaled = jnp.where(kept, scaled, -jnp.inf)
    probability = jax.nn.softmax(largest, -1)
    before = jnp.cumsum(probability, -1) - probability
    # A rounded sum can reach 1 early: p = 1 must keep everything all the same.
    nucleus = (before < top_p) | (top_p >= 1)
    nucleus = nucleus | (jnp.arange(k) == 0)[None]
    last = jnp.min(jnp.where(nucleus, largest, jnp.inf), -1, keepdims=True)
    return jnp.where(scaled >= last, scaled, -jnp.inf)


def check(temperature, top_k, top_p) -> None:
    """Raises ValueError for what `truncate` does not take; to be called where numbers are known."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None to keep every token, not {top_k}.")
    if not isinstance(temperature, jax.core.Tracer):
        t = np.asarray(temperature)
        if not np.all((t >= 0) & np.isfinite(t)):
            raise ValueError(f"temperature must be finite and at least 0, not {temperature}.")
    if not isinstance(top_p, jax.core.Tracer):
        p = np.asarray(top_p)
        if not np.all((p > 0) & (p <= 1)):
            raise ValueError(f"top_p must lie in (0, 1], not {top_p}.")


def _whole_rows(logits):
    """Logits whose vocabulary is not sharded: its order matters here."""
    sharding = jax.typeof(logits).sharding.spec
    if len(sharding) < 2 or sharding[1] is None:
        return logits
    return jax.reshard(logits, jax.sharding.PartitionSpec(sharding[0], None))


def _column(value):
    value = jnp.asarray(value, jnp.float32)
    return value[:, None] if value.ndim else value


def _is_greedy(temperature):
    """Zero, or so small that hardware takes it for zero."""
    return temperature < jnp.finfo(jnp.float32).tiny
