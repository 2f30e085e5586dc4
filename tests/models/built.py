"""A language model with random weights, and packed rows for it."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from data.batch import Batch
from models.context import Context
from models.lm import LM
from models.param import restore, table
from parallel.rules import spec
from parallel.weight import Table

TINY = dict(vocab=29, length=12, d_model=16, layers=2, pattern=("attention",))
TINY |= dict(mixers={"attention": {"heads": 2}}, ffns={"swiglu": {"width": 24}})


@dataclasses.dataclass(frozen=True)
class Built:
    """model(params): the module.  params: numpy, every leaf moved off its start."""

    model: Callable
    params: dict
    table: Table

    def place(self) -> dict:
        """The parameters on the mesh at hand."""
        put = lambda path, leaf: jax.device_put(leaf, spec(*self.table[path].axes))
        return {path: put(path, leaf) for path, leaf in self.params.items()}


def build(seed=0, **changes) -> Built:
    """An LM of TINY's sizes with these changes. Nothing is compiled."""
    own = TINY | changes
    graph, state = nnx.split(nnx.eval_shape(lambda: LM(rngs=nnx.Rngs(0), **own)))
    entries = table(state)
    rng = np.random.default_rng(seed)
    # Zero starts (biases) and ones (scales) would hide mistakes in where they stand.
    params = {path: _draw(rng, entry) for path, entry in entries.items()}
    return Built(lambda params: nnx.merge(graph, restore(state, params)), params, entries)


def _draw(rng, entry):
    std = entry.weight.init[1] if entry.weight.init[0] == "normal" else 0.2
    start = 1.0 if entry.weight.init == ("ones",) else 0.0
    return np.float32(start + std * rng.normal(size=entry.shape))


def packed(lengths, length=12) -> tuple[np.ndarray, np.ndarray]:
    """segment_ids and positions int32 `[B L]` of rows that hold documents of these lengths."""
    segments = np.zeros((len(lengths), length), np.int32)
    positions = np.zeros_like(segments)
    for row, sizes in enumerate(lengths):
        start = 0
        for number, size in enumerate(sizes):
            segments[row, start : start + size] = number + 1
            positions[row, start : start + size] = np.arange(size)
            start += size
    return segments, positions


def rows(number, A, segments, positions, **fields) -> Batch:
    """Batch `[A b L]` of the rows of step `number`. fields: inputs, targets, weights `[B L]`."""
    B = len(segments)
    whole = Batch(
        segment_ids=segments,
        positions=positions,
        sample=np.stack([np.zeros(B), B * number + np.arange(B)], -1).astype(np.uint32),
        domain=np.zeros(B, np.int32),
        **fields,
    )
    return jax.tree.map(lambda x: x.reshape(A, B // A, *x.shape[1:]), whole)


def place(tree, like):
    """tree on the devices, laid out as `like` is."""
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), tree, like)


def context(segments, positions, **changes) -> Context:
    put = lambda x: jax.device_put(x, spec("batch", "length"))
    return Context(positions=put(positions), segment_ids=put(segments), **changes)


def close(actual, expected, tolerance=2e-5):
    """2e-5 of the largest value: sums of a few hundred float32 products in another order."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())
