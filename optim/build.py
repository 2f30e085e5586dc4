"""The optimizer of a run: clip the gradient, ask a method for a direction, step by -lr(tokens)."""

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable

import jax.numpy as jnp
import optax

from optim import methods as methods_folder
from optim import schedules as schedules_module
from parallel.weight import Entry, Table


def build(
    table: Table,
    total_tokens: float,
    *,
    name: str,
    lr: float,
    schedule: str,
    warmup_tokens: int | None,
    warmup_fraction: float,
    clip: float | None,
    weight_decay: float,
    methods: dict[str, dict],
    schedules: dict[str, dict],
):
    """Returns (tx, lr_fn) for a run of `total_tokens` tokens.

    name: a file of optim/methods; schedule: a function of optim/schedules.py; methods and schedules
    hold own arguments by name, of which only the chosen one's are read.
    warmup_tokens, or where that is None warmup_fraction * total_tokens: the warm-up.
    clip: largest global norm of the gradient over all trained leaves, None for no clipping.
    weight_decay: decoupled, W <- W - lr (direction + weight_decay W), where the table says `decay`.

    `tx.update(grads, state, params, tokens=n, batch_tokens=m, report=None)` takes the tokens seen
    before the step and those of the step, float32 scalars, and a dict to which metrics of the
    method are added, `[N]` of N stacked layers (`<path>/trust_ratio`). Its state is the method's
    alone. `lr_fn(n, m)` is the learning rate of that update, before it is multiplied by
    `width(entry)` of the method's file: the schedule AT n + m, the step's own tokens included. So
    the first step is not spent on a warm-up's zero, the last one uses exactly the schedule's value
    at the end (nothing, where that is 0: its batch moves only the moments), and a learning rate
    logged beside the tokens seen after the step lies on the curve.

    Leaves keep their sharding; norms are global, whatever the sharding. Raises ValueError in one
    sentence for unknown names, phases that do not fit and values out of range; KeyError for a
    parameter that the table does not have.
    """
    if clip is not None and clip <= 0:
        raise ValueError(f"optim.clip is {clip}; give a norm above 0, or none for no clipping.")
    _check_name("optim.name", name, [m.name for m in pkgutil.iter_modules(methods_folder.__path__)])
    module = importlib.import_module(f"{methods_folder.__name__}.{name}")
    method = module.make(table, weight_decay=weight_decay, **methods.get(name, {}))
    warmup = _warmup(total_tokens, warmup_tokens, warmup_fraction)
    lr_fn = _learning_rate(
        schedule, schedules.get(schedule, {}), total=total_tokens, peak=lr, warmup=warmup
    )
    method = optax.with_extra_args_support(method)
    return _chain(method, lr_fn, clip, table, module.width), lr_fn


def lookup(table: Table, path: str) -> Entry:
    """The table's entry of a parameter; KeyError with a sentence if it has none."""
    if path not in table:
        raise KeyError(
            f"The parameter {path!r} is not in the table of declared weights; "
            "build the optimizer from the table of the model whose parameters it updates."
        )
    return table[path]


def decay(
    table: Table, weight_decay: float, width: Callable[[Entry], float] | None = None
) -> optax.GradientTransformation:
    """Adds weight_decay * W to the direction of every leaf whose declaration says so.

    A method chooses where: after its own preconditioning (decoupled, arXiv 1711.05101), and before
    a trust ratio where it has one. width: the method's multiplier of the learning rate, which is
    then undone for the decay, so that its product with the learning rate is that of the base width
    (as in the released code of arXiv 2203.03466). Stateless.
    """

    def add(u, path, w):
        entry = lookup(table, path)
        if not (entry.weight.decay and weight_decay):
            return u
        return u + weight_decay / (width(entry) if width else 1.0) * w

    return optax.stateless(
        lambda updates, params: {p: add(u, p, params[p]) for p, u in updates.items()}
    )


def _by_layer(entry: Entry, x):
    """The mean over the matrices of a layer of what a method told of each."""
    return jnp.mean(x, tuple(range(entry.layers, x.ndim)))


def _chain(method, lr_fn, clip, table, width):
    """Clip, method, -lr by width. Written out rather than `optax.chain`d: the first and the last
    have no state, so a checkpoint's layout does not depend on whether clipping is on."""
    clipper = optax.identity() if clip is None else optax.clip_by_global_norm(clip)

    def update(grads, state, params, *, tokens, batch_tokens, report=None, **extra):
        grads, _ = clipper.update(grads, optax.EmptyState())
        told: dict = {}
        extra = extra | {"tokens": tokens, "batch_tokens": batch_tokens, "report": told}
        direction, state = method.update(grads, state, params, **extra)
        if report is not None:
            report |= {
                name: _by_layer(lookup(table, name.rpartition("/")[0]), x)
                for name, x in told.items()
            }
        lr = lr_fn(tokens, batch_tokens)
        rates = {path: width(lookup(table, path)) for path in direction}
        rates = {path: lr if rate == 1 else lr * rate for path, rate in rates.items()}
        return {path: -rates[path] * u for path, u in direction.items()}, state

    return optax.GradientTransformationExtraArgs(method.init, update)


def _learning_rate(schedule, own, **supplied):
    names = [n for n, _ in inspect.getmembers(schedules_module, inspect.isfunction) if n[0] != "_"]
    _check_name("optim.schedule", schedule, names)
    curve = functools.partial(getattr(schedules_module, schedule), **supplied, **own)

    def lr_fn(tokens, batch_tokens):
        return curve(tokens + batch_tokens, batch=batch_tokens)

    lr_fn(0.0, 1.0)  # an impossible schedule is refused here, not while the step is traced
    return lr_fn


def _warmup(total_tokens, warmup_tokens, warmup_fraction):
    if warmup_tokens is not None:
        return warmup_tokens
    if not 0 <= warmup_fraction < 1:
        raise ValueError(
            f"optim.warmup_fraction is {warmup_fraction}; it must be at least 0 and below 1 "
            "(optim.warmup_tokens takes a number of tokens)."
        )
    return warmup_fraction * total_tokens


def _check_name(key, name, known):
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{key} is {name!r}; it must be one of {', '.join(sorted(known))}.{guess}")
