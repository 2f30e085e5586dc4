"""What a traced program computes under the names that `parallel.named` gave."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

# What runs another program on its own arguments as they are.
CALLS = ("jit", "remat2", "custom_jvp_call", "custom_vjp_call")


def observed(fn: Callable) -> Callable[..., tuple[Any, dict[str, list[jax.Array]]]]:
    """fn with a second output, {name: its values in the order in which they are computed}.

    Loops are taken turn by turn, so that a layer under scan has a value of its own, and calls and
    remat are looked into; what no name lies in is run as it is. Not for gradients.
    """

    def run(*args):
        traced, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        found: dict[str, list] = {}
        outs = _run(traced, jax.tree.leaves(args), found)
        return jax.tree.unflatten(jax.tree.structure(shape), outs), found

    return run


def _run(closed, args, found):
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(closed.jaxpr.invars, args, strict=True))
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else values[atom]
    for eqn in closed.jaxpr.eqns:
        outs = _equation(eqn, [read(atom) for atom in eqn.invars], found)
        values |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _equation(eqn, args, found):
    if eqn.primitive.name == "name":
        found.setdefault(str(eqn.params["name"]), []).append(args[0])
        return args
    inside = [part for part in _parts(eqn.params.values()) if _names(part)]
    if eqn.primitive.name == "scan" and inside:
        return _scan(eqn.params, args, found)
    if eqn.primitive.name in CALLS and len(inside) == 1:
        return _run(inside[0], args, found)
    if inside:
        raise NotImplementedError(f"named values inside of {eqn.primitive.name} cannot be observed")
    with eqn.ctx.manager:  # what the equation was traced under: its mesh, its precision
        outs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return outs if eqn.primitive.multiple_results else [outs]


def _scan(params, args, found):
    consts, carry, rows = map(list, params["ft_in"].update(args).unpack())
    turns = range(params["length"])
    taken: dict[int, list] = {}
    for turn in reversed(turns) if params["reverse"] else turns:
        outs = _run(params["jaxpr"], [*consts, *carry, *(x[turn] for x in rows)], found)
        carry, taken[turn] = map(list, params["ft_out"].update(outs).unpack())
    stacked = zip(*(taken[turn] for turn in turns), strict=True)
    return [*carry, *(jax.numpy.stack(column) for column in stacked)]


def _parts(params) -> Iterator:
    for value in params:
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part
            elif isinstance(part, core.Jaxpr):
                yield core.ClosedJaxpr(part, ())


def _names(closed) -> bool:
    named = lambda eqn: (
        eqn.primitive.name == "name" or any(map(_names, _parts(eqn.params.values())))
    )
    return any(map(named, closed.jaxpr.eqns))
