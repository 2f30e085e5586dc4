"""LoRA: "Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, W' = W + alpha / r A B.

A, a product of fan-in and rank, starts as a Gaussian, B, of rank and fan-out, at zero (section
4.1). Every matrix has its own pair: each layer of a stack, and each part of a fused weight.

W' is made where a layer reads W, in float32, before it is cast and gathered, so a device multiplies
the parts of A and B that belong to its part of W, and the rank is never split. Deviations: tokens
go through W', not through A and B beside W. The values are the same and decoding costs no more, but
a gradient of W' comes on the way to those of A and B, of one layer at a time; devices along `data`
add it up where `zero` is none, and with zero1 only those of A and B. No dropout before A.
"""

import dataclasses
import difflib
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from parallel.weight import Entry, Table, Weight
from training.adapter import Adapter

CASES = ({"rank": 2, "alpha": 3.0, "targets": ".*"},)


def make(
    table: Table,
    *,
    rank: int = 8,  # r, inner dimension of the product
    alpha: float = 16.0,  # the product is multiplied by alpha / rank
    targets: str = ".*mixer/(q|k|v|kv|out)",  # regular expression; matrices of these paths
) -> Adapter:
    """Adds `<path>/lora_a` and `<path>/lora_b` for every matrix that `targets` matches.

    Vectors, norms and embeddings, which are looked up and not multiplied by, are passed over.

    Raises:
      ValueError: a rank below 1, an alpha of 0 or less, targets that match no matrix.
    """
    if rank < 1:
        raise ValueError(f"adapter.lora.rank is {rank} and must be at least 1")
    if alpha <= 0:
        raise ValueError(f"adapter.lora.alpha is {alpha} and must be greater than 0")
    chosen = _chosen(targets, {path: e for path, e in table.items() if _multiplies(e.weight)})
    products = {path: _product(entry.weight) for path, entry in chosen.items()}
    added = {}
    for path, entry in chosen.items():
        added[f"{path}/lora_a"], added[f"{path}/lora_b"] = _pair(entry, rank)

    def bind(params: dict) -> dict:
        own = {path: weight for path, weight in params.items() if path not in added}
        pair = lambda path: (params[f"{path}/lora_a"], params[f"{path}/lora_b"])
        changed = {p: Adapted(own[p], *pair(p), products[p], alpha / rank) for p in products}
        return own | changed

    return Adapter(added, bind)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "a", "b"),
    meta_fields=("product", "scale"),
)
@dataclasses.dataclass(frozen=True)
class Adapted:
    """weight + scale A B of one layer or of a stack of layers; a float32 array once read, `x[...]`.

    weight, a, b: arrays, or what gives one once read.  product: of A and B, for einsum.
    """

    weight: Any
    a: Any
    b: Any
    product: str
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def __getitem__(self, at):
        # A TPU would round float32 factors to bfloat16.
        exact = jax.lax.Precision.HIGHEST
        change = jnp.einsum(self.product, self.a[...], self.b[...], precision=exact)
        weight = self.weight[...] + self.scale * change
        return weight if at is ... else weight[at]


def _chosen(targets: str, matrices: Table) -> Table:
    try:
        chosen = {path: e for path, e in matrices.items() if re.fullmatch(targets, path)}
    except re.error as error:
        raise ValueError(
            f"adapter.lora.targets is not a regular expression: {error} in {targets!r}"
        ) from None
    if not chosen:
        near = difflib.get_close_matches(targets, list(matrices), n=3, cutoff=0.0)
        some = ", ".join(near) or "none"
        raise ValueError(f"adapter.lora.targets {targets!r} matches no matrix; some are {some}")
    return chosen


def _multiplies(weight: Weight) -> bool:
    """Whether it is declared to map what it sums over to what it produces."""
    dims = sorted((*weight.fan_in, *weight.fan_out, *weight.stack))
    return bool(weight.fan_in and weight.fan_out) and dims == list(range(len(weight.axes)))


def _dims(weight: Weight) -> tuple[list, list]:
    """Dimensions of W that A and B have, in their order; None is the rank."""
    a = [*sorted((*weight.fan_in, *weight.stack)), None]
    return a, [*sorted(weight.stack), None, *sorted(weight.fan_out)]


def _pair(entry: Entry, rank: int) -> tuple[Entry, Entry]:
    """The declarations of A and B, laid out as W is."""
    weight = entry.weight
    fan_in = math.prod(entry.shape[entry.layers + dim] for dim in weight.fan_in)
    a, b = _dims(weight)
    gaussian = ("normal", 1 / math.sqrt(fan_in))
    return (
        _factor(entry, a, rank, init=gaussian, fan_in=weight.fan_in, fan_out=(None,)),
        _factor(entry, b, rank, init=("zeros",), fan_in=(None,), fan_out=weight.fan_out),
    )


def _factor(entry: Entry, dims: list, rank: int, *, init: tuple, **fans: tuple) -> Entry:
    """Of these dimensions of W; fans: which of them are summed over, which produced."""
    weight, lead = entry.weight, entry.shape[: entry.layers]
    parts = fans | dict(stack=weight.stack)
    declared = {n: tuple(i for i, d in enumerate(dims) if d in part) for n, part in parts.items()}
    axes = tuple(None if dim is None else weight.axes[dim] for dim in dims)
    sizes = (rank if dim is None else entry.shape[entry.layers + dim] for dim in dims)
    kept = dict(decay=weight.decay, group=weight.group)
    return Entry(Weight(axes, init=init, **declared, **kept), (*lead, *sizes))


def _product(weight: Weight) -> str:
    """A B for einsum, with dimensions of layers before."""
    letters = "abcdefghijklmnopq"
    spell = lambda dims: "..." + "".join("r" if dim is None else letters[dim] for dim in dims)
    a, b = _dims(weight)
    return f"{spell(a)},{spell(b)}->{spell(range(len(weight.axes)))}"
