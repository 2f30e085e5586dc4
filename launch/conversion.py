"""From a trained attention model's configuration to those of the runs that make it a Hedgehog's.

Plain data; no jax is needed. The runs are two, as in Hedgehog (arXiv 2402.04347, section 4.2) and
LoLCATs (arXiv 2410.10254): `transfer` teaches the feature maps alone, `tuned` trains what follows.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from launch.convert_layers import chosen, converted, entries_of
from launch.files import leaves
from launch.schema import Key, UsageError

MAPS = r".*mixer/((q|k)_map(_bias)?|mix)"  # what is Hedgehog's own
LOSSES = {"weights": "attention_transfer", "outputs": "output_transfer"}
FLAGS = {
    "layers": Key(
        *(str, "all", False, ()),
        "attention layers to convert: all, even, odd, or numbers from 0 on such as 0,2,4-7",
    ),
    "form": Key(
        str,
        "lolcats",
        False,
        ("paper", "lolcats", "fla"),
        "of the feature map: lolcats, paper or fla",
    ),
    "width": Key(int, None, True, (), "of the feature maps; none is that of a head"),
    "window": Key(int, None, True, (), "tokens that softmax goes on weighing; none is none"),
    "match": Key(
        *(str, "weights", False, tuple(LOSSES)),
        "what the maps learn to imitate of attention, its weights or its outputs",
    ),
    "transfer_steps": Key(int, 500, False, (), "steps in which the maps learn"),
    "transfer_lr": Key(float, 1e-2, False, (), "their peak rate, at the base width if any"),
    "steps": Key(int, 1000, False, (), "steps on the next token after it"),
    "lr": Key(
        *(float, None, True, ()),
        "their peak learning rate; none is a tenth of the teacher's, with --lora the whole",
    ),
    "lora": Key(
        int, None, True, (), "train the maps and LoRA of this rank then; none trains everything"
    ),
}
# Keys of each run that a flag or the conversion itself sets, by the flag that may be given instead.
DECIDED = {
    "steps": "--transfer_steps and --steps",
    "optim.lr": "--transfer_lr and --lr",
    "start": "--workdir",
    "trainable": "--lora",
    "adapter": "--lora",
    "loss": "--match",
    "model.layers": "--layers",
    "model.prefix": "--layers",
    "model.pattern": "--layers",
    "model.suffix": "--layers",
    "model.blocks": "--layers",
    "model.mixers": "--form, --width and --window",
}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """layers: numbers of those converted.  transfer, tuned: {dotted key: value} of the two runs."""

    layers: tuple[int, ...]
    transfer: Mapping[str, object]
    tuned: Mapping[str, object]


def plan(teacher: Mapping, folder: str, out: str, given: Mapping[str, object]) -> Conversion:
    """The runs for a teacher's configuration.

    folder, out: of the teacher and of the runs.  given: values of FLAGS. Raises UsageError: layers
    that are not there or cannot be converted.
    """
    for name in ("width", "window", "lora", "transfer_steps", "steps"):
        if given[name] is not None and given[name] < 1:
            raise UsageError(f"--{name} is {given[name]} and must be at least 1")
    entries = entries_of(teacher["model"])
    layers = chosen(given["layers"], entries, teacher["model"])
    model = converted(teacher["model"], entries, layers, given)
    values = {key: value for key, value in leaves(teacher) if _stays(key)} | model
    values |= {"train.ngrams": False, "train.profile_start": None}
    transfer = values | {
        "start": folder,
        "steps": given["transfer_steps"],
        "trainable": MAPS,
        "loss.name": LOSSES[given["match"]],
        "model.dropout": 0.0,  # What is imitated is the teacher as it speaks.
        "optim.lr": given["transfer_lr"],
        "optim.weight_decay": 0.0,
        "optim.warmup_fraction": 0.0,
        "train.sample_every": None,
    }
    tuned = values | dict(_tuned(teacher, given)) | {"start": f"{out}/transfer"}
    return Conversion(layers, transfer, tuned)


def _stays(key: str) -> bool:
    """Whether both runs have it from the teacher."""
    section, _, name = key.partition(".")
    if section == "model":
        return name not in ("prefix", "pattern", "suffix")
    return section in ("data", "train", "mesh", "seed", "zero")


def _tuned(teacher: Mapping, given: Mapping) -> Iterator[tuple[str, object]]:
    """What only the second run has: the teacher's optimizer and its loss, perhaps LoRA."""
    rank, lr = given["lora"], given["lr"]
    yield "steps", given["steps"]
    share = 0.1 if rank is None else 1.0
    yield "optim.lr", teacher["optim"]["lr"] * share if lr is None else lr
    for name in ("name", "clip", "weight_decay"):
        yield f"optim.{name}", teacher["optim"][name]
    yield from leaves(teacher["optim"].get("methods", {}), "optim.methods.")
    own = teacher["loss"].get("losses", {}).get("cross_entropy", {})
    yield from leaves(own, "loss.losses.cross_entropy.")
    if rank is not None:
        yield "trainable", MAPS
        yield "adapter.name", "lora"
        yield "adapter.lora.rank", rank
        yield "adapter.lora.alpha", 2.0 * rank


def refuse_decided(overrides: Mapping[str, str]) -> None:
    """Raises UsageError for a key that is decided for each run."""
    for key in overrides:
        for name, flag in DECIDED.items():
            if key == name or key.startswith(f"{name}."):
                raise UsageError(f"--config.{key} is decided for each run; give {flag}")
