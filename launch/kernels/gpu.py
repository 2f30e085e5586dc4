"""Compiling for an H100 or H200 that is not there, and what the compiler says of each kernel.

XLA's CUDA compiler and ptxas come with jax's plugin and need no device. With two variables set,
Mosaic GPU prints every kernel's PTX and ptxas' account of it on the process' standard output, which
is caught here. The launch (grid, threads, shared memory) is read from the kernel's module, as it
stands in the program that is given to XLA.
"""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

from launch.kernels import chips, ptx, sass
from launch.schema import UsageError

PRINTS = ("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS")
SUFFIX = "_mosaic_gpu_kernel"  # which Mosaic GPU appends to a kernel's name


def compile(
    function: Callable, arguments: Sequence, target, folder: str | os.PathLike
) -> dict[str, dict]:
    """Compiles `function(*arguments)` for one GPU and says what became of each Mosaic GPU kernel.

    Call it in a process of its own: standard output, an environment variable and jax's compilation
    cache are the process'. A program is compiled once a process, since a kernel that is already
    compiled is not printed again.

    Args:
      function: of arrays; jitted here.
      arguments: trees of ShapeDtypeStruct (or arrays), with None where there is none.
      target: its `name` is that of a description in this folder, its `device_kind` is what
        `dispatch.device_kind()` shall say.
      folder: for NAME.ptx and NAME.ptxas of every kernel.

    Returns:
      {kernel's name: fields of `ptx.Kernel`, `temporaries`: bytes of the whole program's, `sass`:
      counts of machine instructions, None without the tools for it}; a second kernel of the same
      name is NAME.2. Without Mosaic GPU kernels, {}.

    Raises:
      UsageError: jax's CUDA plugin or the target's description is missing.
      RuntimeError: the compiler did not print a kernel of the program.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lowered = lower(function, arguments, target)
    launches = list(_launches(lowered.compiler_ir()))
    with _printed(folder / "printed.txt") as said:
        compiled = lowered.compile()
    texts = list(ptx.split(said()))
    if len(texts) != len(launches):
        raise RuntimeError(
            f"The program has {len(launches)} kernels, but {len(texts)} were printed: compile it "
            f"in a new process, where nothing is compiled yet."
        )
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    found = {}
    for name, source, account, launch in _paired(texts, launches):
        (folder / f"{name}.ptx").write_text(source, encoding="utf-8")
        (folder / f"{name}.ptxas").write_text(account, encoding="utf-8")
        kernel = ptx.parse(source, account, launch, chips.chip(target.name))
        found[name] = dataclasses.asdict(kernel) | {
            "temporaries": temporaries,
            "sass": _machine_code(folder / f"{name}.ptx"),
        }
    return found


def lower(function: Callable, arguments: Sequence, target):
    """`function(*arguments)` lowered for the target, ready for `.compile()`; see `compile`."""
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

    jax.config.update("jax_enable_compilation_cache", False)  # What is cached is not printed.
    axes = ("device",)
    mesh = jax.sharding.Mesh(_devices(target), axes)
    device = AbstractDevice(
        device_kind=target.device_kind, num_cores=chips.chip(target.name).cores, platform="gpu"
    )
    abstract = AbstractMesh((1,), axes, axis_types=(AxisType.Auto,), abstract_device=device)
    place = lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())
    )
    with jax.sharding.use_abstract_mesh(abstract):
        traced = jax.jit(function).trace(*jax.tree.map(place, tuple(arguments)))
        return traced.lower(lowering_platforms=("cuda",))


def _devices(target) -> Sequence:
    from jax.experimental import topologies

    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise UsageError(
            f"compiling for {target.name} needs jax's CUDA plugin: uv sync --extra aot"
        )
    description = chips.description(target.name)
    return topologies.get_topology_desc(
        platform="cuda", target_config=description, topology="1x1x1"
    ).devices


def _machine_code(source: pathlib.Path) -> dict[str, int] | None:
    try:
        return sass.count(source)
    except RuntimeError as error:
        print(f"kernels: no machine instructions are counted: {error}", file=sys.stderr)
        return None


@contextlib.contextmanager
def _printed(path: pathlib.Path) -> Iterator[Callable[[], str]]:
    """Catches what compilers print on the process' standard output; the value reads it."""
    before = {name: os.environ.get(name) for name in PRINTS}
    os.environ.update(dict.fromkeys(PRINTS, "1"))
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(path, "wb") as file:
            os.dup2(file.fileno(), 1)
            yield lambda: path.read_text(encoding="utf-8", errors="replace")
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _paired(texts: Sequence, launches: Sequence[tuple[str, ptx.Launch]]) -> Iterator:
    """(name, PTX, ptxas' account, launch) of every kernel, the n-th of a name with its n-th."""
    waiting: dict[str, list] = {}
    for name, launch in launches:
        waiting.setdefault(name, []).append(launch)
    seen: dict[str, int] = {}
    for symbol, source, account in texts:
        name = symbol.removesuffix(SUFFIX)
        if not waiting.get(name):
            raise RuntimeError(f"The compiler printed {symbol!r}, which the program does not have.")
        seen[name] = seen.get(name, 0) + 1
        suffix = "" if seen[name] == 1 else f".{seen[name]}"
        yield name + suffix, source, account, waiting[name].pop(0)


def _launches(module) -> Iterator[tuple[str, ptx.Launch]]:
    """(kernel's name, how it is launched) of every Mosaic GPU kernel in a StableHLO module."""
    from jax.extend.mlir import ir

    seen = set()
    for op in _walk(module.operation):
        if op.name != "stablehlo.custom_call" or "mosaic_gpu" not in str(
            op.attributes["call_target_name"]
        ):
            continue
        config = op.attributes["mhlo.backend_config"]
        content = config["module"].value_bytes
        if content in seen:  # One kernel, called from two places, is compiled once.
            continue
        seen.add(content)
        with module.context as context, ir.Location.unknown():
            context.allow_unregistered_dialects = True
            yield _launch(ir.Module.parse(content))


def _launch(kernel) -> tuple[str, ptx.Launch]:
    name = kernel.operation.attributes["sym_name"].value
    for op in _walk(kernel.operation):
        if op.name.endswith("gpu.launch"):
            return name, _operands(op)
    raise RuntimeError(f"The module of the kernel {name!r} launches nothing.")


def _operands(op) -> ptx.Launch:
    """Operands in their groups: dependencies, grid 3, block 3, cluster 3 or 0, shared memory."""
    sizes = list(op.attributes["operandSegmentSizes"])
    numbers = [operand.owner.attributes["value"].value for operand in list(op.operands)[sizes[0] :]]
    cluster = numbers[6:9] if sizes[7] else (1, 1, 1)
    shared = numbers[9 if sizes[7] else 6] if sizes[10] else 0
    return ptx.Launch(tuple(numbers[:3]), tuple(numbers[3:6]), tuple(cluster), shared)


def _walk(op) -> Iterator:
    for region in op.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _walk(inner.operation)
