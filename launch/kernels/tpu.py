"""Compiling for a TPU that is not there, and what its compiler says of each Pallas kernel."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from launch.kernels import llo
from launch.kernels.targets import Target

DUMPS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"


def environment(target: Target, folder: str | os.PathLike) -> dict[str, str]:
    """What a process must have in its environment before it imports jax, to compile and dump."""
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": target.accelerator,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": DUMPS.format(folder),
    }


def compile(
    function: Callable, arguments: Sequence, target: Target, folder: str | os.PathLike
) -> dict[str, dict]:
    """Compiles `function(*arguments)` for one TPU and reads what became of each kernel.

    Call it in a process that was started with `environment(target, folder)`; the dumps, tens of
    megabytes, stay in the folder.

    Args:
      function: of arrays; jitted here.
      arguments: trees of ShapeDtypeStruct.

    Returns:
      {kernel's name: `program`, the fields of llo.Program; `grid`, its steps in one call, all cores
      together, or None; `calls`: how often the program has it; `temporaries`: bytes of HBM that the
      whole program needs besides arguments and results}.

    Raises:
      llo.DumpError: the dumps are not what the parser knows.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    chips = topologies.get_topology_desc(topology_name=target.topology, platform="tpu").devices
    mesh = Mesh(np.array(chips[:1]), ("device",))
    whole = NamedSharding(mesh, PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function).trace(*jax.tree.map(place, tuple(arguments)))
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    calls = list(_calls(traced.jaxpr.jaxpr))
    shared = {"temporaries": compiled.memory_analysis().temp_size_in_bytes}
    found = {}
    if not calls:
        return found  # What else is dumped, as xla's own loops, is no kernel.
    for name, programs in _named(llo.read(pathlib.Path(folder)), {name for name, _ in calls}):
        grids = [grid for called, grid in calls if called == name]
        for i, program in enumerate(programs):
            found[name if i == 0 else f"{name}.{i + 1}"] = shared | {
                "program": dataclasses.replace(program, name=name).plain(),
                "grid": grids[min(i, len(grids) - 1)] if grids else None,
                "calls": max(len(grids) // len(programs), 1),
            }
    return found


def _named(programs: Mapping[str, list], names: Collection[str]) -> list[tuple[str, list]]:
    """Programs under their pallas_calls' names, which XLA puts words around, as in jvp_NAME_."""
    found = collections.defaultdict(list)
    for dumped, own in programs.items():
        inside = [name for name in names if name and name in dumped]
        found[max(inside, key=len, default=dumped)] += own
    return list(found.items())


def _calls(jaxpr, times: int = 1) -> Iterator[tuple[str, int | None]]:
    """(name, grid steps) of every pallas_call, as often as the program runs it."""
    from jax.extend import core

    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            grid = equation.params["grid_mapping"].grid
            steps = 1
            for size in grid:
                steps = steps * size if steps is not None and isinstance(size, int) else None
            yield from [(equation.params["name"] or "", steps)] * times
            continue
        length = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in core.jaxprs_in_params(equation.params):
            yield from _calls(inner, times * length)
