"""A small training state for tests, with everything in it that is hard to save."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from training import state as counters
from training.checkpoint import Checkpoints
from training.state import TrainState


def optimizer():
    """Named tuples, empty states, masked leaves and an injected hyperparameter, as optax nests."""
    masked = optax.masked(optax.trace(0.9), {"embed/tokens": True, "blocks/0/mixer/q": False})
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
        masked,
        optax.scale(-1.0),
    )


def make(step=3, seed=0, rows=16, tx=None):
    rng = np.random.default_rng(seed)
    shapes = {"embed/tokens": (rows, 8), "blocks/0/mixer/q": (2, 8, 4, 2)}
    params = {path: jnp.asarray(rng.normal(size=s), jnp.float32) for path, s in shapes.items()}
    opt = (tx or optimizer()).init(params)
    opt = jax.tree.map(lambda x: x if x.ndim == 0 else x + rng.normal(size=x.shape), opt)
    aux = {
        "ema": {path: value + 1 for path, value in params.items()},
        "empty": {},
        "bias": jnp.asarray([jnp.nan, -0.0, jnp.inf], jnp.bfloat16),
        "mask": jnp.asarray([True, False]),
    }
    position, tokens = jnp.asarray(counters.pair(24)), jnp.asarray(counters.pair(2**40 + 3))
    return TrainState(jnp.int32(step), position, tokens, params, opt, aux)


def abstract(state, sharding=None):
    """ShapeDtypeStructs; sharding: a function of the leaf, or None for none."""
    place = lambda x: sharding(x) if sharding else None
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), state)


def bits(tree):
    return jax.tree.map(lambda x: (str(x.dtype), x.shape, np.asarray(x).tobytes()), tree)


def first(mesh):
    """Shards the first dimension over the mesh's first axis where it divides."""
    axis = mesh.axis_names[0]

    def place(x):
        divides = x.ndim > 1 and x.shape[0] % mesh.shape[axis] == 0
        return NamedSharding(mesh, P(axis) if divides else P())

    return place


def save(workdir, *states, meta=(), **own):
    """Saves these states into the folder of a run; own: of its Checkpoints."""
    with Checkpoints(workdir, **own) as checkpoints:
        for state in states:
            checkpoints.save(state, dict(meta))
