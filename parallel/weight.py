"""What is known of a weight, declared once where the weight is made and read everywhere else."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight's declaration. Plain data; indices refer to the shape without layer stacking.

    axes: one logical axis name (or None) a dimension, read by `parallel.rules`.
    fan_in, fan_out: the dimensions that are summed over, and that are produced.
    stack: dimensions that merely hold several matrices side by side (the 3 of a fused `[D 3 H K]`).
    init: how it starts: ('normal', std), ('constant', value), ('identity',) over the last two
      dimensions, ('zeros',) or ('ones',).
    decay: whether weight decay applies.
    group: 'embed', 'hidden', 'head', 'norm' or 'bias'; 'router' of a matrix that chooses experts
      and stays float32; 'state' of what no gradient trains.
    """

    axes: tuple[str | None, ...]
    fan_in: tuple[int, ...] = ()
    fan_out: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    init: tuple = ("zeros",)
    decay: bool = True
    group: str = "hidden"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the parameter table: the declaration with the shape the model really holds.

    wider: how many times larger fan-in and fan-out are than in the model of the base width; 1 for a
      fan that is no width (a vocabulary, experts), and for all without a base width.
    """

    weight: Weight
    shape: tuple[int, ...]
    wider: tuple[float, float] = (1.0, 1.0)

    @property
    def layers(self) -> int:
        """How many leading dimensions stack layers."""
        return len(self.shape) - len(self.weight.axes)

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axes of the shape held, layer dimensions included."""
        return ("layers",) * self.layers + self.weight.axes

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """Dimensions of the shape held that only stand side by side: layers, then `stack`."""
        return (*range(self.layers), *(self.layers + i for i in self.weight.stack))

    @property
    def norm_axes(self) -> tuple[int, ...]:
        """Dimensions over which the norm of one true matrix is taken."""
        return tuple(i for i in range(len(self.shape)) if i not in self.stack_axes)

    @property
    def is_matrix(self) -> bool:
        """Whether one true weight has two dimensions or more."""
        return len(self.norm_axes) >= 2


Table = dict[str, Entry]


def widened(table: Table, doubled: Table, wider: float) -> Table:
    """The table of a model that is `wider` times as wide as its base, as its entries then say.

    doubled: the table of the same model at twice its width. A fan is a width where one of its
    dimensions is larger there; a vector has all its dimensions for a fan-out. Rounded sizes (a
    multiple of 64) grow by less than two, so half of that counts. A weight that `doubled` lacks,
    because layers hold theirs in another way there, is judged by the names of its dimensions.
    """

    def grows(path, entry, i):
        if path not in doubled:
            return entry.axes[i] in ("embed", "ffn")
        return doubled[path].shape[i] >= 1.5 * entry.shape[i]

    def entry_of(path, entry):
        own = lambda dims: [entry.layers + i for i in dims]
        fans = own(entry.weight.fan_in), own(entry.weight.fan_out) or entry.norm_axes
        fans = tuple(float(wider) if any(grows(path, entry, i) for i in f) else 1.0 for f in fans)
        return dataclasses.replace(entry, wider=fans)

    return {path: entry_of(path, entry) for path, entry in table.items()}
