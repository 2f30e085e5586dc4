"""Checkpoints on Orbax that cannot lie: saved in the background, verified before they are opened.

A step is a folder `<workdir>/checkpoints/<step>` with the items `params`, `opt`, `rest` (step,
position, tokens, aux) and `meta` (JSON), and a manifest of all its files (training/manifest.py).
The arrays are saved as flat dicts {key: array}, so that the nesting of an optimizer's state never
matters to the file, and the table of their shapes is in `meta`, so that a state that does not fit
is reported key by key before any array is read. Nothing in a step is ever unpickled.
"""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax

from training.leaves import assemble, aux_keys, items, misfits, placed, shapes
from training.manifest import told
from training.quiet import cause, orbax, together
from training.saver import Saver
from training.state import TrainState
from training.steps import CheckpointError
from training.verified import Items, Verified

__all__ = ["READING", "CheckpointError", "Checkpoints"]
NAMED = 20  # leaves listed in one error
# What is opened by those that only want parameters, averaged or not.
READING = ("params", "rest", "meta")


class Checkpoints:
    """The checkpoints of one run.

    keep: how many of the latest stay (None: all). keep_every: steps divisible by it stay too.
    trust: open steps without verifying them, and those that have no manifest.
    Reading touches nothing on disk and may run beside a training process; a `save` also removes
    what an interrupted save left behind. Where a step is asked for, None is the newest sound one.
    In a multi-host run every host makes the same calls; the first one verifies for all.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        trust: bool = False,
    ):
        if keep is not None and keep < 1:
            raise CheckpointError(f"keep must be at least 1 or none, not {keep}")
        if keep_every is not None and keep_every < 1:
            raise CheckpointError(f"keep_every must be at least 1 or none, not {keep_every}")
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._steps = Verified(self.folder, trust=trust)
        self._saver = Saver(self._steps, keep=keep, keep_every=keep_every)

    def probe(self) -> None:
        """Raises CheckpointError where a save would fail because the folder cannot be written."""
        self._steps.probe()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts writing `state`; waits first for the previous save, if one is running.

        Returns once every array is copied to the host, so that the caller may donate or
        overwrite them. `meta` is any JSON; `shapes`, {item: {key: [dtype, shape]}}, is added.
        Raises CheckpointError if the previous save failed or this step is there already; one that
        is damaged is replaced, and what else has its name is set aside.
        """
        self.wait()
        parts = items(state)
        meta = _json({**meta, "shapes": {name: shapes(part) for name, part in parts.items()}})
        ocp = orbax()
        args = {name: ocp.args.PyTreeSave(part) for name, part in parts.items() if part}
        self._saver.start(int(state.step), args | {"meta": ocp.args.JsonSave(meta)})

    def wait(self) -> None:
        """Returns when no save is running. Raises CheckpointError if the last one failed."""
        self._saver.wait()

    def close(self) -> None:
        """Waits for a running save and ends Orbax's threads. A later save opens them again."""
        self._saver.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *exc) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            # Whatever ended the run comes first.
            print(f"note: {error}", file=sys.stderr)

    def steps(self) -> list[int]:
        """The finished checkpoints, ascending and unverified; a running save is not among them."""
        return self._steps.finished()

    def latest(self, items: Items = None) -> int | None:
        """The newest sound checkpoint; None if there is nothing that looks like one.

        items: those whose files are verified, all if None. A step that is skipped is told on
        stderr, once. Raises CheckpointError if there are steps and none is sound.
        """
        return self._steps.latest(items)

    def newest(self, read: Callable[[int], Any], items: Items = None) -> Any:
        """read(step) of the newest sound step; of a newer one if that is removed meanwhile.

        items: as for `latest`. Raises CheckpointError if there is no checkpoint.
        """
        return self._steps.newest(read, items)

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The JSON saved with `step`, `shapes` included."""
        if step is None:
            return self.newest(self.meta)
        return self._steps.opened(step, ("meta",), _meta)

    def restore(
        self, step: int | None, abstract_state: TrainState
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state of `step` and its meta.

        abstract_state: a TrainState of ShapeDtypeStructs (or arrays), whose shardings say where
        each leaf goes, on whatever mesh; a leaf without one goes to the first local device.
        Raises CheckpointError if there is no such step or it is not sound, or names every leaf
        that is missing, not asked for, or of another shape or dtype.
        """
        if step is None:
            return self.newest(lambda newest: self.restore(newest, abstract_state))
        wanted = items(abstract_state)

        def read(path: pathlib.Path) -> tuple[TrainState, dict[str, Any]]:
            meta = _meta(path)
            _check(path, misfits(meta["shapes"], wanted))
            found = {name: _read(path / name, part) for name, part in wanted.items()}
            return assemble(abstract_state, found), meta

        return self._steps.opened(step, None, read)

    def restore_params(
        self,
        step: int | None = None,
        abstract: dict[str, Any] | None = None,
        *,
        aux: str | None = None,
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The parameters of `step` alone and its meta; optimizer state is never opened.

        abstract: {path: ShapeDtypeStruct} as in `restore`; None takes what was saved to the
        first local device. aux: a flat dict in the state's aux (such as 'ema') instead. Only the
        files that are opened for it are verified.
        """
        if step is None:
            return self.newest(
                lambda newest: self.restore_params(newest, abstract, aux=aux), READING
            )
        item = "params" if aux is None else "rest"

        def read(path: pathlib.Path) -> tuple[dict[str, jax.Array], dict[str, Any]]:
            meta = _meta(path)
            saved = meta["shapes"][item]
            keys = {name: name for name in saved} if aux is None else aux_keys(saved, aux)
            saved = {name: saved[key] for name, key in keys.items()}
            like = abstract
            if like is None:
                like = {k: jax.ShapeDtypeStruct(s, dtype) for k, (dtype, s) in saved.items()}
            _check(path, misfits({aux or item: saved}, {aux or item: like}))
            found = _read(path / item, {keys[name]: leaf for name, leaf in like.items()})
            return {name: found[keys[name]] for name in like}, meta

        return self._steps.opened(step, (item, "meta"), read)


def _meta(path: pathlib.Path) -> dict[str, Any]:
    path = path / "meta" / "metadata"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {cause(error)}") from error


def _read(path: pathlib.Path, leaves: dict[str, Any]) -> dict[str, jax.Array]:
    if not leaves:
        return {}
    ocp = orbax()
    leaves = {key: placed(leaf) for key, leaf in leaves.items()}
    args = ocp.args.PyTreeRestore(
        item=leaves,
        restore_args=ocp.checkpoint_utils.construct_restore_args(leaves),
        partial_restore=True,
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), **together()) as reader:
            return reader.restore(path, args=args)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {cause(error)}") from error


def _check(path: pathlib.Path, wrong: list[str]) -> None:
    if wrong:
        raise CheckpointError(f"{path} does not fit: {told(wrong, NAMED)}")


def _json(meta: dict[str, Any]) -> dict[str, Any]:
    """A copy in plain JSON types: Orbax writes it later, from another thread."""
    try:
        return json.loads(json.dumps(meta))
    except TypeError as error:
        raise CheckpointError(f"the meta of a checkpoint must be JSON: {error}") from error
