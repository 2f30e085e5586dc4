"""`train --explain`: every array of a run, how it lies on the devices, and by which rule.

Nothing is compiled and no array is made: the step is traced for a mesh that need not be here.
Layouts are read from the program and then compared with the rules: those of parameters, optimizer
state and batch from its abstract state, those of activations from the types in the traced step,
wherever a value has a checkpoint name. Kernels are those that devices like the ones here choose.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from launch import setup
from parallel import mesh as meshes
from parallel import zero
from parallel.named import find
from parallel.rules import RULES, Layout, layout_of
from training import program as programs
from training.program import Program

NOTE = (
    "A dimension shows its name, size and the mesh axes of several devices that split it.",
    "Names as in heads|ffn: nothing was declared, and these are the rules that give the layout.",
    "A + leads axes that no rule gives, such as data by config.zero.",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """An array and how it lies.

    shape: of all devices together; inside a manual region, of one of its shards.
    layout: the mesh axes that each dimension is split over, those of size 1 included.
    mesh: with the axes that are manual where the array is.
    axes, rule: the logical names of its declaration and the layout they mean; None without one.
    scans: lengths of the scans around it, outermost first.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    layout: Layout
    mesh: jax.sharding.AbstractMesh
    axes: tuple[str | None, ...] | None = None
    rule: Layout | None = None
    scans: tuple[int, ...] = ()

    @property
    def held(self) -> tuple[int, ...]:
        """The shape that one device holds."""
        ways = (math.prod(self.mesh.shape[axis] for axis in axes) for axes in self.layout)
        return tuple(size // n for size, n in zip(self.shape, ways, strict=True))

    @property
    def bytes(self) -> int:
        """What one device holds of it."""
        return math.prod(self.held) * self.dtype.itemsize

    @property
    def repeated(self) -> tuple[str, ...]:
        """Mesh axes of several devices that all hold the same of it."""
        split = {axis for axes in self.layout for axis in axes} | set(self.mesh.manual_axes)
        return tuple(a for a, size in self.mesh.shape.items() if size > 1 and a not in split)

    @property
    def names(self) -> tuple[str, ...]:
        """A logical name a dimension: the declared ones, else all whose rule gives the layout."""
        if self.axes is not None:
            return tuple(name or "" for name in self.axes)
        gives = lambda axes: [name for name in RULES if axes and _rule(name, self.mesh) == axes]
        return tuple("|".join(gives(axes)) for axes in self.layout)

    @property
    def fault(self) -> str | None:
        """A sentence where the layout is not the one that was declared."""
        if self.rule is None or self.layout == self.rule:
            return None
        return f"{self.name}: rule says {_spell(self.rule)}, program has {_spell(self.layout)}"


@dataclasses.dataclass(frozen=True)
class Explained:
    """The rows of a program by section.

    gradients: as they are added up.  loops: lengths of the scans over micro-batches and layers.
    """

    parameters: list[Row]
    gradients: list[Row]
    optimizer: list[Row]
    rest: list[Row]
    batch: list[Row]
    activations: list[Row]
    loops: dict[str, int]

    @property
    def faults(self) -> list[str]:
        """Sentences on the layouts that are not the declared ones."""
        shown = (self.parameters, self.optimizer, self.rest, self.batch, self.activations)
        return list(dict.fromkeys(row.fault for rows in shown for row in rows if row.fault))


def explain(config: Mapping) -> None:
    """Prints the layout of every array. Raises ValueError where one is not what was declared."""
    mesh = target(config["mesh"])
    program = programs.build(config, mesh, setup.tokenizer_alone(config).vocab_size)
    explained = read(program, mesh, config["zero"])
    print(text(explained, mesh), end="")
    if explained.faults:
        raise ValueError("; ".join(explained.faults))


def target(sizes: Mapping) -> jax.sharding.AbstractMesh:
    """The mesh of these sizes over devices like those here, of which there may be fewer.

    An axis of -1 takes the devices here. Raises ValueError where the others do not divide them.
    """
    here = meshes.make(data=-1).abstract_mesh
    count = here.size if -1 in sizes.values() else math.prod(sizes.values())
    return here.update(axis_sizes=tuple(meshes.sizes(count, **sizes).values()))


def read(program: Program, mesh: jax.sharding.AbstractMesh, stage: str) -> Explained:
    """The rows of a program that was built for this mesh. stage: the config's `zero`."""
    state, table = program.state, program.table
    place = zero.make(stage, {path: table[path] for path in state.params}, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        parts = jax.eval_shape(place.split, state.params)
        traced = program.step.trace(state, program.batch).jaxpr
    axes = {path: entry.axes for path, entry in table.items()}
    rules = {path: tuple(_rule(name, mesh) for name in axes[path]) for path in table}
    shared = {path: (leaf.shape, axes[path], _layout(leaf)) for path, leaf in parts.items()}
    weights = programs.parameters(state, averaged=False)
    aux = {name: tree for name, tree in state.aux.items() if name != "frozen"}
    counters = {"step": state.step, "position": state.position, "tokens": state.tokens}
    added = parts if isinstance(place, zero.Zero2) else state.params
    return Explained(
        parameters=[_row(p, leaf, axes[p], rules[p]) for p, leaf in weights.items()],
        gradients=[_row(p, leaf) for p, leaf in added.items()],
        optimizer=_leaves(state.opt, shared),
        rest=_leaves(counters | aux, shared),
        batch=[_row(name, leaf) for name, leaf in program.batch._asdict().items()],
        activations=_activations(traced),
        loops=_loops(program),
    )


def _leaves(tree, shared: Mapping) -> list[Row]:
    """Rows of a tree. What stands under a parameter's path and has its shape must lie as `shared`,
    {path: (shape, axes, layout)}, says; what has another shape declares nothing."""
    rows = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        paths = [key.key for key in keys if getattr(key, "key", None) in shared]
        shape, axes, rule = shared[paths[-1]] if paths else (None, None, None)
        rows.append(_row(name, leaf, axes, rule) if shape == leaf.shape else _row(name, leaf))
    return rows


def _activations(jaxpr) -> list[Row]:
    """Named values, those of one name and type once; a backward pass computes some anew."""
    rows = {}
    for found in find(jaxpr.jaxpr):
        aval = found.aval
        rule = None
        if found.axes is not None:
            rule = tuple(_rule(name, aval.sharding.mesh) for name in found.axes)
        row = _row(found.name, aval, found.axes, rule, found.scans)
        rows[row] = row
    return list(rows)


def _loops(program: Program) -> dict[str, int]:
    A = program.batch.inputs.shape[0]
    stacks = {entry.shape[0] for entry in program.table.values() if entry.layers}
    loops = {"micro-batches": A} if A > 1 else {}
    return loops | {"layers": max(stacks)} if stacks else loops


def _row(name, array, axes=None, rule=None, scans=()) -> Row:
    mesh = array.sharding.mesh
    return Row(name, array.shape, array.dtype, _layout(array), mesh, axes, rule, scans)


def _layout(array) -> Layout:
    return layout_of(array.sharding.spec, array.ndim)


def _rule(name: str | None, mesh) -> tuple[str, ...]:
    """The mesh axes that a logical name means, of those that types carry."""
    return tuple(a for a in (RULES[name] if name else ()) if a in mesh.explicit_axes)


def text(explained: Explained, mesh: jax.sharding.AbstractMesh) -> str:
    """The rows as aligned columns, then what they sum to on one device."""
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines = [f"mesh of {mesh.size} devices: {sizes}", "", "rules", *map("  {}".format, NOTE)]
    lines += _columns([(name, "-> " + (" ".join(axes) or "-")) for name, axes in RULES.items()])
    sections = {
        "parameters": explained.parameters,
        "optimizer state": explained.optimizer,
        "other state": explained.rest,
        "batch": explained.batch,
        f"activations, at their checkpoint names{_legend(explained.loops)}": explained.activations,
    }
    for title, rows in sections.items():
        lines += ["", title, *_columns(_table(rows))]
    totals = {
        "parameters": explained.parameters,
        "gradients": explained.gradients,
        "optimizer state": explained.optimizer,
        "other state": explained.rest,
    }
    sums = [(name, _bytes(sum(row.bytes for row in rows))) for name, rows in totals.items()]
    return "\n".join([*lines, "", "bytes a device", *_columns(sums)]) + "\n"


def _legend(loops: Mapping[str, int]) -> str:
    lengths = ", ".join(f"{name} {length}" for name, length in loops.items())
    return f"; scans over {lengths}" if lengths else ""


def _table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    columns = 6 if any(row.scans for row in rows) else 5
    head = ("name", "layout", "a device holds", "bytes", "repeated over", "in scans of")
    cells = [head[:columns]]
    for row in rows:
        held = f"{row.dtype.name}[{' '.join(map(str, row.held))}]"
        repeated = _sizes(row.repeated, row.mesh) or "-"
        scans = " x ".join(map(str, row.scans)) or "-"
        cell = (row.name, _dims(row), held, f"{row.bytes:,}", repeated, scans)
        cells.append(cell[:columns])
    return cells


def _dims(row: Row) -> str:
    """As in 'layers 32, embed 4096 -> fsdp=16 + data=2, 128', which NOTE explains."""
    dims = []
    for size, name, axes in zip(row.shape, row.names, row.layout, strict=True):
        ruled = {axis for part in name.split("|") if part for axis in RULES[part]}
        own = _sizes([a for a in axes if a in ruled], row.mesh)
        more = _sizes([a for a in axes if a not in ruled], row.mesh)
        split = " ".join(part for part in (own, more and f"+ {more}") if part)
        dims.append(f"{name} {size}".strip() + (f" -> {split}" if split else ""))
    inside = _sizes(row.mesh.manual_axes, row.mesh)
    return (", ".join(dims) or "-") + (f" (of each shard of {inside})" if inside else "")


def _sizes(axes: Sequence[str], mesh) -> str:
    """Those of several devices."""
    return " ".join(f"{axis}={mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)


def _bytes(n: int) -> str:
    return f"{n:,} ({n / 2**30:.3f} GiB)"


def _spell(layout: Layout) -> str:
    return f"({', '.join(' '.join(axes) or '-' for axes in layout)})"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
