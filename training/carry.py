"""Which parameters of one model go where in another, by their paths and the numbers of layers."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from models.layering import Layering

NAMED = 3  # parameters named in one sentence

Shapes = Mapping[str, tuple[int, ...]]  # {path: shape}
Piece = tuple[str, int | None] | None  # a path and its row there, None for all; None where lacking


@dataclasses.dataclass(frozen=True)
class Plan:
    """pieces: {path: what each of its layers, or the one, is taken from} where anything is.

    missing, unused: names of what begins as usual, and of what the source has besides; with the
    layers that are meant where others of the same path are not.
    """

    pieces: dict[str, tuple[Piece, ...]]
    missing: list[str]
    unused: list[str]

    def take(self, source: dict, whole: dict) -> dict:
        """`whole` with the pieces of `source` in place, laid out as before. Traces."""
        taken = {path: self._value(path, source, whole[path]) for path in self.pieces}
        return whole | {p: jax.reshard(x, jax.typeof(whole[p]).sharding) for p, x in taken.items()}

    def _value(self, path: str, source: dict, like):
        row = lambda x, i: x if i is None else jax.lax.index_in_dim(x, i, 0, keepdims=False)
        pieces = self.pieces[path]
        if not Layering.stacks(path):
            return row(source[pieces[0][0]], pieces[0][1])
        if pieces == tuple((path, i) for i in range(len(source.get(path, ())))):
            return source[path]
        at = lambda piece, i: row(like, i) if piece is None else row(source[piece[0]], piece[1])
        return jnp.stack([at(piece, i) for i, piece in enumerate(pieces)])


def match(source: Shapes, of: Layering, target: Shapes, to: Layering) -> Plan:
    """Which parameters of a source go where.

    Raises ValueError: one has another shape, or none has a place.
    """
    held = {(layer, name): piece for layer, name, piece in _places(source, of)}
    pieces = {path: () for path in target}
    for layer, name, (path, row) in _places(target, to):
        piece = held.get((layer, name))
        pieces[path] += (piece,)
        if piece is not None:
            _same_shape(path, _row(target[path], row), piece[0], _row(source[piece[0]], piece[1]))
    used = {piece for of_path in pieces.values() for piece in of_path}
    if used <= {None}:
        raise ValueError(f"no parameter has a place here; it has {some(list(source))}")
    missing = {path: [p is None for p in of_path] for path, of_path in pieces.items()}
    unused = {path: [] for path in source}
    for _, _, piece in _places(source, of):
        unused[piece[0]].append(piece not in used)
    pieces = {path: of_path for path, of_path in pieces.items() if set(of_path) != {None}}
    return Plan(pieces, list(_names(missing, to)), list(_names(unused, of)))


def _places(shapes: Shapes, layering: Layering) -> Iterator[tuple[int | None, str, Piece]]:
    """(layer, name inside it, where it is held) of all that the parameters hold."""
    for path in shapes:
        layers, name = layering.split(path)
        for i, layer in enumerate(layers):
            yield layer, name, (path, i if Layering.stacks(path) else None)


def _row(shape: tuple[int, ...], row: int | None) -> tuple[int, ...]:
    return tuple(shape) if row is None else tuple(shape[1:])


def _same_shape(path: str, here: tuple, source: str, there: tuple) -> None:
    if here == there:
        return
    spell = lambda shape: f"[{' '.join(map(str, shape))}]"
    where = "" if source == path else f" as {source}"
    raise ValueError(
        f"{path} has the shape {spell(there)} there{where} and {spell(here)} here; make the sizes "
        "in config.model the same"
    )


def _names(chosen: Mapping[str, list[bool]], layering: Layering) -> Iterator[str]:
    """Names of the parameters of which anything is chosen."""
    for path, parts in chosen.items():
        layers, _ = layering.split(path)
        some = [str(layer) for layer, part in zip(layers, parts, strict=True) if part]
        if some and all(parts):
            yield path
        elif some:
            yield f"{path} of layer{'s' if len(some) > 1 else ''} {', '.join(some)}"


def some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (" and others" if len(names) > NAMED else "")
