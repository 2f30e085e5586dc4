"""The weights of a model's linear attention beside those of softmax attention, layer by layer."""

from collections.abc import Callable

import jax
import numpy as np

from models.context import of_batch
from models.layering import Layering
from parallel.rules import ways
from training.evaluate import place

OF_TOKENS = ("inputs", "targets", "weights", "segment_ids", "positions")
# {layer: weights [B H L L] of softmax and of the model}, of layers that can imitate softmax
ByLayer = dict[int, tuple[np.ndarray, np.ndarray]]


def reporter(program, data, mesh, config, *, rows: int, tokens: int) -> Callable[[dict], ByLayer]:
    """params -> the weights on the first `tokens` of the first held-out rows.

    config: of the model. Raises ValueError for rows that do not divide over the devices.
    """
    if rows % ways(mesh, "batch"):
        raise ValueError(f"{rows} rows do not divide over {ways(mesh, 'batch')} devices")
    batch = next(iter(data.evaluation(rows, rows)))
    batch = batch._replace(**{name: getattr(batch, name)[:, :tokens] for name in OF_TOKENS})
    batch = place(batch, mesh)
    context = program.context | {"taps": ("attention_weights",)}

    @jax.jit
    def run(params, batch):
        _, layers = program.model(params)(batch.inputs, of_batch(batch, **context))
        return {path: x for path, x in layers.items() if path.endswith("_weights")}

    return lambda params: _by_layer(config, jax.device_get(run(params, batch)))


def _by_layer(config, reported: dict) -> ByLayer:
    layering, found = Layering.of(config), {}
    for path, array in reported.items():
        layers, name = layering.split(path)
        rows = array if layering.stacks(path) else array[None]
        for layer, row in zip(layers, rows, strict=True):
            found.setdefault(layer, {})[name] = row
    pair = lambda both: (both["mixer/teacher_weights"], both["mixer/student_weights"])
    return {layer: pair(found[layer]) for layer in sorted(found)}
