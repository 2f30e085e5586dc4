"""A training state as flat dicts of leaves, which is how checkpoints hold it."""

from typing import Any

import jax
import numpy as np

from training.state import TrainState

Leaves = dict[str, Any]  # {key: array or ShapeDtypeStruct}
Shapes = dict[str, list]  # {key: [dtype, shape]}, as JSON


def items(state: TrainState) -> dict[str, Leaves]:
    """{item: leaves}: parameters under their own paths, the others under their key paths."""
    return {"params": state.params, "opt": flatten(state.opt), "rest": flatten(_rest(state))}


def assemble(like: TrainState, found: dict[str, Leaves]) -> TrainState:
    """The inverse of `items`; the nesting is that of `like`."""
    rest = unflatten(_rest(like), found["rest"])
    return TrainState(params=found["params"], opt=unflatten(like.opt, found["opt"]), **rest)


def _rest(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in ("step", "position", "tokens", "aux")}


def flatten(tree: Any) -> Leaves:
    """{key path: leaf}; parts without leaves (empty dicts, optax.EmptyState) leave no trace."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def unflatten(like: Any, leaves: Leaves) -> Any:
    """`leaves` in the nesting of `like`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    return structure.unflatten([leaves[jax.tree_util.keystr(path)] for path, _ in paths])


def shapes(leaves: Leaves) -> Shapes:
    return {key: [np.dtype(leaf.dtype).name, list(leaf.shape)] for key, leaf in leaves.items()}


def aux_keys(saved: Shapes, name: str) -> dict[str, str]:
    """{path: key in the item `rest`} of the flat dict `name` in the state's aux."""
    prefix = f"['aux'][{name!r}]['"
    return {key[len(prefix) : -len("']")]: key for key in saved if key.startswith(prefix)}


def differences(saved: Shapes, leaves: Leaves) -> list[str]:
    """A phrase for every leaf that is missing, not asked for, or of another shape or dtype."""
    wanted = shapes(leaves)
    missing = [f"{key} is missing" for key in wanted if key not in saved]
    extra = [f"{key} is not asked for" for key in saved if key not in wanted]
    other = [
        f"{key} is {_spell(saved[key])} but {_spell(wanted[key])} is asked for"
        for key in wanted
        if key in saved and saved[key] != wanted[key]
    ]
    return missing + extra + other


def misfits(saved: dict[str, Shapes], wanted: dict[str, Leaves]) -> list[str]:
    """`differences` of several items, which each phrase begins with."""
    return [
        f"{item}: {phrase}"
        for item, leaves in wanted.items()
        for phrase in differences(saved[item], leaves)
    ]


def _spell(entry: list) -> str:
    dtype, shape = entry
    return f"{dtype}[{' '.join(map(str, shape))}]"


def placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """`leaf` with a sharding: its own, otherwise the first local device."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
