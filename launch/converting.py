"""The runs of a conversion, one after the other, and what came of them."""

import contextlib
import dataclasses
import json
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Mapping

import jax

from analysis.records import read as read_record
from launch import conversion, convert_pictures, provenance, report, setup, train
from launch.config import resolve
from launch.files import render
from launch.schema import UsageError
from training import loop, program, resume, start
from training.changes import Kind, by_kind, changes, told
from training.checkpoint import CheckpointError, Checkpoints
from training.evaluate import Score, held_out

STAGES = ("transfer", "tuned")
RESULT = "conversion.json"
BEFORE = {"teacher", "student"}
NAMES = {
    "teacher": "teacher",
    "student": "student before",
    "transfer": "after transfer",
    "tuned": "after tuning",
}


@dataclasses.dataclass
class Book:
    """conversion.json: what the teacher is, what was converted, and the scores so far."""

    path: pathlib.Path
    facts: dict
    losses: dict

    @classmethod
    def open(cls, path: pathlib.Path, facts: dict) -> "Book":
        """Raises ValueError where it is damaged."""
        try:
            held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            return cls(path, facts, dict(held.get("losses", {})))
        except (ValueError, AttributeError):
            raise ValueError(f"{path} is damaged; delete it and run again") from None

    def note(self, name: str, score: Score) -> None:
        """Kept at once: what comes later may be stopped."""
        self.losses[name] = score.values() | {"targets": score.targets}
        half = self.path.with_suffix(".tmp")
        text = json.dumps(self.facts | {"losses": self.losses}, indent=1)
        half.write_text(text + "\n", encoding="utf-8")
        half.replace(self.path)

    def table(self) -> str:
        """A line a model: nats a token, and bits a byte where there is text."""
        lines = [f"{'held-out':<16}{'loss':>8}{'bits a byte':>14}"]
        for name, words in NAMES.items():
            if name in self.losses:
                bits = self.losses[name].get("bits_per_byte")
                spelled = f"{bits:>14.4f}" if bits is not None else ""
                lines.append(f"{words:<16}{self.losses[name]['loss']:>8.4f}{spelled}")
        return "\n".join(lines)


def convert(given: Mapping, overrides: Mapping[str, str], again: str) -> str:
    """What is said at the end.  given: the values of all flags.  again: the command.

    Raises ValueError in one sentence for what does not fit, before anything is written.
    """
    teacher, out = pathlib.Path(given["workdir"]), pathlib.Path(given["out"])
    if out.resolve() == teacher.resolve():
        raise ValueError(f"--out {out} is the teacher's own folder; choose another")
    if any((out / name).exists() for name in ("checkpoints", "metrics.jsonl")):
        raise ValueError(f"--out {out} is the folder of a training run; choose another")
    with Checkpoints(teacher, trust=given["trust"]) as checkpoints:
        header = checkpoints.meta()["header"]
    plan, stages = _stages(start.tuples(header["config"]), given, overrides)
    begun = [_refuse_another(out / name, config) for name, config in stages.items()]
    if begun[1] and begun[1]["step"] != stages["transfer"]["steps"]:
        raise ValueError(
            f"{out / 'tuned'} began with step {begun[1]['step']} of transfer, which would now end "
            f"at {stages['transfer']['steps']}; undo that or choose another --out"
        )
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(resume.lock(out))
        except CheckpointError:
            raise ValueError(
                f"another conversion is at work in {out}; wait for it or choose another --out"
            ) from None
        return _convert(plan, stages, teacher, out, given, again)


def _convert(plan, stages: Mapping, teacher: pathlib.Path, out: pathlib.Path, given, again) -> str:
    for name, config in stages.items():
        (out / f"{name}.txt").write_text(render(config), encoding="utf-8")
    if given["print"]:
        return "\n".join(_command(out, name) for name in STAGES)
    model = {key: stages["tuned"]["model"][key] for key in ("prefix", "pattern", "suffix")}
    facts = {"command": again, "teacher": str(teacher), "layers": plan.layers, "model": model}
    facts |= {"commit": provenance.commit(), "versions": provenance.versions()}
    book = Book.open(out / RESULT, facts)
    for name, config in stages.items():
        stopped = _stage(name, config, out, book, given["trust"])
        if stopped is not None:
            return f"{stopped}; to go on: {again}"
    folder = shlex.quote(str(out))
    return "\n".join(
        [
            book.table(),
            f"student:      uv run generate --workdir {folder}/tuned --prompt 'def '",
            f"layers:       uv run tensorboard --logdir {folder}",
        ]
    )


def _command(out: pathlib.Path, name: str) -> str:
    config, folder = str(out / f"{name}.txt"), str(out / name)
    return shlex.join(["uv", "run", "train", "--config", config, "--workdir", folder])


def _stages(teacher: Mapping, given: Mapping, overrides: Mapping[str, str]):
    """The plan, and the resolved configuration of each run."""
    try:
        folders = (str(pathlib.Path(given[name])) for name in ("workdir", "out"))
        plan = conversion.plan(teacher, *folders, given)
    except UsageError as error:
        raise ValueError(str(error)) from None
    with tempfile.TemporaryDirectory() as folder:
        return plan, {name: _resolved(name, plan, overrides, folder) for name in STAGES}


def _resolved(name: str, plan: conversion.Conversion, overrides, folder: str) -> dict:
    path = pathlib.Path(folder) / f"{name}.txt"
    path.write_text(render(getattr(plan, name)), encoding="utf-8")
    try:
        return resolve(str(path), overrides)
    except UsageError as error:
        raise ValueError(f"{name}: {error}") from None


def _refuse_another(folder: pathlib.Path, config: Mapping) -> dict | None:
    """What the run that is there began with; None where nothing is there.

    Raises ValueError where it is of another conversion.
    """
    record = read_record(folder)
    if record is None:
        return None
    changed = changes(record.headers[0]["config"], json.loads(json.dumps(config)))
    kinds = by_kind(changed)
    del kinds[Kind.HARMLESS]
    other = {key: both for changed in kinds.values() for key, both in changed.items()}
    if len({pathlib.Path(x).resolve() for x in changed.get("start", [])}) > 1:
        other["start"] = changed["start"]
    if other:
        raise ValueError(
            f"{folder} holds a run of another conversion{told(other)}; undo that or choose another "
            "--out"
        )
    return record.headers[-1].get("start")


def _stage(name: str, config: Mapping, out: pathlib.Path, book: Book, trust: bool) -> str | None:
    """Runs a stage, or goes on with it. Returns how it was stopped, None where it is finished."""
    folder, score = out / name, None
    first = name == STAGES[0]
    complete = not first or (convert_pictures.drawn(out) and book.losses.keys() >= BEFORE)
    if complete:
        score = loop.final(folder, config["steps"])
    if score is None:
        built = setup.build(config)
        job = train.prepare(built, folder, setup.header(built), trust=trust)
        if first:
            _before(job, book)
        print(f"{name}: {report.opening(built, job.header, folder)}", file=sys.stderr)
        outcome = loop.run(job)
        if outcome.step < config["steps"]:
            return f"stopped at step {outcome.step} of {config['steps']} of {name}, saved"
        score = outcome.score
        if first:
            convert_pictures.draw(job, program.parameters(outcome.state), out)
    book.note(name, score)
    return None


def _before(job: loop.Run, book: Book) -> None:
    """Scores the teacher, and the student whose maps have learned nothing, on the same rows."""
    if not job.data.holds_out():
        raise ValueError(
            "no document is held out to compare teacher and student on; raise the holdout of the "
            "source by --config.data.sources.NAME.holdout"
        )
    rows = job.program.batch.inputs.shape[1]
    score = lambda computed, params: held_out(computed, params, job.data, job.mesh, rows=rows)
    merged = lambda source: jax.jit(source.adapter.merged)(source.read(job.mesh))
    opened = lambda source: (source.config["model"], merged(source))
    model, params = start.opened(job.config["start"], job.data.tokenizer, opened, trust=job.trust)
    plain = {"trainable": None, "loss": {"name": "cross_entropy", "losses": {}}, "model": model}
    own = program.build(job.config | plain, job.mesh, job.data.tokenizer.vocab_size)
    book.note("teacher", score(own, params))
    state, _ = start.first(job, quiet=True)
    book.note("student", score(job.program, program.parameters(state)))
