"""The held-out score against float64 sums over every row, however they are batched and sharded."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.context import of_batch
from parallel import mesh as meshes
from parallel.rules import spec
from tests import tiny
from tests.training import mixed
from training.evaluate import Score, held_out, place
from training.loss import right


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def built(root):
    built = tiny.setup(root, model__tied=False)
    with jax.set_mesh(built.mesh):
        yield built


@pytest.fixture(scope="module")
def params(built):
    return built.program.init().params


def score(built, params, rows, limit=None):
    return held_out(built.program, params, built.data, built.mesh, rows=rows, limit=limit)


def directly(built, params, limit=None):
    """(nll, targets, bytes): the model's logits, then numpy in float64."""
    count = built.data.rows("validation") if limit is None else limit
    (batch,) = built.data.evaluation(count, limit)
    forward = jax.jit(lambda p, b: built.program.model(p)(b.inputs, of_batch(b))[0])
    logits = np.asarray(forward(params, place(batch, built.mesh)), np.float64)[..., :258]
    log_p = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    here = np.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
    kept = batch.weights > 0
    return -np.sum(here[kept]), np.sum(kept), np.sum(kept & (batch.targets < 256))


@pytest.mark.parametrize("limit", [None, 3])
def test_score_is_that_of_every_row(built, params, limit):
    nll, targets, count = directly(built, params, limit)
    found = score(built, params, 4, limit)
    assert (found.targets, found.bytes) == (targets, count)
    assert found.nll == pytest.approx(nll, rel=1e-6)  # float32 sums of some hundred terms


def test_every_held_out_byte_is_scored_once(built, params):
    held = built.data.source.documents("validation")
    found = score(built, params, 4)
    assert found.bytes == held.tokens.size
    assert found.targets == held.tokens.size + len(held)  # and the <eos> after each file
    assert found.bits_per_byte == found.nll / math.log(2) / held.tokens.size


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_rows_at_a_time_change_nothing(built, params, rows):
    """Neither 3 nor 64 divides the rows: the last batch is filled with padding."""
    assert built.data.rows("validation") % 3
    expected, found = score(built, params, 4), score(built, params, rows)
    assert (found.targets, found.bytes) == (expected.targets, expected.bytes)
    assert found.nll == pytest.approx(expected.nll, rel=1e-6)  # order of float32 sums


def test_devices_change_nothing(root, built, params):
    expected = score(built, params, 4)
    changes = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    eight = tiny.setup(root, 8, model__tied=False, **changes)
    with jax.set_mesh(eight.mesh):
        like = eight.program.state.params
        placed = {path: jax.device_put(p, like[path].sharding) for path, p in params.items()}
        found = score(eight, placed, 4)
    assert (found.targets, found.bytes) == (expected.targets, expected.bytes)
    assert found.nll == pytest.approx(expected.nll, rel=1e-6)  # order of float32 sums


@pytest.fixture(scope="module")
def domains(root, params):
    """score(rows, devices, **mesh) of the same parameters on a corpus of three domains."""

    def run(rows, devices=1, **mesh):
        built = mixed.setup(root, devices, model__tied=False, **mesh)
        with jax.set_mesh(built.mesh):
            like = built.program.state.params
            placed = {path: jax.device_put(p, like[path].sharding) for path, p in params.items()}
            data = mixed.Mixed(built.data)
            return data, held_out(built.program, placed, data, built.mesh, rows=rows)

    return run


def test_domains_are_scored_each_for_itself(domains, built, params):
    """Against the score of an evaluation that holds the rows of one domain only."""
    data, found = domains(4)
    assert tuple(found.domains) == mixed.DOMAINS
    assert sum(found.weights.values()) == found.targets
    whole = sum(found.weights[name] * loss for name, loss in found.domains.items())
    assert whole == pytest.approx(found.nll, rel=1e-6)
    for k, name in enumerate(mixed.DOMAINS):

        class One:
            tokenizer = data.tokenizer

            @staticmethod
            def evaluation(rows, limit, k=k):
                for batch in data.evaluation(rows, limit):
                    here = batch.domain[:, None] == k
                    yield batch._replace(weights=batch.weights * here)

        alone = held_out(built.program, params, One, built.mesh, rows=4)
        assert found.weights[name] == alone.targets
        assert found.domains[name] == pytest.approx(alone.loss, rel=1e-6)
        assert (alone.domains, alone.weights) == ({}, {})


def test_neither_rows_nor_devices_change_the_domains(domains):
    _, expected = domains(4)
    changes = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    for _, found in (domains(3), domains(8, 8, **changes)):
        assert found.weights == expected.weights
        for name, loss in expected.domains.items():
            assert found.domains[name] == pytest.approx(loss, rel=1e-6)


def test_a_domain_without_held_out_targets_has_no_score(built, params):
    totals = {
        "nll": 6.0,
        "weight": 2.0,
        "right": 1.0,
        "domain_nll": [6.0, 0.0],
        "domain_weight": [2.0, 0.0],
    }
    program = dataclasses.replace(built.program, evaluate=lambda params, batch: totals)
    data = mixed.Mixed(built.data, domains=("code", "prose"))
    found = held_out(program, params, data, built.mesh, rows=4, limit=4)
    assert (found.domains, found.weights) == ({"code": 3.0}, {"code": 2.0})


def test_progress_sees_every_batch(built, params):
    seen = []
    progress = lambda batches: (seen.append(1) or batch for batch in batches)
    held_out(built.program, params, built.data, built.mesh, rows=4, limit=6, progress=progress)
    assert len(seen) == 2


def test_values_of_a_score():
    found = Score(nll=8 * math.log(2), targets=4.0, bytes=2)
    assert found.values() == {
        "loss": 2 * math.log(2),
        "perplexity": pytest.approx(4.0),
        "bits_per_byte": pytest.approx(4.0),
    }
    assert "bits_per_byte" not in Score(1.0, 1.0, 0).values()
    assert dataclasses.replace(found, right=3.0).values()["accuracy"] == 0.75
    several = dataclasses.replace(found, domains={"code": 1.5}, weights={"code": 4.0})
    assert several.values() == found.values() | {"loss/code": 1.5}
    assert several.summary() == found.values()
    assert math.isfinite(Score(1e9, 1.0, 1).perplexity)


def test_nothing_to_score_is_an_error(built, params):
    class Empty:
        evaluation = staticmethod(lambda rows, limit: [])

    with pytest.raises(ValueError, match="hold out more of the corpus"):
        held_out(built.program, params, Empty, built.mesh, rows=4)
    for rows, limit in ((0, None), (4, 0)):
        with pytest.raises(ValueError, match=r"^0 "):
            score(built, params, rows, limit)


def test_rows_must_divide_over_devices(root):
    eight = tiny.setup(root, 8, mesh__data=4, mesh__tensor=2)
    with pytest.raises(ValueError, match="3 rows at a time do not divide over 4 devices"):
        score(eight, {}, 3)


def test_right_are_targets_with_no_larger_logit():
    """Ties count, padded vocabulary (-inf) does not, and a divided vocabulary changes nothing."""
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (4, 6, 16)).astype(np.float32)
    logits[:, :, 13:] = -np.inf
    targets = rng.integers(0, 13, (4, 6)).astype(np.int32)
    chosen = np.take_along_axis(logits, targets[:, :, None], 2)[:, :, 0]
    expected = (chosen == logits.max(-1)).astype(np.float32)
    np.testing.assert_array_equal(right(jnp.asarray(logits), jnp.asarray(targets)), expected)
    assert 0 < expected.mean() < 1
    with jax.set_mesh(meshes.make(data=2, tensor=4)):
        put = lambda x, *names: jax.device_put(x, spec(*names))
        placed = put(logits, "batch", "length", "vocab"), put(targets, "batch", "length")
        np.testing.assert_array_equal(jax.jit(right)(*placed), expected)
