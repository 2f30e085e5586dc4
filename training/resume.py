"""Where a run begins: at the start, or where an earlier one of the same configuration stopped."""

import contextlib
import fcntl
import pathlib
import sys
from collections.abc import Iterator, Mapping

import jax

from training import manifest, start
from training.changes import (
    LAYOUT,
    STRETCHING,
    WEIGHED,
    Changed,
    Kind,
    by_kind,
    changes,
    refusal,
    told,
)
from training.checkpoint import CheckpointError, Checkpoints
from training.leaves import items, misfits
from training.run import Run
from training.state import TrainState, to_int


def begin(checkpoints: Checkpoints, job: Run) -> tuple[TrainState, int, dict]:
    """The latest checkpoint's state and step, or the initial ones, and the header that follows.

    `corpora` in that header lists {"from_row", "fingerprint"} of every corpus trained on, and with
    a later one what of the configuration was `changed` for it, {key: [before, after]}; `changes`
    lists {"from_step", "changed"} of every other change that was accepted, and of those that
    stretch schedules; `start` is what training/start.py says of the first step. The data is given
    its saved state. Raises CheckpointError for a run of another configuration or corpus, and
    ValueError for a corpus that ends before the run does and a start that cannot be made.
    """
    new = dict(job.header)
    step = checkpoints.latest()
    if step is None:
        _enough_rows(job, 0, 0)
        state, begun = start.first(job)
        return state, 0, new | {"corpora": [_corpus(new, 0)]} | begun
    meta = checkpoints.meta(step)
    old = meta["header"]
    changed = changes(old["config"], new["config"])
    kinds = by_kind(changed, heard=job.data.hears == "validation")
    others = bool(kinds[Kind.CORPUS]) or old["fingerprint"] != new["fingerprint"]
    _refuse_shapes(meta["shapes"], changed, job)
    _refuse_changes(kinds, job)
    _refuse_tokenizer(old, job)
    _refuse_corpus(old, job)
    state, _ = checkpoints.restore(step, job.program.state)
    first, position = int(state.step), to_int(state.position)
    history = _history(old, kinds, others, job, first, position)
    _load(job, meta.get("data"), changed, others)
    _enough_rows(job, first, position)
    return state, first, new | history


def _history(
    old: Mapping, kinds: Mapping[Kind, Changed], others: bool, job: Run, first: int, position: int
) -> dict:
    """The header's `corpora` and `changes` with what is new, of which this tells.

    others: whether other rows follow, of another corpus or mixture.
    """
    corpora, past = old.get("corpora", [_corpus(old, 0)]), old.get("changes", [])
    harmless, rows = kinds[Kind.HARMLESS], kinds[Kind.CORPUS]
    if harmless and job.config["steps"] > first:
        _note(f"going on from step {first:,} with other keys{told(harmless)}")
    if others:
        of_data = lambda key: key.startswith("data.") and not LAYOUT.fullmatch(key)
        rows = rows | {key: both for key, both in harmless.items() if of_data(key)}
        corpora = [*corpora, _corpus(job.header, position) | {"changed": rows}]
        fingerprint = job.header["fingerprint"]
        _note(f"from row {position:,} on the corpus is {fingerprint}{told(rows)}")
    computed = kinds[Kind.CONFIG]
    stretched = {key: both for key, both in harmless.items() if STRETCHING.fullmatch(key)}
    if computed or stretched:
        past = [*past, {"from_step": first, "changed": computed | stretched}]
    if computed:
        _note(f"from step {first:,} on the configuration is another one{told(computed)}")
    begun = {"start": old["start"]} if "start" in old else {}
    return {"corpora": corpora} | ({"changes": past} if past else {}) | begun


def _corpus(header: Mapping, row: int) -> dict:
    return {"from_row": row, "fingerprint": header["fingerprint"]}


def _refuse_shapes(saved: Mapping, changed: Changed, job: Run) -> None:
    if wrong := misfits(saved, items(job.program.state)):
        raise CheckpointError(
            f"{job.workdir} holds a run of other shapes{told(changed)}; undo that or choose "
            f"another --workdir ({manifest.told(wrong)})"
        )


def _refuse_changes(kinds: Mapping[Kind, Changed], job: Run) -> None:
    flags = {Kind.CORPUS: job.accept_corpus, Kind.CONFIG: job.accept_config}
    wrong = refusal(kinds, {kind for kind, given in flags.items() if given})
    if wrong is not None:
        raise CheckpointError(f"{job.workdir} holds a run of another configuration{wrong}")


def _refuse_tokenizer(old: Mapping, job: Run) -> None:
    """Other ids would mean other text to the same parameters, whatever the flags say."""
    was, now = (header.get("tokenizer") for header in (old, job.header))
    if was is not None and was != now:
        raise CheckpointError(
            f"the tokenizer is not the one {job.workdir} was trained with: its fingerprint is "
            f"{now} and was {was}; restore it or choose another --workdir"
        )


def _refuse_corpus(old: Mapping, job: Run) -> None:
    was, now = old["fingerprint"], job.header["fingerprint"]
    if was != now and not job.accept_corpus:
        raise CheckpointError(
            f"the corpus is not the one {job.workdir} was trained on: its fingerprint is {now} and "
            f"was {was}; restore the corpus, choose another --workdir, or go on with "
            "--accept_corpus"
        )


def _load(job: Run, saved: Mapping | None, changed: Changed, accepted: bool) -> None:
    """Gives the data what it had heard; what does not fit an accepted corpus is left out."""
    if saved is None:
        return
    another = {key: both for key, both in changed.items() if WEIGHED.fullmatch(key)}
    try:
        if another:
            raise ValueError(f"the mixture is another one{told(another)}")
        job.data.load(saved)
    except ValueError as error:
        if not accepted:
            raise
        _note(f"the mixture's weights begin anew, because {error}")


def _note(text: str) -> None:
    if jax.process_index() == 0:
        print(f"note: {text}", file=sys.stderr)


def _enough_rows(job: Run, first: int, position: int) -> None:
    """Raises ValueError where the rows from `position` on end before the last step."""
    steps, rows, limit = job.config["steps"], job.config["data"]["batch_size"], job.data.limit
    if limit is None or steps <= first or position + (steps - first) * rows <= limit:
        return
    possible = first + max(0, limit - position) // rows
    raise ValueError(
        f"the corpus has nothing left after row {limit:,}, and steps={steps} would read "
        f"{(steps - first) * rows:,} rows from row {position:,} on; set steps to at most "
        f"{possible}, or raise data.domains.*.epochs"
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
