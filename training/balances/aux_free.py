"""Balance without a loss: a bias on the scores for the choice, arXiv 2408.15664, algorithm 1.

After each optimizer step b_e += rate x sign(mean of C - C_e), with C of the whole global batch. The
bias decides who is chosen and never enters a gate or a gradient; it is kept with what is not
trained. With `rows` the step is the mean of the signs over every `rows` rows by themselves, which
is what counting within micro-batches means for a bias that all devices share. With `weight` the
loss of `global_batch` is added (DeepSeek-V3 adds one within sequences).
"""

import jax.numpy as jnp

from training.balance import add
from training.balances.global_batch import of_all
from training.balances.micro_batch import groups
from training.loss import Loss, at_least_some

PARTS = jnp.floor_divide, jnp.remainder
CASES = ({"rows": 2}, {"weight": 0.01, "rate": 0.1})


def make(
    loss: Loss,
    routed: tuple[str, ...],
    *,
    rate: float = 1e-3,
    rows: int | None = None,
    weight: float = 0.0,
    z: float = 0.0,
) -> Loss:
    """rate: what the bias moves a step.  rows, weight: see above.  z: of the squared logsumexp."""
    if rate <= 0 or (rows is not None and rows < 1):
        raise ValueError(f"aux_free wants rate above 0 and rows of 1 or more, not {rate}, {rows}")

    def sums(params, micro, ctx):
        ctx = ctx if rows is None else ctx.replace(**groups(micro, rows))
        found = loss.sums(params, micro, ctx)
        for path in routed if rows is not None else ():
            found |= _steps(path, found.pop(f"{path}/group_selected"))
            del found[f"{path}/group_probability"]
        return found

    def after(aux, totals):
        aux = aux if loss.after is None else loss.after(aux, totals)
        bias = lambda path: aux["frozen"][f"{path}/bias"] + rate * _direction(totals, path)
        return aux | {"frozen": aux["frozen"] | {f"{path}/bias": bias(path) for path in routed}}

    needs = ("selected",) if weight else ()
    own = dict(weight=weight, z=z, sums=sums, needs=needs, after=after)
    return add(loss, routed, of_all, **own)


def _steps(path, selected):
    """Sums over parts of the signs, [.. E], and how many parts hold a token, [..]."""
    held = (jnp.sum(selected, -1) > 0).astype(jnp.float32)
    signs = jnp.sum(_sign(selected), -2)
    return {f"{path}/group_signs": signs, f"{path}/group_count": jnp.sum(held, -1)}


def _sign(selected):
    """Of the mean less each, exact: a mean is rounded, and equal counts would differ from it."""
    counts = selected.astype(jnp.int32)
    mean, rest = (f(jnp.sum(counts, -1, keepdims=True), counts.shape[-1]) for f in PARTS)
    below = (counts < mean) | ((counts == mean) & (rest > 0))
    return jnp.where(below, 1.0, jnp.where(counts > mean, -1.0, 0.0))


def _direction(totals, path):
    if f"{path}/group_signs" not in totals:
        return _sign(totals[f"{path}/selected"])
    count = at_least_some(totals[f"{path}/group_count"])
    return totals[f"{path}/group_signs"] / count[..., None]
