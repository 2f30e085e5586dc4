"""What saving costs: steps with asynchronous and synchronous saves beside steps without any.

Blocks of steps in one process, in a random order every turn: no save; a save after the first step
of a block of `every` steps; a save after every step of a shorter block. Steps follow each other as
in training/loop.py, on a batch that lies on the device, and saves are those of
training/checkpoint.py, hashing and retention included. Wanted: at most 1 % more time a step with
asynchronous saves.

A block ends with its last step and not with its last save, which is waited for between blocks,
outside of any clock. So a save after the first of many steps costs those steps all that it takes
from them, the writer's share of the cores included, unless it outlasts the block; of the saves
after every step, the last one is partly left out. The report says how often and how much.
"""

import contextlib
import dataclasses
import pathlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

import jax

import data.pipeline
from launch.bench import measure
from launch.bench.measure import Report, Row
from launch.bench.pair import resolve
from launch.schema import UsageError
from parallel import mesh as meshes
from training.program import build as build_program

MOST = 1.01  # of the time of a step without saves
KEEP = 3
NONE, ASYNC, SYNC = "none", "asynchronous", "synchronous"


def bench(
    *,
    config: str = "quickstart",  # a configuration that differs from the quickstart in sizes
    every: int = 100,  # steps between two saves
    short: int = 10,  # steps of a block that saves after every one
    repetitions: int = 20,  # blocks of each sort
    folder: str | None = None,  # where to save; none for the system's temporary folder
) -> Report:
    """Every row of the report. Raises UsageError."""
    for name, count in {"every": every, "short": short, "repetitions": repetitions}.items():
        if count < 1:
            raise UsageError(f"--{name} must be at least 1, not {count}")
    try:
        import orbax.checkpoint  # noqa: F401 (late: machines that only measure may lack it)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed, and checkpoints are written by it; uv sync installs it"
        ) from None
    resolved, progress = resolve(config), measure.Progress("checkpoint")
    with contextlib.closing(progress), tempfile.TemporaryDirectory(dir=folder) as place:
        progress("compiling the step")
        with Steps(resolved, pathlib.Path(place)) as steps:
            turns = list(taken(steps, every, short, repetitions, progress))
            size, files = steps.size()
    title = f"checkpoint; {pathlib.Path(config).stem}, {size / 1e6:.1f} MB in {files} files, "
    title += f"1 x {jax.devices()[0].device_kind}, jax {jax.__version__}"
    return Report(title, rows(turns, every, size), notes(turns, every, short), resolved)


@dataclasses.dataclass(frozen=True)
class Save:
    """Seconds. blocked: that the loop waited.  cpu: of all threads of the process meanwhile."""

    blocked: float
    cpu: float


@dataclasses.dataclass(frozen=True)
class Block:
    """step: seconds a step.  saves: in their order.

    committed: seconds from the call of the last save until its checkpoint was finished.  late: of
    them those after the block's end.
    """

    step: float
    saves: tuple[Save, ...] = ()
    committed: float = 0.0
    late: float = 0.0


Turn = Mapping[str, Block]  # by name: none, or how it saves and after how many steps


class Steps:
    """The configuration's program, which takes steps and saves its state below `folder`."""

    def __init__(self, config: Mapping, folder: pathlib.Path):
        from training.checkpoint import Checkpoints

        corpus = data.pipeline.build(seed=config["seed"], **config["data"])
        self._mesh = meshes.make(jax.devices()[:1], **config["mesh"])
        program = build_program(config, self._mesh, corpus.vocab_size)
        homes = jax.tree.map(lambda like: like.sharding, program.batch)
        with jax.set_mesh(self._mesh):
            self._state = program.init()
            self._batch = jax.device_put(corpus.batch(0), homes)
        self._step = program.step
        self._checkpoints = Checkpoints(folder, keep=KEEP)

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *exc) -> None:
        self._checkpoints.close()

    def block(self, count: int, every: int | None = None, how: str = ASYNC) -> Block:
        """Takes `count` steps and saves after the first of every `every` of them."""
        saves, pending, saved, called = [], None, 0, 0.0
        with jax.set_mesh(self._mesh):
            began = time.perf_counter()
            for i in range(count):
                self._state, said = self._step(self._state, self._batch)
                if pending is not None:
                    float(pending["loss"])  # One step late, as the loop reads it.
                pending = said
                if every is not None and i % every == 0:
                    float(pending["loss"])
                    pending, saved, called = None, int(self._state.step), time.time()
                    saves.append(self._save(how))
            jax.block_until_ready(self._state)
            ended, step = time.time(), (time.perf_counter() - began) / count
        if not saves:
            return Block(step)
        self._checkpoints.wait()
        # The number of a finished checkpoint is given to its folder last.
        committed = (self._checkpoints.folder / str(saved)).stat().st_ctime
        return Block(step, tuple(saves), committed - called, max(0.0, committed - ended))

    def _save(self, how: str) -> Save:
        began, cpu = time.perf_counter(), time.process_time()
        self._checkpoints.save(self._state, {})
        if how == SYNC:
            self._checkpoints.wait()
        return Save(time.perf_counter() - began, time.process_time() - cpu)

    def size(self) -> tuple[int, int]:
        """Bytes and number of files of the last checkpoint."""
        folder = max(self._checkpoints.folder.glob("[0-9]*"), key=lambda path: path.stat().st_ctime)
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        return sum(sizes), len(sizes)


def taken(
    steps: Steps, every: int, short: int, repetitions: int, progress: Callable[[str], None]
) -> Iterator[Turn]:
    """Turns of a block of each sort, in an order drawn anew; a turn before them is not kept."""
    ways = {NONE: lambda: steps.block(every)}
    for how in (ASYNC, SYNC):
        ways[f"{how}, seldom"] = lambda how=how: steps.block(every, every, how)
        ways[f"{how}, always"] = lambda how=how: steps.block(short, 1, how)
    drawn = random.Random(0)
    for turn in range(-1, repetitions):
        found = {}
        for name in drawn.sample(list(ways), len(ways)):
            progress(f"{name}, {'warm-up' if turn < 0 else f'{turn + 1} of {repetitions}'}")
            found[name] = ways[name]()
        if turn >= 0:
            yield found


def rows(turns: list[Turn], every: int, size: int) -> list[Row]:
    """The report's rows; `size` bytes a checkpoint."""
    of = lambda name: [turn[name] for turn in turns]
    still = [1e3 * block.step for block in of(NONE)]
    found = []
    for name, period in {"seldom": f"every {every} steps", "always": "every step"}.items():
        for how in (ASYNC, SYNC):
            spent = [1e3 * block.step for block in of(f"{how}, {name}")]
            most = MOST if (how, name) == (ASYNC, "seldom") else None
            found.append(Row(f"step, {how} save {period}", "ms", spent, still, most=most))
    both = [of(f"{how}, seldom") for how in (ASYNC, SYNC)]
    blocked = [[1e3 * block.saves[0].blocked for block in blocks] for blocks in both]
    committed = [[1e3 * block.committed for block in blocks] for blocks in both]
    found.append(Row("a save keeps the loop", "ms", *blocked))
    if waits := [_after_another(block) for block in of(f"{ASYNC}, always") if block.saves[1:]]:
        found.append(Row("    while the one before is written", "ms", waits))
    found.append(Row("    until it is finished", "ms", *committed))
    rates = [[size / 1e3 / spent for spent in spans] for spans in committed]
    found.append(Row("    written", "MB/s", *rates))
    cpu = [1e3 * block.saves[0].cpu for block in both[1]]
    return [*found, Row("    processor time, no step beside it", "ms", cpu)]


def _after_another(block: Block) -> float:
    """Milliseconds that a save takes which has to wait for the one before."""
    return 1e3 * statistics.median(save.blocked for save in block.saves[1:])


def notes(turns: list[Turn], every: int, short: int) -> list[str]:
    """What the figures mean and leave out."""
    blocks = {"seldom": f"{every} steps with one asynchronous save"}
    blocks["always"] = f"{short} steps with an asynchronous save each"
    return [
        "beside steps with saves are steps without; beside asynchronous saves, synchronous ones, "
        "which keep the loop until an old checkpoint is removed too",
        *(_late([turn[f"{ASYNC}, {name}"] for turn in turns], of) for name, of in blocks.items()),
    ]


def _late(blocks: list[Block], of: str) -> str:
    late = [1e3 * block.late for block in blocks if block.late > 0]
    more = f", and it took {statistics.median(late):.0f} ms more (median)" if late else ""
    return (
        f"{of}: the last save was under way at the end of {len(late)} of {len(blocks)} "
        f"blocks{more}; no step pays for what a save does after its block"
    )
