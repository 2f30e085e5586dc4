"""Where a run begins: at the start, or where an earlier one of the same configuration stopped."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator, Mapping

import jax

from training.checkpoint import CheckpointError, Checkpoints
from training.metrics import dotted
from training.run import Run
from training.state import TrainState

# What may change when a run goes on: none of it decides what a row is or what is computed from it.
# Sources are free because the corpus has its fingerprint.
FREE = ("steps", "train.", "mesh.", "data.batch_size", "data.micro_batches", "data.prefetch")
FREE += ("data.workers", "model.remat", "model.unroll", "data.source")


def begin(checkpoints: Checkpoints, job: Run) -> tuple[TrainState, int]:
    """The latest checkpoint's state and step, or the initial ones.

    Raises CheckpointError for a run of another configuration or corpus.
    """
    if checkpoints.latest() is None:
        return job.program.init(), 0
    header = checkpoints.meta()["header"]
    _refuse_changes(header["config"], job)
    old, new = header["fingerprint"], job.header["fingerprint"]
    if old != new:
        raise CheckpointError(
            f"the corpus is not the one {job.workdir} was trained on: its fingerprint is {new} and "
            f"was {old}; restore the corpus or choose another --workdir"
        )
    state, _ = checkpoints.restore(None, job.program.state)
    return state, int(state.step)


def _refuse_changes(old: Mapping, job: Run) -> None:
    old, new = (dict(dotted(config)) for config in (old, job.header["config"]))
    changed = [key for key in old | new if old.get(key) != new.get(key)]
    changed = [key for key in changed if not key.startswith(FREE)]
    if changed:
        told = ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise CheckpointError(
            f"{job.workdir} holds a run of another configuration ({told}{more}); "
            f"undo that or choose another --workdir"
        )


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps a second run out of the folder while this process lives."""
    if jax.process_index() != 0:
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another run is writing to {workdir}; wait for it or choose another --workdir"
            ) from None
        yield
