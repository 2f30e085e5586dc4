"""Which configuration an implementation runs: explicit, else recorded for the device, else guessed.

`pallas_kernels/<op>/tuned/<device kind>.json` holds what was found for one kind of device (its name
in small letters with hyphens, as in tpu-v5p.json): an object from the name of an implementation to
a list of {"key": {...}, "config": {...}}, to which an entry may add how it was found.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from pallas_kernels import dispatch

ROOM = pathlib.Path(__file__).parent
# Entries of a key that need not be equal: batch and lengths, each within this factor.
NEAR = ("B", "L", "S")
FACTOR = 4


def choose(
    op: str,
    implementation: str,
    key: Mapping[str, Any],
    explicit: Any | None,
    heuristic: Callable[[], Any],
) -> Any:
    """The configuration to run with.

    A recorded one is taken if its key has the same entries, all equal but for B, L and S (batch and
    lengths), each of which may be up to 4 times larger or smaller; of several the nearest, by the
    sum of |log2| of these ratios, and of equally near ones the first.

    Args:
      op: folder of the op in pallas_kernels.
      implementation: as the op names it.
      key: what the choice depends on: numbers, strings, booleans or None.
      explicit: the caller's own configuration, or None.
      heuristic: makes one without a record; its type is the implementation's dataclass.

    Raises:
      ValueError: the explicit configuration is of another implementation, or the record is not
        as said above.
    """
    guess = heuristic()
    if explicit is not None:
        if type(explicit) is not type(guess):
            raise ValueError(
                f"{op} with implementation {implementation!r} takes a config of "
                f"{_name(type(guess))}, not {_name(type(explicit))}: give that or None."
            )
        return explicit
    path = record(op, dispatch.device_kind())
    near = [(_distance(e["key"], key), e["config"]) for e in entries(path, implementation)]
    near = [(distance, fields) for distance, fields in near if distance is not None]
    if not near:
        return guess
    return _config(type(guess), min(near, key=lambda found: found[0])[1], path)


def record(op: str, device_kind: str) -> pathlib.Path:
    """Where an op's configurations for a kind of device are kept, whether or not there are any."""
    name = re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")
    return ROOM / op / "tuned" / f"{name}.json"


@functools.cache
def entries(path: pathlib.Path, implementation: str) -> list[dict]:
    """An implementation's entries of a record, none where there is no record.

    Raises:
      ValueError: the file does not hold what this module's docstring says.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text()).get(implementation, [])
        whole = isinstance(found, list) and all(map(_is_entry, found))
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{path} is no record of tuning: it must be a JSON object from an implementation's "
            f'name to a list of {{"key": {{..}}, "config": {{..}}}}; mend it or remove it.'
        )
    return found


def _is_entry(entry: Any) -> bool:
    parts = [entry.get(name) for name in ("key", "config")] if isinstance(entry, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        return False
    sizes = [parts[0][name] for name in NEAR if name in parts[0]]
    return all(isinstance(size, int) and size > 0 for size in sizes)


def _distance(recorded: Mapping[str, Any], key: Mapping[str, Any]) -> float | None:
    """How far two keys are apart, None where one does not speak for the other."""
    exact = lambda key: {name: value for name, value in key.items() if name not in NEAR}
    if recorded.keys() != key.keys() or exact(recorded) != exact(key):
        return None
    ratios = [abs(math.log2(recorded[n] / key[n])) for n in NEAR if n in key]
    return sum(ratios) if all(r <= math.log2(FACTOR) for r in ratios) else None


def _config(kind: type, fields: Mapping[str, Any], path: pathlib.Path):
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(
            f"{path} gives {_name(kind)} the field {unknown[0]!r}, but it has "
            f"{', '.join(sorted(known))}: mend the record or remove it."
        )
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no {_name(kind)}: {error}.") from error


def _name(kind: type) -> str:
    return f"{kind.__module__.removeprefix('pallas_kernels.')}.{kind.__qualname__}"
