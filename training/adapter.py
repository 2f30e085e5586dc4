"""The form of an adapter: parameters beside the model's own, and what they make of its weights.

The model never hears of it. Its own parameters keep their names, shapes and starts, so weights of a
run without an adapter fit one with it.
"""

import dataclasses
import importlib
import zlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax import nnx

from models.param import start as start_of
from parallel.weight import Table


@dataclasses.dataclass(frozen=True)
class Adapter:
    """table: of the parameters that are added, by paths that the model does not have.

    bind(params): the model's own parameters from all parameters, as its layers are to read them:
    arrays, or what gives an array when it is read, `x[...]`. A layer reads its weights inside the
    loop over layers and under its remat, so what is computed there is held for one layer at a time.
    It must trace, and take abstract parameters too.
    """

    table: Table = dataclasses.field(default_factory=dict)
    bind: Callable[[dict], dict] = lambda params: params

    def merged(self, params: dict) -> dict:
        """The model's own parameters with the adapter worked in, float32 arrays."""
        return {path: weight[...] for path, weight in self.bind(params).items()}


def make(config: Mapping, table: Table) -> Adapter:
    """The adapter of a config's `adapter` for a model with this table; none adds nothing.

    Raises ValueError, in one sentence, for arguments that mean nothing for this model.
    """
    name = config.get("name")
    if name is None:
        return Adapter()
    module = importlib.import_module(f"training.adapters.{name}")
    return module.make(table, **config.get(name, {}))


def start(table: Table, seed: int) -> dict:
    """Parameters before training. Each is drawn by its own path, whatever others there are."""
    key = jax.random.key(seed)
    own = lambda path: jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))
    return {path: start_of(nnx.Rngs(own(path)), entry) for path, entry in table.items()}
