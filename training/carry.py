"""Which parameters of one model go where in another, by their paths and the numbers of layers."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp

from models.layering import Layering

NAMED = 3  # parameters named in one sentence
NETWORK = "ffn/"  # names inside a layer of what may be made of another kind of network

Shapes = Mapping[str, tuple[int, ...]]  # {path: shape}
Piece = tuple[str, int | None] | None  # a path and its row there, None for all; None where lacking
# (given weights, own ones as usual) -> own weights, all by names inside the network. Traces.
Make = Callable[[dict, dict], dict]
# (shapes of given weights, of own ones) -> (make, what is made, in words); ValueError if it cannot.
Adopt = Callable[[Shapes, Shapes], tuple[Make, str]]


@dataclasses.dataclass(frozen=True)
class Made:
    """A network made of the source's, which has other weights.

    given, drawn: where weights are, by names inside the network, in the source and here.
    shapes: of what is made, by the same names.  note: what that is, in words.
    """

    given: dict[str, Piece]
    drawn: dict[str, Piece]
    make: Make
    shapes: Shapes
    note: str

    def weights(self, source: dict, whole: dict) -> dict:
        pick = lambda params, pieces: {name: _row(params[p], i) for name, (p, i) in pieces.items()}
        return self.make(pick(source, self.given), pick(whole, self.drawn))


@dataclasses.dataclass(frozen=True)
class Plan:
    """pieces: {path: what each of its layers, or the one, is taken from} where anything is.

    missing, unused: names of what begins as usual, and of what the source has besides; with the
    layers that are meant where others of the same path are not.
    made: {number of a layer: network}; its weights are pieces at paths that `_at` gives.
    """

    pieces: dict[str, tuple[Piece, ...]]
    missing: list[str]
    unused: list[str]
    made: dict[int, Made]

    def take(self, source: dict, whole: dict) -> dict:
        """`whole` with the pieces of `source` in place, laid out as before. Traces."""
        for layer, network in self.made.items():
            weights = network.weights(source, whole)
            source = source | {_at(layer, name): x for name, x in weights.items()}
        taken = {path: self._value(path, source, whole[path]) for path in self.pieces}
        return whole | {p: jax.reshard(x, jax.typeof(whole[p]).sharding) for p, x in taken.items()}

    def _value(self, path: str, source: dict, like):
        pieces = self.pieces[path]
        if not Layering.stacks(path):
            return _row(source[pieces[0][0]], pieces[0][1])
        if pieces == tuple((path, i) for i in range(len(source.get(path, ())))):
            return source[path]
        at = lambda piece, i: _row(like, i) if piece is None else _row(source[piece[0]], piece[1])
        return jnp.stack([at(piece, i) for i, piece in enumerate(pieces)])


def match(
    source: Shapes,
    of: Layering,
    target: Shapes,
    to: Layering,
    adopting: Callable[[int, str], Adopt | None] = lambda layer, path: None,
) -> Plan:
    """Which parameters of a source go where.

    adopting(layer, path): how the layer's network at this path here takes weights of other shapes,
    None where it does not.

    Raises ValueError: one has another shape, or none has a place.
    """
    made = _made(source, of, target, to, adopting)
    shapes = {_at(layer, name): s for layer, m in made.items() for name, s in m.shapes.items()}
    shapes |= source
    held = {(layer, name): piece for layer, name, piece in _places(source, of)}
    for layer, network in made.items():
        for name in network.given:
            del held[layer, NETWORK + name]
        held |= {(layer, NETWORK + name): (_at(layer, name), None) for name in network.shapes}
    pieces = {path: () for path in target}
    for layer, name, (path, row) in _places(target, to):
        piece = held.get((layer, name))
        pieces[path] += (piece,)
        if piece is not None:
            _same_shape(path, _shape(target, (path, row)), piece[0], _shape(shapes, piece))
    used = {piece for of_path in pieces.values() for piece in of_path}
    used |= {piece for network in made.values() for piece in network.given.values()}
    if used <= {None}:
        raise ValueError(f"no parameter has a place here; it has {some(list(source))}")
    missing = {path: [p is None for p in of_path] for path, of_path in pieces.items()}
    unused = {path: [] for path in source}
    for _, _, piece in _places(source, of):
        unused[piece[0]].append(piece not in used)
    pieces = {path: of_path for path, of_path in pieces.items() if set(of_path) != {None}}
    return Plan(pieces, list(_names(missing, to)), list(_names(unused, of)), made)


def _made(source, of, target, to, adopting) -> dict[int, Made]:
    """Networks of layers that both have, where shapes differ and the one here takes the other."""
    there, here = _networks(source, of), _networks(target, to)
    made = {}
    for layer in sorted(there.keys() & here.keys()):
        given = {name: _shape(source, piece) for name, piece in there[layer].items()}
        own = {name: _shape(target, piece) for name, piece in here[layer].items()}
        common = given.keys() & own.keys()
        if common and all(given[name] == own[name] for name in common):
            continue
        name, (path, _) = next(iter(here[layer].items()))
        if adopt := adopting(layer, path.removesuffix(f"/{name}")):
            make, note = adopt(given, own)
            abstract = lambda shapes: {
                name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()
            }
            result = jax.eval_shape(make, abstract(given), abstract(own))
            shapes = {name: x.shape for name, x in result.items()}
            made[layer] = Made(there[layer], here[layer], make, shapes, note)
    return made


def _networks(shapes: Shapes, layering: Layering) -> dict[int, dict[str, Piece]]:
    """{layer: where the weights of its feed-forward network are, by name}."""
    found: dict[int, dict[str, Piece]] = {}
    for layer, name, piece in _places(shapes, layering):
        if layer is not None and name.startswith(NETWORK):
            found.setdefault(layer, {})[name.removeprefix(NETWORK)] = piece
    return found


def _at(layer: int, name: str) -> str:
    """A path that no parameter has."""
    return f"made/{layer}/{NETWORK}{name}"


def _places(shapes: Shapes, layering: Layering) -> Iterator[tuple[int | None, str, Piece]]:
    """(layer, name inside it, where it is held) of all that the parameters hold."""
    for path in shapes:
        layers, name = layering.split(path)
        for i, layer in enumerate(layers):
            yield layer, name, (path, i if Layering.stacks(path) else None)


def _shape(shapes: Shapes, piece: Piece) -> tuple[int, ...]:
    path, row = piece
    return tuple(shapes[path]) if row is None else tuple(shapes[path][1:])


def _row(x: jax.Array, row: int | None) -> jax.Array:
    return x if row is None else jax.lax.index_in_dim(x, row, 0, keepdims=False)


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
