"""A model's configuration at another width."""

import math
from collections.abc import Mapping


def at_width(model: Mapping, d_model: int) -> dict:
    """`config.model` with this d_model, and in proportion all sizes that are given by number.

    Those are widths of feed-forward networks, and numbers of heads where the size of one is given;
    where it is not, heads grow and stay as many.

    Raises ValueError: a size cannot be in proportion; the sentence names it.
    """
    factor = d_model / model["d_model"]
    made = dict(model) | {"d_model": d_model}
    ffns = model.get("ffns", {}).items()
    made["ffns"] = {n: _times(own, ("width",), factor, f"ffns.{n}") for n, own in ffns}
    for section in ("mixers", "blocks"):
        made[section] = {
            name: _times(own, ("heads", "kv_heads"), factor, f"{section}.{name}")
            if own.get("head_dim")
            else own
            for name, own in model.get(section, {}).items()
        }
    return made


def _times(own: Mapping, keys: tuple[str, ...], factor: float, at: str) -> dict:
    sizes = {key: own[key] for key in keys if own.get(key)}
    for key, size in sizes.items():
        new = round(size * factor)
        if new < 1 or not math.isclose(size * factor, new):
            raise ValueError(
                f"model.{at}.{key} {size} cannot be {factor:g} times as large; choose other widths"
            )
    return dict(own) | {key: round(size * factor) for key, size in sizes.items()}
