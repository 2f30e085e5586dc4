"""Pictures of attention before and after a conversion's first run.

`<out>/pictures` gets a PNG a layer, with the weights of a few heads on the first held-out row: of
the teacher, of the student whose maps know nothing yet, and of the one that has learned. The event
files beside them show TensorBoard the same, before at step 0.
"""

import pathlib
import shutil
import sys

import numpy as np

from analysis.attention import picture
from launch.attention import reporter
from parallel.rules import ways
from training.adapter import start
from training.events import EventFile
from training.run import Run

HEADS, TOKENS = 4, 128  # shown at most
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
    sizes = dict(rows=ways(job.mesh, "batch"), tokens=TOKENS)
    report = reporter(job.program, job.data, job.mesh, job.config["model"], **sizes)
    before = report(params | start(maps, job.config["seed"]))
    seen = {"before": before, "after": report(params)}
    try:
        _write(drawing, seen, job.config["steps"])
    except ImportError as error:
        print(f"note: {error}", file=sys.stderr)
        shutil.rmtree(drawing)
        return
    drawing.rename(out / FOLDER)


def _write(folder: pathlib.Path, seen: dict, steps: int) -> None:
    events = EventFile(folder / "tb", 0)
    for layer, both in seen["before"].items():
        heads = _some(both[0].shape[1])
        teacher, before, after = (x[0, heads] for x in (*both, seen["after"][layer][1]))
        name = f"layer_{layer:02d}"
        columns = {"teacher": teacher, "before": before, "after": after}
        (folder / f"{name}.png").write_bytes(picture(columns, f"layer {layer}", heads))
        for step, student in ((0, before), (steps, after)):
            image = picture({"teacher": teacher, "student": student}, f"layer {layer}", heads)
            events.image(step, f"attention/{name}", image)
    events.close()


def _some(H: int) -> np.ndarray:
    """Numbers of the heads that are shown, of H."""
    return np.linspace(0, H - 1, min(H, HEADS)).round().astype(int)
