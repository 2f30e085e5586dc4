"""ZeRO-1 and ZeRO-2 train as one device does, hold what the paper says, and send what it says.

Bytes and collectives are those of the compiled step. Psi counts the parameters of a model whose
gradients dominate: a batch of a row or two a device, eight tokens a row.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.config import resolve
from parallel import mesh as meshes
from parallel import zero
from parallel.replicas import differences
from parallel.rules import spec
from parallel.weight import Entry, Weight
from tests import hlo
from tests.contracts import optim_test
from tests.models.built import place
from tests.training import accumulate_test as toy
from tests.training.program_test import SMALL, V, _batch
from training import program
from training.accumulate import value_and_grad

STEPS = 5
SGD = {"optim.name": "sgd", "optim.lr": "0.1"}
# Two micro-batches, dropout, remat, an average, frozen parameters, a clipped gradient.
RUN = SMALL | SGD | {"model.dropout": "0.1", "ema": "0.8", "model.remat": "full"}
RUN |= {"trainable": "(?!.*ffn/down).*", "optim.clip": "1.0"}
PRODUCT = {"data": 2, "fsdp": 2, "tensor": 2}


@dataclasses.dataclass
class Run:
    program: program.Program
    states: list  # on the host
    last: program.TrainState
    losses: np.ndarray


@functools.cache
def _run(stage, **sizes):
    devices = jax.devices()[: math.prod(sizes.values())]
    mesh = meshes.make(devices, **sizes)
    with jax.set_mesh(mesh):
        built = program.build(resolve("base", RUN | {"zero": stage}), mesh, V)
        state, states, losses = built.init(), [], []
        for number in range(STEPS):
            states.append(jax.device_get(state))
            state = place(states[-1], built.state)  # as after a checkpoint
            state, metrics = built.step(state, place(_batch(number), built.batch))
            losses.append(metrics["loss"])
    return Run(built, [*states, jax.device_get(state)], state, np.array(losses))


def _close(actual, expected, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_eight_devices_train_as_one(stage):
    """1e-6 of the largest value: float32 sums in another order; 1e-5 for moments, which cancel."""
    one, eight = _run("none", data=1), _run(stage, **PRODUCT)
    for a, e in zip(jax.tree.leaves(eight.states[0]), jax.tree.leaves(one.states[0]), strict=True):
        np.testing.assert_array_equal(a, e)
    np.testing.assert_allclose(eight.losses, one.losses, rtol=1e-6)
    _close(eight.states[-1].params, one.states[-1].params, 1e-6)
    _close(eight.states[-1].aux, one.states[-1].aux, 1e-6)
    _close(eight.states[-1].opt, one.states[-1].opt, 1e-5)
    assert eight.program.step._cache_size() == 1
    assert differences(eight.last) == []
    for leaf, like in zip(
        jax.tree.leaves(eight.last), jax.tree.leaves(eight.program.state), strict=True
    ):
        assert leaf.sharding == like.sharding


def test_the_average_is_read_as_the_parameters_lie():
    run = _run("zero2", **PRODUCT)
    held = run.last.aux["ema"]["tokens"]
    read = program.parameters(run.last)
    assert held.sharding.shard_shape(held.shape) == (32, 8)  # of 128 x 16
    assert read["tokens"].sharding == run.last.params["tokens"].sharding
    np.testing.assert_array_equal(read["tokens"], run.states[-1].aux["ema"]["tokens"])
    assert read.keys() == run.program.table.keys()


@pytest.mark.parametrize(("stage", "A"), [("zero1", 4), ("zero2", 1), ("zero2", 4)])
def test_a_loss_that_needs_its_totals_first(stage, A):
    """The gradient of the whole batch, over replicas too; one leaf divides, the other does not."""
    table = {"a": Entry(Weight((None,)), (toy.L,)), "b": Entry(Weight((None,)), (toy.E,))}
    mesh = meshes.make(jax.devices()[:4], data=2, **{"replica" if A == 1 else "tensor": 2})
    batch = jax.tree.map(jnp.asarray, toy._batch())
    whole = lambda p: toy.NEEDY.finish(
        toy.counts(batch) | toy.NEEDY.sums(p, batch, toy.of_batch(batch))
    )[0]
    expected = jax.jit(jax.value_and_grad(whole))(toy.PARAMS)
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(x, spec(None, "batch", *[None] * (x.ndim - 2)))
        parts = jax.tree.map(put, toy._split(toy._batch(), A))
        params = jax.tree.map(lambda x: jax.device_put(x, spec(None)), toy.PARAMS)
        place = zero.make(stage, table, mesh)
        run = lambda p, parts: value_and_grad(toy.NEEDY, p, parts, toy._context, place=place)
        scalar, _, _, gradient = jax.jit(run)(params, parts)
    assert place.undivided().keys() == {"b"}
    assert gradient["a"].sharding.shard_shape((toy.L,)) == (toy.L // 2,)
    toy._close((scalar, gradient), expected)


METHODS = {
    "shared": Entry(Weight(("embed", "ffn"), init=("normal", 1)), (8, 16)),
    "stack": Entry(Weight(("embed", None, "heads"), stack=(1,), init=("normal", 1)), (4, 8, 3, 4)),
    "layers": Entry(Weight((None, None), init=("normal", 1)), (4, 3, 5)),
    "vector": Entry(Weight((None,), decay=False, init=("ones",), group="norm"), (4, 8)),
    "odd": Entry(Weight((None, None), init=("normal", 1)), (3, 5)),
}


@pytest.mark.parametrize("name", optim_test.METHODS)
def test_every_optimizer_updates_its_parts_as_it_would_the_whole(name):
    """LAMB's norms are over true matrices, whichever devices hold them."""
    tx = optim_test.made(name, METHODS)
    params = optim_test.draw(0, METHODS)
    gradients = [optim_test.draw(1 + i, METHODS) for i in range(3)]
    mesh = meshes.make(**PRODUCT)
    place = zero.make("zero1", METHODS, mesh)

    def run(place, params, gradients):
        params = place.split(params)
        state = tx.init(params)
        for gradient in gradients:
            updates, state = tx.update(place.split(gradient), state, params, **optim_test.STEP)
            params = jax.tree.map(jnp.add, params, updates)
        return place.whole(params), state

    expected = jax.jit(functools.partial(run, zero.REPLICATED))(params, gradients)
    with jax.set_mesh(mesh):
        put = lambda tree: {p: jax.device_put(x, spec(*METHODS[p].axes)) for p, x in tree.items()}
        found = jax.jit(functools.partial(run, place))(put(params), list(map(put, gradients)))
    _close(found, expected, 1e-6)
    for leaf in jax.tree.leaves(found[1]):
        share = math.prod(leaf.sharding.shard_shape(leaf.shape)) / leaf.size
        assert share in ({1} if leaf.ndim == 0 or leaf.shape == (3, 5) else {1 / 2, 1 / 4, 1 / 8})


N, A = 8, 2
LARGE = {"model.d_model": "128", "model.layers": "6", "model.vocab": "128", "data.length": "8"}
LARGE |= {"data.batch_size": str(N * A), "data.micro_batches": str(A), "optim.name": "adamw"}
# Without remat a loop also carries the weights that it keeps for its backward pass.
LARGE |= {"model.remat": "full", "model.tied": "false"}
# Six layers of 36 numbers, for queries and for keys, do not divide over eight devices.
LARGE |= {"model.mixers.attention.qk_norm": "true", "model.mixers.attention.head_dim": "36"}
UNDIVIDED = 2 * 6 * 36 * 4
COUNTERS = 4 + 8 + 8 + 4  # step, position and tokens, the optimizer's count
READ = ("inputs", "targets", "weights", "segment_ids", "positions")  # all that such a step reads
STAGES = ("none", "zero1", "zero2")


@dataclasses.dataclass
class Compiled:
    """state, batch, metrics: bytes of them on one device.  shapes: of the stacked parameters."""

    memory: object
    hlo: str
    psi: int
    shapes: list
    batch: int
    metrics: int
    arrays: int


@functools.cache
def _compiled(stage):
    mesh = meshes.make(data=N)
    with jax.set_mesh(mesh):
        built = program.build(resolve("base", LARGE | {"zero": stage}), mesh, 128)
        lowered = built.step.lower(built.state, built.batch)
    compiled = lowered.compile()
    bytes_of = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    metrics, params = lowered.out_info[1], built.state.params
    return Compiled(
        memory=compiled.memory_analysis(),
        hlo=compiled.as_text(),
        psi=sum(x.size for x in params.values()),
        shapes=[x.shape for path, x in params.items() if path.startswith("blocks/") and x.ndim > 2],
        batch=sum(bytes_of(getattr(built.batch, name)) for name in READ),
        metrics=sum(x.size * x.dtype.itemsize for x in metrics.values()),
        arrays=len(metrics) + len(jax.tree.leaves(built.state)),
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_device_holds_what_the_formulas_say(stage):
    """Every byte that goes in and comes out: 4 Psi of parameters and 8 Psi of moments, split or
    not, and of what does not divide 7/8 twice more than the formula has."""
    found, memory = _compiled(stage), _compiled(stage).memory
    state = {"none": 12 * found.psi}.get(stage, 4 * found.psi + 8 * found.psi // N)
    whole = 0 if stage == "none" else 2 * UNDIVIDED * (N - 1) // N
    state += whole + COUNTERS
    assert memory.argument_size_in_bytes == state + found.batch
    assert memory.alias_size_in_bytes == state
    # The CPU returns a table of pointers with its arrays.
    assert memory.output_size_in_bytes == state + found.metrics + 8 * found.arrays


@pytest.mark.parametrize(("stage", "share"), [("none", 1), ("zero1", 1), ("zero2", 1 / N)])
def test_gradients_are_whole_or_split_as_the_formulas_say(stage, share):
    """Temporaries are two gradients of 4 Psi, what is added up and what a micro-batch adds, and
    beside them the activations and what is at work: less than three of the six layers' weights."""
    found = _compiled(stage)
    working = found.memory.temp_size_in_bytes - 2 * 4 * found.psi * share
    assert 0 < working < 3 * 4 * found.psi / 6


def test_no_loop_carries_a_whole_gradient_under_zero2():
    """Each stacked weight goes into every loop; of what is added up beside it there is a part."""
    for stage, copies in (("none", 2), ("zero1", 2), ("zero2", 1)):
        found = _compiled(stage)
        forward, backward, micro_batches = hlo.loops(found.hlo)
        for shape in found.shapes:
            assert forward.count(shape) == 1, (stage, shape)
            assert backward.count(shape) == micro_batches.count(shape) == copies, (stage, shape)


def test_what_a_step_sends():
    """Elements sent and received by the paper's count: 2 for each that is all-reduced, 1 for each
    that is scattered or gathered. 2 Psi with one micro-batch; with A, none sends 2 A Psi here."""
    for stage, scattered, gathered in (("none", 0, 0), ("zero1", 1, 1), ("zero2", A, 1)):
        found = _compiled(stage)
        sent = dict.fromkeys(hlo.KINDS, 0)
        for collective in hlo.collectives(found.hlo):
            sent[collective.kind] += collective.bytes * collective.times
        divided = 4 * found.psi - (UNDIVIDED if stage != "none" else 0)
        assert N * sent.pop("reduce-scatter") == scattered * divided
        assert sent.pop("all-gather") == gathered * divided
        reduced = 4 * A * found.psi if stage == "none" else UNDIVIDED
        assert 0 <= sent.pop("all-reduce") - reduced < 1000  # sums of the loss, norms
        assert not any(sent.values())
