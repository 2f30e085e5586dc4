"""Pictures of attention before and after a conversion's first run.

`<out>/pictures` gets a PNG a layer, with the weights of a few heads on the first held-out row: of
the teacher, of the student whose maps know nothing yet, and of the one that has learned. The event
files beside them show TensorBoard the same, before at step 0.
"""

import pathlib
import shutil
import sys
from collections.abc import Callable

import jax
import numpy as np

from analysis.attention import picture
from models.context import of_batch
from models.layering import Layering
from parallel.rules import ways
from training.adapter import start
from training.evaluate import place
from training.events import EventFile
from training.run import Run

HEADS, TOKENS = 4, 128  # shown at most
OF_TOKENS = ("inputs", "targets", "weights", "segment_ids", "positions")
FOLDER = "pictures"


def drawn(out: pathlib.Path) -> bool:
    """Whether the pictures are there, or nothing could draw them."""
    return (out / FOLDER).is_dir()


def draw(job: Run, params: dict, out: pathlib.Path) -> None:
    """job: the first run.  params: after it. Without matplotlib a sentence on stderr says so."""
    drawing = out / f"{FOLDER}.tmp"
    shutil.rmtree(drawing, ignore_errors=True)
    drawing.mkdir(parents=True)
    # All but the maps is as it was, and where they begin is declared.
    maps = {path: job.program.table[path] for path in job.program.state.params}
    report = _reporter(job)
    before = report(params | start(maps, job.config["seed"]))
    seen = {"before": _by_layer(job, before), "after": _by_layer(job, report(params))}
    try:
        _write(drawing, seen, job.config["steps"])
    except ImportError as error:
        print(f"note: {error}", file=sys.stderr)
        shutil.rmtree(drawing)
        return
    drawing.rename(out / FOLDER)


def _write(folder: pathlib.Path, seen: dict, steps: int) -> None:
    events = EventFile(folder / "tb", 0)
    for layer, (teacher, before) in seen["before"].items():
        after, name = seen["after"][layer][1], f"layer_{layer:02d}"
        columns = {"teacher": teacher, "before": before, "after": after}
        (folder / f"{name}.png").write_bytes(picture(columns, f"layer {layer}"))
        for step, student in ((0, before), (steps, after)):
            image = picture({"teacher": teacher, "student": student}, f"layer {layer}")
            events.image(step, f"attention/{name}", image)
    events.close()


def _by_layer(job: Run, reported: dict) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{layer: weights `[H L L]` of teacher and student}, of layers that can be taught."""
    layering, found = Layering.of(job.config["model"]), {}
    for path, array in reported.items():
        layers, name = layering.split(path)
        rows = array if layering.stacks(path) else array[None]
        for layer, row in zip(layers, rows, strict=True):
            H = row.shape[1]
            heads = np.linspace(0, H - 1, min(H, HEADS)).round().astype(int)
            found.setdefault(layer, {})[name] = row[0, heads]
    pair = lambda both: (both["mixer/teacher_weights"], both["mixer/student_weights"])
    return {layer: pair(found[layer]) for layer in sorted(found)}


def _reporter(job: Run) -> Callable[[dict], dict[str, np.ndarray]]:
    """params -> weights by path, `[B H L L]`, of layers stacked before that."""
    rows = ways(job.mesh, "batch")
    batch = next(iter(job.data.evaluation(rows, rows)))
    batch = batch._replace(**{name: getattr(batch, name)[:, :TOKENS] for name in OF_TOKENS})
    batch = place(batch, job.mesh)

    @jax.jit
    def run(params, batch):
        ctx = of_batch(batch, **job.program.context | {"taps": ("attention_weights",)})
        _, layers = job.program.model(params)(batch.inputs, ctx)
        return {path: x for path, x in layers.items() if path.endswith("_weights")}

    return lambda params: jax.device_get(run(params, batch))
