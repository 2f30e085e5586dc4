"""Which layers of attention become Hedgehog's, and how the model that they make is spelled."""

import itertools
from collections.abc import Mapping, Sequence

from launch.schema import UsageError
from models.layering import Layering

TAUGHT, STUDENT = "attention", "hedgehog"
# What attention may have and Hedgehog cannot, with the value that means that it is not there.
LACKS = {"window": None, "first": 0, "softcap": None, "sinks": False}
CARRIED = (
    *("heads", "kv_heads", "head_dim", "qk_norm", "bias"),
    *("rope", "rope_base", "rope_scaling", "rope_factor", "rope_original_length"),
)


def entries_of(model: Mapping) -> list[str]:
    """The entry of every layer, first to last."""
    prefix, pattern, suffix = (list(model[key]) for key in ("prefix", "pattern", "suffix"))
    return prefix + pattern * Layering.of(model).periods + suffix


def mixer_of(entry: str, model: Mapping) -> tuple[str, Mapping]:
    """The mixer that an entry means, and its own arguments."""
    if entry in model["blocks"]:
        own = dict(model["blocks"][entry])
        own.pop("ffn", None)
        return own.pop("mixer"), own
    return entry, model["mixers"].get(entry, {})


def chosen(text: str, entries: Sequence[str], model: Mapping) -> tuple[int, ...]:
    """The layers that --layers means, ascending. Raises UsageError, one sentence."""
    if not model["causal"]:
        raise UsageError(
            "the model sees later tokens (model.causal is false), which Hedgehog cannot; convert a "
            "causal one"
        )
    for i, entry in enumerate(entries):
        mixer, own = mixer_of(entry, model)
        if mixer == STUDENT or own.get("learned"):
            raise UsageError(
                f"layer {i} is {mixer} with learned feature maps, which would be taught once more; "
                "convert all layers that are to be Hedgehog at once, from the model without"
            )
    softmax = [i for i, entry in enumerate(entries) if mixer_of(entry, model)[0] == TAUGHT]
    halves = {"all": softmax, "even": [i for i in softmax if i % 2 == 0]}
    halves["odd"] = [i for i in softmax if i % 2]
    layers = halves[text] if text in halves else _numbers(text, len(entries))
    if others := [i for i in layers if i not in softmax]:
        raise UsageError(
            f"layer {others[0]} is {mixer_of(entries[others[0]], model)[0]} and not {TAUGHT}; "
            f"layers of {TAUGHT} are {', '.join(map(str, softmax)) or 'not there'}"
        )
    if not softmax:
        raise UsageError(f"the model has no layer of {TAUGHT}, so there is nothing to convert")
    if not layers:
        raise UsageError(
            f"--layers {text} names none of the model's {len(softmax)} layers of {TAUGHT}"
        )
    for layer in layers:
        _refuse_lacking(layer, *mixer_of(entries[layer], model))
    return tuple(layers)


def _numbers(text: str, count: int) -> list[int]:
    """'0,2,4-7' as numbers."""
    found = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(
                f"--layers {text} is not understood; give all, even, odd, or numbers as in 0,2,4-7"
            )
        ends = int(first), int(last if dash else first)
        if ends[0] > ends[1]:
            raise UsageError(f"--layers {part.strip()} runs backwards; give {ends[1]}-{ends[0]}")
        if ends[1] >= count:
            raise UsageError(
                f"--layers names layer {ends[1]}, and the model's {count} are 0 to {count - 1}"
            )
        found |= set(range(ends[0], ends[1] + 1))
    return sorted(found)


def _refuse_lacking(layer: int, mixer: str, own: Mapping) -> None:
    for name, nothing in LACKS.items():
        if own.get(name, nothing) != nothing:
            raise UsageError(
                f"layer {layer} is {mixer} with {name}={own[name]}, which Hedgehog cannot have; "
                "leave such layers out by --layers"
            )


def converted(
    model: Mapping, entries: Sequence[str], layers: Sequence[int], given: Mapping
) -> dict:
    """{dotted key: value} of the model's layers and of the new entries among them."""
    names, values = {}, {}
    for entry in dict.fromkeys(entries[layer] for layer in layers):
        own = {k: v for k, v in mixer_of(entry, model)[1].items() if k in CARRIED}
        own |= {name: given[name] for name in ("form", "width", "window")}
        direct = entry == TAUGHT and not _taken(STUDENT, entries, model)
        name = STUDENT if direct else _free(f"{entry}_{STUDENT}", model)
        names[entry], section = name, "model.mixers" if direct else "model.blocks"
        if not direct:
            ffn = model["blocks"].get(entry, {}).get("ffn", model["ffn"])
            own = {"mixer": STUDENT, "ffn": ffn} | own
        values |= {f"{section}.{name}.{key}": value for key, value in own.items()}
    of = lambda i, entry: names[entry] if i in layers else entry
    prefix, pattern, suffix = shortest([of(i, entry) for i, entry in enumerate(entries)])
    return values | {"model.prefix": prefix, "model.pattern": pattern, "model.suffix": suffix}


def _taken(mixer: str, entries: Sequence[str], model: Mapping) -> bool:
    """Whether arguments of the mixer are in use, its own or those that entries inherit."""
    return any(mixer_of(entry, model)[0] == mixer for entry in entries)


def _free(name: str, model: Mapping) -> str:
    numbered = (f"{name}{n}" for n in itertools.count(2))
    return next(n for n in itertools.chain([name], numbered) if n not in model["blocks"])


def shortest(entries: Sequence[str]) -> tuple[tuple, tuple, tuple]:
    """(prefix, pattern, suffix) that spell these layers with the fewest entries in all; of equal
    ones that with the fewest outside of the pattern, which is where layers are compiled once."""
    entries, best, found = tuple(entries), (len(entries) + 1, 0), None
    for before, after in itertools.product(range(len(entries)), repeat=2):
        middle = entries[before : len(entries) - after]
        for n in range(1, min(len(middle), best[0] - before - after) + 1):
            rank = before + n + after, before + after
            if len(middle) % n == 0 and rank < best and middle == middle[:n] * (len(middle) // n):
                best, found = rank, (entries[:before], middle[:n], entries[len(entries) - after :])
    return found
