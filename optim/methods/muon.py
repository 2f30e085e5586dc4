"""Muon: momentum made orthogonal, Jordan et al. 2024 (kellerjordan.github.io/posts/muon).

For every hidden matrix W, fan-in by fan-out, with gradient g:

    m <- momentum m + g        x = g + momentum m (`nesterov`), or m
    x <- x / ||x||, then `steps` times   x <- 3.4445 x - 4.775 (x x') x + 2.0315 (x x')^2 x
    direction = scale x + weight_decay W

The polynomial brings singular values that are not tiny to 0.7 to 1.2. scale is
rms sqrt(max(fan-in, fan-out)), whose step has about that root mean square, 0.2 being AdamW's ("Muon
is Scalable for LLM Training", arXiv 2502.16982), so that AdamW's learning rate and decay serve.
With rms None it is Jordan's sqrt(max(1, fan-out / fan-in)), a step of spectral norm about 1 or
more, for learning rates as 0.02.

Each of the matrices that stand side by side in a leaf is its own, and dimensions of one fan are one
(`[D H K]` is D by H K); routers are matrices too. Vectors, norms, embeddings, heads and what lacks
a declared fan step by AdamW (adamw.py) at `adam_lr_ratio` times the learning rate.

Cost: of a batch of T tokens at most steps min(fan-in, fan-out) / T of a training step's FLOPs, and
one momentum where AdamW keeps two. A matrix must be whole for its products. Mesh axes that split
it, fsdp's, tensor's and ZeRO's data, split the stack of matrices instead where they divide it: each
device then works on its own ones, and an axis sends the elements a device holds there and back.
Where they do not, the leaf is gathered, its whole stack at once, and devices repeat the work. What
is sent has type `dtype`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from optim import widths
from optim.build import decay, lookup
from parallel.rules import explicit_axes, layout_of, of_layout
from parallel.weight import Entry, Table

POLYNOMIAL = (3.4445, -4.7750, 2.0315)
EPS = 1e-7  # Jordan's, added to the norm


class MuonState(NamedTuple):
    momentum: dict[str, jax.Array]  # float32, of the matrices
    adam: optax.ScaleByAdamState  # of the others


def make(
    table: Table,
    *,
    weight_decay,
    momentum: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    rms: float | None = 0.2,
    dtype: str = "float32",
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    adam_lr_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """The direction, without learning rate and sign.

    dtype: of the products, 'float32' at full precision or 'bfloat16', as Jordan's.
    b1, b2, eps, adam_lr_ratio: of the weights that are no hidden matrices.
    State: one momentum a matrix, two moments a weight of the others, and their step count.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"muon: dtype is {dtype!r}; it must be float32 or bfloat16.")
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=jnp.float32)
    decayed = decay(table, weight_decay, functools.partial(_width, rms=rms))
    orthogonal = lambda path: _is_orthogonal(lookup(table, path))

    def matrices(tree):
        return {path: x for path, x in tree.items() if orthogonal(path)}

    def others(tree):
        return {path: x for path, x in tree.items() if not orthogonal(path)}

    def init(params):
        zeros = {path: jnp.zeros_like(w, jnp.float32) for path, w in matrices(params).items()}
        return MuonState(zeros, adam.init(others(params)))

    def step(path, g, m):
        entry, x = lookup(table, path), g + momentum * m if nesterov else m
        return _scale(*_fans(entry), rms) * _orthogonalise(entry, x, steps, dtype)

    def rated(path, u):
        entry = lookup(table, path)
        # The quotient is 1 but where `rms` makes another method of it than `width` supposes.
        rate = _width(entry, rms) / width(entry) * (1 if orthogonal(path) else adam_lr_ratio)
        return rate * u

    def update(grads, state, params):
        own = matrices(grads)
        m = {path: momentum * state.momentum[path] + g for path, g in own.items()}
        u, after = adam.update(others(grads), state.adam)
        u = u | {path: step(path, g, m[path]) for path, g in own.items()}
        u, _ = decayed.update(u, optax.EmptyState(), params)
        return {path: rated(path, u[path]) for path in grads}, MuonState(m, after)

    return optax.GradientTransformation(init, update)


def width(entry: Entry) -> float:
    """The learning rate's multiplier under muP."""
    return _width(entry, 0.2)  # as of any other rms


def _width(entry, rms):
    """What brings the step's spectral norm to sqrt(o / i) of that at the base width."""
    if not _is_orthogonal(entry):
        return widths.elementwise(entry)
    (i, o), (fan_in, fan_out) = entry.wider, _fans(entry)
    return math.sqrt(o / i) * _scale(fan_in / i, fan_out / o, rms) / _scale(fan_in, fan_out, rms)


def _scale(fan_in, fan_out, rms):
    if rms is None:
        return math.sqrt(max(1, fan_out / fan_in))
    return rms * math.sqrt(max(fan_in, fan_out))


def _is_orthogonal(entry: Entry) -> bool:
    ins, outs = _fan_axes(entry)
    whole = bool(ins and outs) and tuple(sorted(ins + outs)) == entry.norm_axes
    return whole and entry.weight.group in ("hidden", "router")


def _fan_axes(entry: Entry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Dimensions of the shape held that are summed over, and that are produced."""
    fans = entry.weight.fan_in, entry.weight.fan_out
    return tuple(tuple(entry.layers + i for i in fan) for fan in fans)


def _fans(entry: Entry) -> tuple[int, int]:
    return tuple(math.prod(entry.shape[i] for i in fan) for fan in _fan_axes(entry))


def _orthogonalise(entry: Entry, x, steps, dtype):
    """Newton-Schulz of each of the matrices that stand side by side in x, float32 like x."""
    norm = jnp.sqrt(jnp.sum(x * x, entry.norm_axes, keepdims=True))
    unit = (x / (norm + EPS)).astype(dtype)
    ins, outs = _fan_axes(entry)
    order, way = (*entry.stack_axes, *ins, *outs), _layouts(entry, x)
    side_by_side = [entry.shape[i] for i in entry.stack_axes]
    apart = functools.reduce(jax.reshard, way[1:], unit).transpose(order)
    result = _newton_schulz(apart.reshape(*side_by_side, *_fans(entry)), steps)
    back = sorted(range(len(order)), key=order.__getitem__)
    result = result.reshape(apart.shape).transpose(back)
    result = functools.reduce(jax.reshard, way[-2::-1], result)
    return result.astype(jnp.float32)


def _newton_schulz(x, steps):
    """x [... m n] with its singular values near 1, if they are at most 1."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    # A TPU would round float32 factors to bfloat16.
    product = functools.partial(jnp.matmul, precision="highest")
    a, b, c = POLYNOMIAL
    for _ in range(steps):
        gram = product(x, x.mT)
        x = a * x + product(b * gram + c * product(gram, gram), x)
    return x.mT if tall else x


def _layouts(entry: Entry, x) -> list[PartitionSpec]:
    """Layouts on the way to where each matrix is whole on one device, x's own first.

    One axis a step: the compiler makes an all-to-all of that, and of all at once a gathered leaf.
    """
    if not explicit_axes():
        return []
    size, stack = jax.sharding.get_abstract_mesh().shape, entry.stack_axes
    layout = list(layout_of(jax.typeof(x).sharding.spec, x.ndim))
    way = [of_layout(layout)]
    for i in entry.norm_axes:
        for axis in reversed(layout[i]):
            layout[i] = layout[i][:-1]
            held = {j: x.shape[j] // math.prod(size[a] for a in layout[j]) for j in stack}
            home = next((j for j in stack if held[j] % size[axis] == 0), None)
            if home is not None:
                layout[home] += (axis,)
            way.append(of_layout(layout))
    return way
