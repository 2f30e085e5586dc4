"""Checkpoints on Orbax: asynchronous saving, retention, restoring onto any mesh.

A step is a folder `<workdir>/checkpoints/<step>` with the items `params`, `opt`, `rest` (step,
position, tokens, aux) and `meta` (JSON). The arrays are saved as flat dicts {key: array}, so that
the nesting of an optimizer's state never matters to the file, and the table of their shapes is
in `meta`, so that a state that does not fit is reported key by key before any array is read.
"""

import json
import pathlib
from typing import Any

import jax

from training.leaves import assemble, aux_keys, differences, items, placed, shapes
from training.quiet import orbax
from training.state import TrainState

# Orbax writes this file last, also where a folder cannot be renamed atomically.
COMMITTED = "commit_success.txt"
NAMED = 20  # leaves listed in one error


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found, or made to fit; one sentence with the path."""


class Checkpoints:
    """The checkpoints of one run.

    keep: how many of the latest stay (None: all). keep_every: steps divisible by it stay too.
    Reading touches nothing on disk and may run beside a training process; the first `save` also
    removes what an interrupted save left behind. In a multi-host run every host calls `save`,
    `wait`, `restore` and `close`.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
    ):
        if keep is not None and keep < 1:
            raise CheckpointError(f"keep must be at least 1 or none, not {keep}")
        if keep_every is not None and keep_every < 1:
            raise CheckpointError(f"keep_every must be at least 1 or none, not {keep_every}")
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._keep, self._keep_every = keep, keep_every
        self._manager = None

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts writing `state`; waits first for the previous save, if one is running.

        Returns once every array is copied to the host, so that the caller may donate or
        overwrite them. `meta` is any JSON; `shapes`, {item: {key: [dtype, shape]}}, is added.
        Raises CheckpointError if the previous save failed or this step is there already.
        """
        self.wait()
        step = int(state.step)
        if (self.folder / str(step)).exists():
            raise CheckpointError(
                f"step {step} is already in {self.folder}: remove it to save it again"
            )
        parts = items(state)
        meta = _json({**meta, "shapes": {name: shapes(part) for name, part in parts.items()}})
        try:
            self._start(step, parts, meta)
        except Exception as error:
            raise self._failed(f"cannot save step {step}", error) from error

    def _start(self, step: int, parts: dict[str, dict[str, Any]], meta: dict[str, Any]) -> None:
        ocp = orbax()
        if self._manager is None:
            self._manager = _manager(self.folder, self._keep, self._keep_every)
        args = {name: ocp.args.PyTreeSave(part) for name, part in parts.items() if part}
        args["meta"] = ocp.args.JsonSave(meta)
        # force: whether to save is the loop's decision, not Orbax's.
        self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def wait(self) -> None:
        """Returns when no save is running. Raises CheckpointError if the last one failed."""
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                raise self._failed("the last save failed", error) from error

    def close(self) -> None:
        """Waits for a running save and ends Orbax's threads. A later save opens them again."""
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except Exception as error:
                raise self._failed("the last save failed", error) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The finished checkpoints, ascending; a save still running is not among them."""
        if not self.folder.is_dir():
            return []
        return sorted(
            int(path.name)
            for path in self.folder.iterdir()
            if path.name.isdecimal()
            and (path / COMMITTED).is_file()
            and (path / "meta" / "metadata").is_file()
        )

    def latest(self) -> int | None:
        """The last finished checkpoint, or None."""
        return max(self.steps(), default=None)

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The JSON saved with `step` (the latest if None), `shapes` included."""
        path = self._path(step) / "meta" / "metadata"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise self._failed(f"{path} cannot be read", error) from error

    def restore(
        self, step: int | None, abstract_state: TrainState
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state of `step` (the latest if None) and its meta.

        abstract_state: a TrainState of ShapeDtypeStructs (or arrays), whose shardings say where
        each leaf goes, on whatever mesh; a leaf without one goes to the first local device.
        Raises CheckpointError if there is no such step, or names every leaf that is missing,
        not asked for, or of another shape or dtype.
        """
        path, meta = self._path(step), self.meta(step)
        wanted = items(abstract_state)
        _check(path, {name: differences(meta["shapes"][name], wanted[name]) for name in wanted})
        found = {name: self._read(path / name, part) for name, part in wanted.items()}
        return assemble(abstract_state, found), meta

    def restore_params(
        self,
        step: int | None = None,
        abstract: dict[str, Any] | None = None,
        *,
        aux: str | None = None,
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The parameters of `step` alone and its meta; optimizer state is never opened.

        abstract: {path: ShapeDtypeStruct} as in `restore`; None takes what was saved to the
        first local device. aux: a flat dict in the state's aux (such as 'ema') instead.
        """
        path, meta = self._path(step), self.meta(step)
        item, saved = "params", meta["shapes"]["params"]
        keys = {name: name for name in saved}
        if aux is not None:
            item, saved = "rest", meta["shapes"]["rest"]
            keys = aux_keys(saved, aux)
        saved = {name: saved[key] for name, key in keys.items()}
        if abstract is None:
            abstract = {k: jax.ShapeDtypeStruct(s, dtype) for k, (dtype, s) in saved.items()}
        _check(path, {aux or item: differences(saved, abstract)})
        found = self._read(path / item, {keys[name]: leaf for name, leaf in abstract.items()})
        return {name: found[keys[name]] for name in abstract}, meta

    def _path(self, step: int | None) -> pathlib.Path:
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"no finished checkpoint in {self.folder}")
        if step is not None and step not in steps:
            listed = ", ".join(map(str, steps))
            raise CheckpointError(f"no checkpoint of step {step} in {self.folder}, only {listed}")
        return self.folder / str(steps[-1] if step is None else step)

    def _read(self, path: pathlib.Path, leaves: dict[str, Any]) -> dict[str, jax.Array]:
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
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                return reader.restore(path, args=args)
        except Exception as error:
            raise self._failed(f"{path} cannot be read", error) from error

    def _failed(self, what: str, error: Exception) -> CheckpointError:
        lines = str(error).strip().splitlines() or [""]
        return CheckpointError(f"{what} ({self.folder}): {type(error).__name__}: {lines[0]}")


def _manager(folder: pathlib.Path, keep: int | None, keep_every: int | None):
    ocp = orbax()
    policies = ocp.checkpoint_managers
    kept = [policies.LatestN(keep)]
    if keep_every is not None:
        kept.append(policies.EveryNSteps(keep_every))
    policy = policies.AnyPreservationPolicy(kept)
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policy, cleanup_tmp_directories=True
        ),
    )


def _check(path: pathlib.Path, wrong: dict[str, list[str]]) -> None:
    phrases = [f"{item}: {phrase}" for item, phrases in wrong.items() for phrase in phrases]
    if phrases:
        more = f"; and {len(phrases) - NAMED} more" if len(phrases) > NAMED else ""
        raise CheckpointError(f"{path} does not fit: {'; '.join(phrases[:NAMED])}{more}")


def _json(meta: dict[str, Any]) -> dict[str, Any]:
    """A copy in plain JSON types: Orbax writes it later, from another thread."""
    try:
        return json.loads(json.dumps(meta))
    except TypeError as error:
        raise CheckpointError(f"the meta of a checkpoint must be JSON: {error}") from error
