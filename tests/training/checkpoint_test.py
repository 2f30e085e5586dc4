"""Checkpoints give back every bit, on any mesh."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from tests.training.states import abstract, bits, first, make
from training import state as counters
from training.checkpoint import CheckpointError, Checkpoints
from training.state import TrainState

META = {"config": {"steps": 9}, "corpus": "abc", "metrics": {"loss": 1.5}}


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        yield checkpoints


def test_every_bit_comes_back(checkpoints):
    state = make()
    checkpoints.save(state, META)
    checkpoints.wait()
    assert checkpoints.steps() == [3]
    found, meta = checkpoints.restore(None, abstract(state))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert bits(found) == bits(state)
    assert {key: meta[key] for key in META} == META
    assert meta["shapes"]["params"]["embed/tokens"] == ["float32", [16, 8]]
    assert meta["shapes"]["rest"]["['tokens']"] == ["uint32", [2]]
    assert checkpoints.meta() == meta


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.lion(0.1), optax.adafactor(0.1)])
def test_other_optimizers(checkpoints, tx):
    """SGD has no leaf at all, so that its item is empty."""
    state = make(tx=tx)._replace(aux={})
    checkpoints.save(state, {})
    checkpoints.wait()
    assert bits(checkpoints.restore(3, abstract(state))[0]) == bits(state)


def test_another_mesh(checkpoints):
    """8 shards to 2, to one device, and back to the very sharding asked for."""
    eight, two = jax.make_mesh((8,), ("a",)), jax.make_mesh((2,), ("b",), devices=jax.devices()[:2])
    state = make()
    state = jax.device_put(state, jax.tree.map(first(eight), state))
    checkpoints.save(state, {})
    checkpoints.wait()
    one = lambda x: SingleDeviceSharding(jax.devices()[5])
    for place in (first(eight), first(two), one, None):
        wanted = abstract(state, place)
        found, _ = checkpoints.restore(3, wanted)
        assert bits(found) == bits(state)
        if place:
            # Equal, not merely equivalent: P() and P(None,) would compile the step twice.
            same = jax.tree.map(lambda x, want: x.sharding == want.sharding, found, wanted)
            assert all(jax.tree.leaves(same))


def test_items_may_lie_in_ways_of_their_own(checkpoints):
    """Moments in shards beside whole parameters, as with ZeRO, frozen ones, and turned round."""
    eight, two = jax.make_mesh((8,), ("a",)), jax.make_mesh((2,), ("b",), devices=jax.devices()[:2])
    state = make()
    state = state._replace(aux={"frozen": {"base/kernel": state.params["embed/tokens"] * 2}})

    def placed(parts, whole, mesh):
        """The sharding of every leaf; the fields in `whole` lie whole on every device."""
        everywhere = lambda x: jax.NamedSharding(mesh, jax.P())
        places = {name: everywhere if name in whole else first(mesh) for name in parts._fields}
        mapped = {name: jax.tree.map(places[name], getattr(parts, name)) for name in places}
        return type(parts)(**mapped)

    checkpoints.save(jax.device_put(state, placed(state, ("params",), eight)), {})
    checkpoints.wait()
    for mesh, whole in ((eight, ("params",)), (two, ("opt", "aux")), (eight, ("aux",))):
        homes = placed(state, whole, mesh)
        wanted = jax.tree.map(
            lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), state, homes
        )
        found, _ = checkpoints.restore(3, wanted)
        assert bits(found) == bits(state)
        assert jax.tree.map(lambda x: x.sharding, found) == homes
        frozen, _ = checkpoints.restore_params(3, wanted.aux["frozen"], aux="frozen")
        assert bits(frozen) == bits(state.aux["frozen"])


def test_a_restored_state_compiles_nothing_new(checkpoints):
    mesh = jax.make_mesh((8,), ("a",))
    with jax.set_mesh(mesh):
        state = make()
        state = jax.device_put(state, jax.tree.map(first(mesh), state))
        step = jax.jit(lambda s: s._replace(step=s.step + 1), donate_argnums=0)
        state = step(step(state))
        before = step._cache_size()
        like = abstract(state, lambda x: x.sharding)
        checkpoints.save(state, {})
        expected = bits(step(state))
        checkpoints.wait()
        restored, _ = checkpoints.restore(5, like)
        assert bits(step(restored)) == expected
        assert step._cache_size() == before


def test_donating_during_a_save_is_safe(checkpoints):
    """The step overwrites its input in place while the save is still writing."""
    params = {f"w{i}": jnp.full((512, 512), i, jnp.float32) for i in range(8)}
    pair = lambda: jnp.asarray(counters.pair(0))
    state = TrainState(jnp.int32(0), pair(), pair(), params, (), {})
    advance = lambda s: s._replace(step=s.step + 1, params=jax.tree.map(lambda x: x + 1, s.params))
    step = jax.jit(advance, donate_argnums=0)
    like = abstract(state)
    for _ in range(3):
        state = step(state)
        checkpoints.save(state, {})
        for _ in range(10):
            state = step(state)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 12, 23]
    for number in checkpoints.steps():
        found, _ = checkpoints.restore(number, like)
        for i in range(8):
            np.testing.assert_array_equal(found.params[f"w{i}"], i + number)


def test_meta_is_copied(checkpoints):
    meta = {"metrics": {"loss": 1}}
    checkpoints.save(make(), meta)
    meta["metrics"]["loss"] = 2
    checkpoints.wait()
    assert checkpoints.meta()["metrics"] == {"loss": 1}


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(None, None, [1, 2, 3, 4, 5, 6]), (2, 3, [3, 5, 6])],
)
def test_retention(tmp_path, keep, keep_every, left):
    small = TrainState(0, *[jnp.asarray(counters.pair(0))] * 2, {"w": jnp.ones(2)}, (), {})
    for steps in (range(1, 4), range(4, 7)):  # the second half as a resumed run
        with Checkpoints(tmp_path, keep=keep, keep_every=keep_every) as checkpoints:
            for step in steps:
                checkpoints.save(small._replace(step=jnp.int32(step)), {})
    assert checkpoints.steps() == left
    assert checkpoints.latest() == 6
    names = [*(str(step) for step in left), "run.json"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == names


def test_parameters_alone(checkpoints):
    """Only `params` and `meta` are opened, and verified: the other items may be gone."""
    state = make()
    checkpoints.save(state, META)
    checkpoints.wait()
    for item in ("opt", "rest"):
        shutil.rmtree(checkpoints.folder / "3" / item)
    mesh = jax.make_mesh((2,), ("a",), devices=jax.devices()[:2])
    for wanted in (None, abstract(state.params), abstract(state.params, first(mesh))):
        params, meta = checkpoints.restore_params(3, wanted)
        assert bits(params) == bits(state.params)
        assert meta["corpus"] == "abc"
    with pytest.raises(CheckpointError, match=r"step 3 in .* is not sound: opt/\S+ is missing"):
        checkpoints.restore(3, abstract(state))


def test_averaged_parameters_alone(checkpoints):
    state = make()
    checkpoints.save(state, {})
    checkpoints.wait()
    for wanted in (None, abstract(state.params)):
        params, _ = checkpoints.restore_params(aux="ema", abstract=wanted)
        assert bits(params) == bits(state.aux["ema"])
    with pytest.raises(CheckpointError, match=r"does not fit: teacher: .* is missing"):
        checkpoints.restore_params(aux="teacher", abstract=abstract(state.params))
