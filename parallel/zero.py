"""ZeRO-1 and ZeRO-2: what goes with a parameter is split over `data`, the parameter itself is not.

"ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv 1910.02054. ZeRO-3 is
`mesh.fsdp`, see parallel/fsdp.py; both may be used at once, and the split over `data` comes beside
those over fsdp and tensor. Bytes a device for Psi parameters, Adam, N devices along `data`:

|         | the paper (fp16 copies, fp32 master) | here (one fp32 copy) | params, grads, moments  |
|---------|--------------------------------------|----------------------|-------------------------|
| none    | 16 Psi                               | 16 Psi               | 4, 4, 8                 |
| zero1   | 4 Psi + 12 Psi / N                   | 8 Psi + 8 Psi / N    | 4, 4, 8 / N             |
| zero2   | 2 Psi + 14 Psi / N                   | 4 Psi + 12 Psi / N   | 4, 4 / N, 8 / N         |
| fsdp    | 16 Psi / N                           | 16 Psi / N           | 4 / N, 4 / N, 8 / N     |

The paper's K = 12 bytes of optimizer state hold a float32 master copy of the weights; here the
float32 parameters are the only copy and stay whole. So its 2 + 2 + 12 are our 4 + 4 + 8.

A step reduce-scatters gradients and all-gathers new parameters, Psi elements each, together what an
all-reduce of the gradient sends. With A micro-batches zero1 adds up each device's own gradient and
scatters once; zero2 has no room for a whole gradient and scatters A times, (A + 1) Psi. Both sums
are float32 whatever the computation's dtype. Optimizer state is whatever has a parameter's layout:
moments, and the moving average of the parameters; counts stay whole.

The gradient is taken in a manual region over `data`, where a psum_scatter is a reduce-scatter to
the CPU's and the TPU's compiler alike (the TPU's may turn it into its all-reduce-scatter fusion,
and into an all-reduce for vectors). With Explicit axes a gradient is whole by its type, and a
reshard of it an all-reduce; parameters typed `reduced` leave that to the compiler too, and demand
that every broadcast in a model be written for it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
from jax.sharding import PartitionSpec as P

from parallel.manual import manual
from parallel.rules import layout_of, of_layout, partition, ways
from parallel.scattered import Stacked, land, part, scatter, scattered, total
from parallel.weight import Table

# Rows are split over these first (rules.RULES), so that a region over them moves no row.
SHARDS = ("replica", "data")


class Replicated:
    """Gradients and optimizer state laid out as the parameters are; the interface of the others.

    Trees are {path: array}. `enter`, and within it `total`, `open` and `close`, are what a gradient
    over micro-batches is made of; see training/accumulate.py.
    """

    def split(self, tree: dict) -> dict:
        """Parameters, or what is shaped like them, as the optimizer holds them."""
        return tree

    def whole(self, tree: dict) -> dict:
        """`split` undone."""
        return tree

    def enter(self, fn: Callable) -> Callable:
        """fn(params, fixed, known, batch `[A b L]`) -> (sums, gradient), run where it belongs."""
        return fn

    def total(self, sums: dict) -> dict:
        """Sums over the rows at hand as sums over all rows."""
        return sums

    def open(self, params: dict) -> tuple[dict, Callable[[dict], dict]]:
        """What to differentiate by, and the function that makes the model's parameters of it."""
        return params, lambda variables: variables

    def close(self, gradient: dict) -> dict:
        """The gradient over the rows at hand, by what `open` gave, as that over all rows."""
        return gradient

    def undivided(self) -> dict[str, int]:
        """{path: bytes a device holds of the parameter} of leaves that should be split and cannot
        be, because no dimension divides: their optimizer state and gradients are whole."""
        return {}


REPLICATED = Replicated()


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A trained parameter's layout, and the dimension that also takes `data` (None where none can).

    layers: how many leading dimensions stack layers.  bytes: of the parameter on one device.
    """

    spec: P
    shape: tuple[int, ...]
    dim: int | None
    layers: int
    bytes: int

    @property
    def held(self) -> P:
        """The layout of its optimizer state."""
        return self.spec if self.dim is None else beside(self.spec, self.dim)


def dimension(spec: P, shape: tuple[int, ...], mesh, layers: int = 0) -> int | None:
    """The dimension of an array laid out by `spec` that is split over `data` too; None where none.

    It is the one of which a device holds most, the first of equals; a dimension that stacks layers
    (the first `layers`) only where no other divides, because loops over layers take it apart.
    """
    N, best = mesh.shape["data"], None
    for i, (size, names) in enumerate(zip(shape, layout_of(spec, len(shape)), strict=True)):
        here, rest = divmod(size, math.prod(mesh.shape[name] for name in names))
        rank = (i >= layers, here)
        if not rest and here and here % N == 0 and (best is None or rank > best[0]):
            best = rank, i
    return None if best is None else best[1]


def beside(spec: P, dim: int) -> P:
    """`spec` with `data` as the last axis of dimension `dim`, so that devices keep part of theirs.

    Raises ValueError where `spec` is split over `data` already.
    """
    entries = list(layout_of(spec, dim + 1))
    if any("data" in names for names in entries):
        raise ValueError(f"{spec} is split over 'data' already, and cannot be once more.")
    entries[dim] += ("data",)
    return of_layout(entries)


def make(stage: str, weights: Table, mesh) -> Replicated:
    """The layout of a config's `zero` ("none", "zero1", "zero2") for the weights that are trained.

    With one device along `data` there is nothing to split. Raises ValueError for another stage.
    """
    stages = {"none": None, "zero1": Zero1, "zero2": Zero2}
    if stage not in stages:
        raise ValueError(f"zero is {stage!r}; it must be one of {', '.join(stages)}")
    if stage == "none" or mesh.shape["data"] == 1:
        return REPLICATED
    return stages[stage]({path: _leaf(entry, mesh) for path, entry in weights.items()})


def _leaf(entry, mesh):
    spec = partition(*entry.axes)
    held = math.prod(size // ways(mesh, n) for size, n in zip(entry.shape, entry.axes, strict=True))
    dim = dimension(spec, entry.shape, mesh, entry.layers)
    return Leaf(spec, entry.shape, dim, entry.layers, 4 * held)


@dataclasses.dataclass(frozen=True)
class Zero1(Replicated):
    """Each device along `data` holds and updates its part of every leaf that divides."""

    leaves: Mapping[str, Leaf]

    def undivided(self):
        return {path: leaf.bytes for path, leaf in self.leaves.items() if leaf.dim is None}

    def split(self, tree):
        held = {path: jax.reshard(x, self.leaves[path].held) for path, x in tree.items()}
        # Parts of their own, so that what reads them later does not keep whole parameters alive
        # beside those that are gathered anew.
        return jax.lax.optimization_barrier(held)

    def whole(self, tree):
        return {path: jax.reshard(x, self.leaves[path].spec) for path, x in tree.items()}

    def enter(self, fn):
        # A part leaves with a dimension of its own: where `data` shares one with an axis before
        # it, the order that `held` means cannot be said from inside a region.
        out = {path: P() if leaf.dim is None else P("data") for path, leaf in self.leaves.items()}
        ins = (P(), P(), P(), P(None, SHARDS))
        region = manual(fn, SHARDS, ins, (P(), out), check=False)

        def run(*args):
            sums, gradient = region(*args)
            return sums, {path: self._land(x, self.leaves[path]) for path, x in gradient.items()}

        return run

    def total(self, sums):
        return total(sums, SHARDS)

    def close(self, gradient):
        return {path: self._close(x, self.leaves[path]) for path, x in gradient.items()}

    def _close(self, x, leaf):
        if leaf.dim is None:
            return total(x, SHARDS)
        return total(self._part(x, leaf), ("replica",))[None]

    def _part(self, x, leaf):
        return scatter(x, leaf.dim)

    def _land(self, x, leaf):
        return x if leaf.dim is None else land(x, leaf.spec, leaf.held)


class Zero2(Zero1):
    """As Zero1, and the backward pass scatters a layer's gradient before it goes on to the next."""

    def open(self, params):
        divided = {path: leaf for path, leaf in self.leaves.items() if leaf.dim is not None}
        parts = {path: part(params[path], leaf.dim) for path, leaf in divided.items()}

        def bind(variables):
            own = lambda path: (params[path], variables[path], divided[path])
            return {p: _use(*own(p)) if p in divided else variables[p] for p in variables}

        return params | parts, bind

    def _part(self, x, leaf):
        return x


def _use(value, part, leaf):
    dim = leaf.dim - len(leaf.shape)
    # A stack whose layers themselves are divided is scattered when the loop over them has ended.
    inside = leaf.layers and leaf.dim >= leaf.layers
    return Stacked(value, part, dim) if inside else scattered(dim, value, part)
