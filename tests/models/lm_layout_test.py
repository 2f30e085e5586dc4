"""What must change nothing: scan or unrolled, periods or prefix and suffix, remat, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.batch import to_words
from models.context import Context
from parallel import mesh as meshes
from parallel.rules import spec
from tests.models.built import build, close, packed

N = 4
FOUR = dict(layers=N, dropout=0.2, mixers={"attention": {"heads": 2, "kv_heads": 2}})
SEGMENTS, POSITIONS = packed([(5, 7), (3, 4, 2), (12,), (1, 8)])
ROWS = to_words(np.array([3, 2**33, 8, 9], np.uint64))
INPUTS = np.random.default_rng(3).integers(0, 29, (4, 12), dtype=np.int32)
WEIGHT = np.random.default_rng(4).normal(size=(4, 12, 128)).astype(np.float32)


def _loss(built):
    """A loss of the logits with dropout, whose masks depend on each layer's number."""

    def loss(params, inputs, segments, positions, rows, weight):
        ctx = Context(positions, segments, sample=rows, key=jax.random.key(7), train=True)
        logits, _ = built.model(params)(inputs, ctx)
        counted = (segments > 0)[:, :, None] & (logits > -jnp.inf)
        return jnp.sum(jnp.where(counted, weight * logits, 0.0))

    return loss


def _run(built, params):
    put = lambda x: jax.device_put(x, spec("batch", *[None] * (x.ndim - 1)))
    batch = map(put, (INPUTS, SEGMENTS, POSITIONS, ROWS, WEIGHT))
    return jax.jit(jax.value_and_grad(_loss(built)))(params, *batch)


def _homes(built):
    """{path of a layer's own weight: the layers it stacks, in order}."""
    prefix = len({p.split("/")[1] for p in built.table if p.startswith("prefix/")})
    pattern = len({p.split("/")[1] for p in built.table if p.startswith("blocks/")})
    suffix = len({p.split("/")[1] for p in built.table if p.startswith("suffix/")})
    periods = (N - prefix - suffix) // max(pattern, 1)
    homes = {f"prefix/{i}": [i] for i in range(prefix)}
    for j in range(pattern):
        homes[f"blocks/{j}"] = [prefix + i * pattern + j for i in range(periods)]
    return homes | {f"suffix/{i}": [N - suffix + i] for i in range(suffix)}


def _by_layer(built, values):
    """Parameters or gradients with one leaf a layer: 'layer3/mixer/q'."""
    homes, out = _homes(built), {}
    for path, value in values.items():
        home = "/".join(path.split("/")[:2])
        if home not in homes:
            out[path] = np.asarray(value)
            continue
        alone = not home.startswith("blocks")
        for i, number in enumerate(homes[home]):
            at = path.replace(home, f"layer{number}", 1)
            out[at] = np.asarray(value if alone else value[i])
    return out


def _laid_out(built, layers):
    """`_by_layer` undone for this model."""
    homes, out = _homes(built), {}
    for path in built.table:
        home = "/".join(path.split("/")[:2])
        if home not in homes:
            out[path] = layers[path]
            continue
        parts = [layers[path.replace(home, f"layer{i}", 1)] for i in homes[home]]
        out[path] = np.stack(parts) if home.startswith("blocks") else parts[0]
    return out


def _compare(run, built, expected):
    (value, gradients), (wanted, wanted_gradients) = run, expected
    close(value, wanted, 1e-5)
    gradients = _by_layer(built, gradients)
    assert gradients.keys() == wanted_gradients.keys()
    for path, gradient in gradients.items():
        close(gradient, wanted_gradients[path])


@pytest.fixture(scope="module")
def scanned():
    built = build(**FOUR)
    value, gradients = _run(built, built.params)
    assert all(np.abs(g).max() > 0 for g in gradients.values())
    return _by_layer(built, built.params), (value, _by_layer(built, gradients))


ALONE = ("attention",)


@pytest.mark.parametrize(
    "changes",
    [
        dict(unroll=N),
        dict(remat="dots", pattern=ALONE * 2),
        dict(remat="named", unroll=2),
        dict(prefix=ALONE, suffix=ALONE, remat="full"),
    ],
    ids=["unrolled", "pattern-dots", "named-by-two", "around-full"],
)
def test_the_same_layers_in_another_layout(scanned, changes):
    layers, expected = scanned
    built = build(**(FOUR | changes))
    _compare(_run(built, _laid_out(built, layers)), built, expected)


def test_eight_devices(scanned):
    _, expected = scanned
    built = build(**(FOUR | dict(remat="dots")))
    with jax.set_mesh(meshes.make(data=2, fsdp=2, tensor=2)):
        params = built.place()
        value, gradients = _run(built, params)
        for path, gradient in gradients.items():
            assert gradient.sharding.is_equivalent_to(params[path].sharding, gradient.ndim), path
    _compare((value, gradients), built, expected)


def test_remat_keeps_less():
    """Numbers kept for the backward pass: all, matrix products, sublayers' outputs, inputs."""
    kept = {}
    for remat in ("none", "dots", "named", "full"):
        built = build(**(FOUR | dict(remat=remat)))
        args = (INPUTS, SEGMENTS, POSITIONS, ROWS, WEIGHT)
        pull = jax.eval_shape(
            lambda p, *args, built=built: jax.vjp(lambda p: _loss(built)(p, *args), p)[1],
            built.params,
            *args,
        )
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(pull))
    assert kept["none"] > kept["dots"] > kept["named"] > kept["full"]
