"""Which implementation runs where: the target's platform, the choice, and the step into a shard.

A kernel sees one shard; `local` enters it from code whose mesh axes are Explicit. JAX cannot
differentiate a `shard_map` nested in another that checks its types, so kernels call `local` inside
the two rules of a `jax.custom_vjp`, never around one: then nothing differentiates through it.
"""

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec, get_abstract_mesh


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': of the devices the program is traced for, which may not be here."""
    device = get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def device_kind() -> str:
    """The target's name as its maker gives it, as in 'NVIDIA H200' or 'TPU v5p'."""
    device = get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def choices(package: str, platforms: Mapping[str, str | None], part: str) -> dict[str, Callable]:
    """The function `part` of each of a package's modules, for `pick`.

    Args:
      package: the op's, as in 'pallas_kernels.flash_attention'.
      platforms: name of a module -> the platform that it is for, None for any.
      part: name of the function.

    A module is imported when it is called and the target is its platform: what a kernel's language
    costs to import, up to seconds, is paid where it runs.
    """

    def call(name, *args, **kwargs):
        if platforms[name] not in (None, platform()):
            raise NotImplementedError(f"{name} is for a {platforms[name]}, not a {platform()}.")
        mesh = get_abstract_mesh()
        if platforms[name] and (auto := [a for a in mesh.auto_axes if mesh.shape[a] > 1]):
            raise NotImplementedError(
                f"{name} runs on one shard, and the compiler cannot split it over the Auto mesh "
                f"axes {auto}: make them Explicit, or call it inside shard_map."
            )
        return getattr(importlib.import_module(f"{package}.{name}"), part)(*args, **kwargs)

    return {name: functools.partial(call, name) for name in platforms}


def pick(implementations: Mapping[str, Callable], implementation: str | None, *args, **kwargs):
    """Calls the named implementation, or with None the first that does not decline.

    An implementation declines a shape, an option or a platform with NotImplementedError. A named
    one is the caller's wish, so its refusal is not caught.

    Raises:
      ValueError: the name is not known.
      NotImplementedError: the named one, or every one, declines.
    """
    if implementation is not None:
        if implementation not in implementations:
            known = ", ".join(implementations)
            raise ValueError(f"No implementation is called {implementation!r}; there are: {known}.")
        return implementations[implementation](*args, **kwargs)
    refusals = []
    for name, function in implementations.items():
        try:
            return function(*args, **kwargs)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    raise NotImplementedError("Every implementation declines. " + "; ".join(refusals))


def spec(x) -> PartitionSpec | None:
    """How an array is split over the Explicit mesh axes, by its type; None for None."""
    return None if x is None else jax.typeof(x).sharding.spec


def split(x, dim: int) -> tuple[str, ...]:
    """The Explicit mesh axes, of more than one device, that dimension `dim` of x is split over."""
    entry = tuple(spec(x))[dim]
    names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    sizes = get_abstract_mesh().shape
    return tuple(name for name in names if sizes[name] > 1)


def vary(*args) -> tuple:
    """Marks every array as varying over the manual axes that any of them varies over; keeps None.

    Inside a `shard_map` that checks such types, call this before a custom_vjp: the gradient of an
    argument that was the same on all devices is then summed by JAX and not by the kernel.
    """
    return like(args, args)


def like(args: Any, results: Any) -> Any:
    """Results, each marked as varying over the manual axes that any of `args` varies over.

    A kernel's results bear no such mark unless the kernel gives it, and JAX believes them: what is
    taken to be the same on all devices has its gradient summed over them once more.
    """
    axes = _varying(args)

    def mark(x):
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(mark, results)


def place(x, *entries):
    """x with its first dimensions split like this and the others whole; None stays."""
    if x is None:
        return x
    wanted = PartitionSpec(*entries, *[None] * (x.ndim - len(entries)))
    return x if spec(x) == wanted else jax.reshard(x, wanted)


def check_heads(q, k, v):
    """Raises ValueError where q, k, v `[B L H K]` have batch or heads split in different ways."""
    for name, x in (("k", k), ("v", v)):
        batch, heads = split(x, 0), split(x, 2)
        # One key head may be whole on every device: all query heads read it.
        shared = x.shape[2] == 1 and not heads and split(k, 2) == split(v, 2)
        if batch != split(q, 0) or not (shared or heads == split(q, 2)):
            raise ValueError(
                f"q {q.shape} is split like {spec(q)}, but {name} {x.shape} like "
                f"{spec(x)}: split batch and heads alike; where a mesh axis does not "
                f"divide the key heads, repeat them until it does."
            )


def local(fn: Callable, *, follow: Any, whole: Mapping[int, Mapping[int, str]] | None = None):
    """Runs `fn` on the shards of its arguments; without Explicit mesh axes, on the arguments.

    Args:
      fn: takes arrays (or None) by position and returns a tree of arrays.
      follow: how outputs are split: the index of the argument that an output is split like, in a
        tree like the outputs, or a function from the arguments' specs to the outputs' specs.
      whole: argument index -> {dimension: its name}: dimensions that fn needs in one piece.

    Raises:
      ValueError: a dimension in `whole` is split over more than one device.
    """

    def sharded(*args):
        axes = set(get_abstract_mesh().explicit_axes)
        if not axes:
            return fn(*args)
        for index, dims in (whole or {}).items():
            _check_whole(args[index], dims)
        specs = tuple(map(spec, args))
        out = follow(*specs) if callable(follow) else jax.tree.map(lambda i: specs[i], follow)
        # A region that tracks which axes values vary over must see that here too; where none does,
        # kernel calls are spared telling it.
        call = jax.shard_map(
            lambda *args: fn(*vary(*args)),
            in_specs=specs,
            out_specs=out,
            axis_names=axes,
            check_vma=bool(_varying(args)),
        )
        return call(*args)

    return sharded


def _check_whole(x, dims: Mapping[int, str]):
    for dim, name in dims.items():
        if x is not None and (axes := split(x, dim)):
            shards = math.prod(get_abstract_mesh().shape[a] for a in axes)
            raise ValueError(
                f"The {name}, {x.shape[dim]}, is split {shards} ways over mesh axes {axes}, but "
                f"this kernel needs it in one piece: reshard it first, or use a method of "
                f"parallel/ made for that axis."
            )


def _varying(args) -> frozenset:
    types = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(args)]
    return frozenset().union(*(t.varying for t in types))
