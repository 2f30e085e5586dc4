"""What of a configuration may change when a run goes on, and which flag says that it should."""

import enum
import re
from collections.abc import Mapping

from training.metrics import dotted

Changed = dict[str, list]  # {dotted key: [value before, value after]}
NAMED = 8  # keys listed in one sentence


class Kind(enum.Enum):
    """HARMLESS: decides neither which rows there are nor what is computed from one, but for how
    far schedules reach, which every longer run changes.

    The values of the next two are the flags that accept them; what is FIXED would mean another
    thing to the same parameters.
    """

    HARMLESS = "harmless"
    CORPUS = "--accept_corpus"
    CONFIG = "--accept_config"
    FIXED = "fixed"


# The first pattern that matches a whole key decides. Sources are harmless because the corpus has
# its fingerprint; of a domain, all but what is the mixture's belongs to its source.
KINDS = (
    (r"steps|start|zero|train\..*|mesh\..*|model\.(remat|unroll)", Kind.HARMLESS),
    (r"data\.(batch_size|micro_batches|prefetch|workers)", Kind.HARMLESS),
    (r"data\.(source|sources\..*)", Kind.HARMLESS),
    (r"data\.domains\..*\.(source|weight|schedule|epochs)", Kind.CORPUS),
    (r"data\.domains\..*", Kind.HARMLESS),
    (r"data\.(length|tokenizer|tokenizers\..*)", Kind.FIXED),
    (r"data\..*|seed", Kind.CORPUS),
    (r".*", Kind.CONFIG),
)
# What the saved weights of a mixture follow from: weights of another one would overrule these.
WEIGHED = re.compile(r"data\.(mixture|mixing|mixings\..*|domains\..*\.(weight|schedule|epochs))")
# Schedules are stretched over the run by these, which is put on record.
STRETCHING = re.compile(r"steps|data\.batch_size")
# Losses that a mixture may follow are taken at these.
HEARD = re.compile(r"train\.eval_(every|rows)")
# Where rows lie and how many are taken at once; the corpus is the same one.
LAYOUT = re.compile(r"data\.(batch_size|micro_batches|prefetch|workers)")


def changes(old: Mapping, new: Mapping) -> Changed:
    """Of two nested configurations; a key that one of them lacks is None there.

    A run from before there was `balance` has no layer that one could balance.
    """
    new = new if "balance" in old else {k: value for k, value in new.items() if k != "balance"}
    old, new = dict(dotted(old)), dict(dotted(new))
    return {key: [old.get(key), new.get(key)] for key in old | new if old.get(key) != new.get(key)}


def kind(key: str, heard: bool = False) -> Kind:
    """heard: whether the data's mixture follows held-out losses."""
    if heard and HEARD.fullmatch(key):
        return Kind.CORPUS
    return next(kind for pattern, kind in KINDS if re.fullmatch(pattern, key))


def by_kind(changed: Changed, *, heard: bool = False) -> dict[Kind, Changed]:
    """What of it is of each kind."""
    return {
        each: {key: both for key, both in changed.items() if kind(key, heard) is each}
        for each in Kind
    }


def refusal(kinds: Mapping[Kind, Changed], accepted: set[Kind]) -> str | None:
    """What is not accepted and what can be done about it, as the end of a sentence."""
    wrong = {k: keys for k, keys in kinds.items() if keys and k not in {Kind.HARMLESS, *accepted}}
    if not wrong:
        return None
    flags = "" if Kind.FIXED in wrong else " ".join(sorted(k.value for k in wrong))
    fix = "undo that or choose another --workdir"
    fix = f"undo that, choose another --workdir, or go on with {flags}" if flags else fix
    refused = {key: both for keys in wrong.values() for key, both in keys.items()}
    return f"{told(refused)}; {fix}"


def told(changed: Changed) -> str:
    """' (key before -> after, ...)', or nothing."""
    if not changed:
        return ""
    listed = [f"{key} {old!r} -> {new!r}" for key, (old, new) in changed.items()]
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return f" ({', '.join(listed[:NAMED])}{more})"
