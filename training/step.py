"""One optimizer step as a pure function of the state and the batch. It knows no method by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from data.batch import Batch
from models.context import Context, of_batch
from parallel.zero import REPLICATED, Replicated
from training.accumulate import value_and_grad
from training.loss import Loss
from training.state import TrainState, add, to_float


def make(
    loss: Loss,
    tx,
    lr_fn: Callable,
    *,
    seed: int,
    context: dict,
    ema: float | None,
    place: Replicated = REPLICATED,
) -> Callable:
    """step(state, batch `[A b L]`) -> (state, metrics).

    seed: of dropout; context: static fields of Context (dtype, causal, taps, domains).
    ema: decay of the moving average of the parameters kept in aux['ema'], None for none.
    place: how gradients, moments and that average lie beside the parameters.
    """

    def micro_context(micro: Batch, totals: dict) -> Context:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return of_batch(micro, key=key, train=True, totals=totals, **context)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        A, b, L = batch.inputs.shape
        fixed = state.aux.get("frozen", {})
        scalar, metrics, totals, gradient = value_and_grad(
            loss, state.params, batch, micro_context, fixed=fixed, place=place
        )
        seen, fresh = to_float(state.tokens), jnp.float32(A * b * L)
        held = place.split(state.params)
        report: dict = {}
        clock = dict(tokens=seen, batch_tokens=fresh)
        updates, opt = tx.update(gradient, state.opt, held, **clock, report=report)
        held = optax.apply_updates(held, updates)
        params = place.whole(held)
        aux = state.aux if loss.after is None else loss.after(state.aux, totals)
        if ema is not None:
            aux = aux | {"ema": optax.incremental_update(held, aux["ema"], 1 - ema)}
        metrics = {
            "loss": scalar,
            **metrics,
            "lr": lr_fn(seen, fresh),
            "weight": totals["weight"],
            **report,
            **_norms(gradient=gradient, update=updates, parameter=held),
        }
        after = TrainState(
            step=state.step + 1,
            position=add(state.position, A * b),
            tokens=add(state.tokens, A * b * L),
            params=params,
            opt=opt,
            aux=aux,
        )
        return after, metrics

    return step


def layer_group(path: str) -> str:
    """The part of the model whose norms are logged together: 'blocks/0/mixer', 'tokens', ..."""
    parts = path.split("/")
    return "/".join(parts[:3]) if parts[0] in ("prefix", "blocks", "suffix") else parts[0]


def _norms(**trees: dict) -> dict:
    norms = {}
    for name, tree in trees.items():
        squares: dict = {}
        for path, leaf in tree.items():
            squares.setdefault(layer_group(path), []).append(jnp.sum(jnp.square(leaf)))
        squares = {group: sum(parts) for group, parts in squares.items()}
        norms[f"{name}_norm"] = jnp.sqrt(sum(squares.values()))
        norms |= {f"{name}_norm/{group}": jnp.sqrt(s) for group, s in squares.items()}
    return jax.tree.map(lambda x: x.astype(jnp.float32), norms)
