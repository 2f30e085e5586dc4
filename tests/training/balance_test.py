"""Balance of experts against the float64 oracle of tests/training/routed.py."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.batch import Batch
from models.context import of_batch
from optim import build as optimizer
from parallel import mesh as meshes
from parallel.replicas import differences
from tests.training import routed
from tests.training.routed import BIAS, MESHES, PARAMS, PATH, ROUTER, B, E, K, L, N, W
from training import balance, step
from training.balances import aux_free, global_batch, shuffled
from training.loss import Loss
from training.state import TrainState, pair

RATE = 0.03  # of the bias
NOTHING = Loss(lambda params, micro, ctx: {}, lambda totals: (jnp.float32(2.0), {}))
whole = functools.cache(lambda seed, empty=0: routed.oracle(routed.batch(seed, empty)))


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
@pytest.mark.parametrize("A", [1, 2, 4, 8])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_exact_over_devices_and_micro_batches(devices, A, remat):
    """Value, every gradient and counts. 16 empty rows are a whole micro-batch, or all of a
    device's rows."""
    for seed, empty in ((devices + A, 0), (0, 16)):
        batch = routed.batch(seed, empty)
        found = routed.run(routed.loss(remat=remat), batch, A, MESHES[devices])
        routed.check(found, whole(seed, empty))
        np.testing.assert_array_equal(found[2].sum(-1), K * np.count_nonzero(batch.segment_ids))


@pytest.mark.parametrize(
    ("stage", "A", "sizes", "unroll"),
    [
        ("zero1", 1, {"data": 4, "expert": 2}, 1),
        ("zero2", 4, {"data": 2, "fsdp": 2, "expert": 2}, N),
    ],
)
def test_exact_with_divided_gradients_and_unrolled_layers(stage, A, sizes, unroll):
    loss = routed.loss(remat=True, unroll=unroll, z=0.1)
    found = routed.run(loss, routed.batch(1), A, sizes, stage=stage)
    routed.check(found, routed.oracle(routed.batch(1), z=0.1))


def test_a_batch_of_padding_is_nothing():
    found = routed.run(routed.loss(), routed.batch(0, empty=B), 8, MESHES[8])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found))


def test_its_weight_is_the_same_on_any_number_of_devices():
    """NVIDIA/Megatron-LM#3672: each device divides its own probabilities by the tokens of all, and
    gradients are then averaged over devices, so that N devices balance with 1/N of the weight."""
    batch = routed.batch(2)._replace(weights=np.zeros((B, L), np.float32))  # balance alone
    gradient = lambda found: [found[3][path] for path in (ROUTER, "tokens")]
    one, eight = (gradient(routed.run(routed.loss(), batch, 1, MESHES[n])) for n in (1, 8))
    here = batch.segment_ids > 0
    rows, places = np.arange(B)[:, None] // 16, np.arange(L)[None] // (L // 2)
    devices = [(rows == i) & (places == j) for i in range(4) for j in range(2)]
    each = [gradient(routed.oracle(batch, [(own, here)])) for own in devices]
    buggy = jax.tree.map(lambda *parts: np.mean(parts, 0), *each)
    right = gradient(routed.oracle(batch))
    assert routed.error(one, right) < 3e-6
    assert routed.error(eight, right) < 3e-6
    assert routed.error([8 * leaf for leaf in buggy], right) < 1e-12


def test_choices_are_counted_exactly_in_bfloat16():
    """More at once than the 256 up to which bfloat16 counts. 2 %: some roundings of 0.4 %."""
    full = routed.batch(3)._replace(segment_ids=np.ones((B, L), np.int32))
    value, term, counts, _ = routed.run(routed.loss(), full, 1, MESHES[8], dtype="bfloat16")
    rounded = np.asarray(jnp.asarray(PARAMS["tokens"], jnp.bfloat16), np.float32)
    expected = routed.oracle(full, params=PARAMS | {"tokens": rounded})
    np.testing.assert_array_equal(counts[0], expected[2][0])
    assert np.any((counts > 256) & (counts % 2 == 1))
    np.testing.assert_array_equal(counts.sum(-1), K * B * L)
    np.testing.assert_allclose([value, term], expected[:2], rtol=0.02)


def test_a_bias_chooses_and_does_nothing_else():
    """Not in gates nor in gradients: where the choice is the same, so is every bit."""
    batch, by = routed.batch(0, 16), np.float32([[3e-5, -3e-5, 1e-5, 0.0]])  # below the margin
    moved, none = (PARAMS | {BIAS: bias} for bias in (PARAMS[BIAS] + by, 0 * PARAMS[BIAS]))
    found, again = (routed.run(routed.loss(), batch, 1, MESHES[8], p) for p in (PARAMS, moved))
    jax.tree.map(np.testing.assert_array_equal, found, again)
    assert np.any(routed.oracle(batch, params=none)[2] != found[2])


@functools.cache
def _states(rows=None):
    """Before and after three steps of aux_free alone, on eight devices in two micro-batches."""
    loss = routed.loss("aux_free", rate=RATE, weight=0.0, rows=rows)
    own = dict(name="sgd", lr=0.1, schedule="constant", warmup_tokens=0, warmup_fraction=0.0)
    own |= dict(clip=None, weight_decay=0.0, methods={}, schedules={})
    tx, lr = optimizer.build(routed.TRAINED, 1e6, **own)
    run = jax.jit(step.make(loss, tx, lr, seed=0, context={"taps": loss.taps}, ema=None))
    start = {path: PARAMS[path] for path in routed.TRAINED}
    aux = {"frozen": {BIAS: np.zeros((N, E), np.float32)}}
    opt = jax.device_get(tx.init(start))
    states = [TrainState(np.int32(0), pair(0), pair(0), start, opt, aux)]
    mesh = meshes.make(**MESHES[8])
    with jax.set_mesh(mesh):
        for number in range(3):
            params = states[-1].params | states[-1].aux["frozen"]
            trained, fixed, batch = routed.placed(params, routed.batch(number, 4), 2, mesh)
            given = states[-1]._replace(params=trained, aux={"frozen": fixed})
            found = run(given, batch)
            assert differences(found) == []
            states.append(jax.device_get(found[0]))
    return states


def _signs(batch, params):
    counts = routed.oracle(batch, params=params)[2]
    return np.float32(np.sign(counts.sum(-1, keepdims=True) - E * counts))


def test_the_bias_of_aux_free_moves_by_signs_of_the_counts():
    """Bit by bit, in training on eight devices, whose copies of all that is kept stay equal."""
    bias = np.zeros((N, E), np.float32)
    for number, (state, after) in enumerate(itertools.pairwise(_states())):
        signs = _signs(routed.batch(number, 4), state.params | {BIAS: bias})
        bias = bias + np.float32(RATE) * signs
        np.testing.assert_array_equal(after.aux["frozen"][BIAS], bias)
    unbiased = _signs(routed.batch(number, 4), state.params | {BIAS: 0 * bias})
    assert np.any(unbiased != signs)


def test_rows_of_aux_free_change_the_bias_alone():
    """The mean of the signs of every four rows, of which the first have no token."""
    one, by_rows = _states()[1], _states(rows=4)[1]
    assert routed.error(by_rows.params, one.params) < 1e-6
    batch, signs, of = routed.batch(0, 4), [], np.arange(B)[:, None] // 4
    for part in range(1, B // 4):
        alone = batch._replace(segment_ids=batch.segment_ids * (of == part))
        signs.append(_signs(alone, _states()[0].params | {BIAS: np.zeros((N, E), np.float32)}))
    found = by_rows.aux["frozen"][BIAS]
    np.testing.assert_allclose(found, RATE * np.mean(signs, 0), rtol=1e-6)
    assert np.any(found != one.aux["frozen"][BIAS])


@pytest.mark.parametrize("experts", [3, 6, 7, 10])
def test_equal_counts_leave_the_bias_alone(experts):
    """Whatever the counts, of which thirds and sevenths are not exact."""
    loss = aux_free.make(NOTHING, (PATH,))
    bias = {"frozen": {BIAS: jnp.zeros((1000, experts))}}
    counts = jnp.concatenate([jnp.arange(1.0, 501.0), jnp.arange(3e6, 3e6 + 500)])
    counts = jnp.broadcast_to(counts[:, None], (1000, experts))
    after = jax.jit(lambda counts: loss.after(bias, {f"{PATH}/selected": counts}))(counts)
    np.testing.assert_array_equal(after["frozen"][BIAS], 0)


def test_a_buffer_balances_over_what_it_has_seen():
    """arXiv 2501.11873, algorithm 1, with counts that are added up over micro-batches of 16 rows.

    Words of the last micro-batch are its own, and their gradient that of the whole batch.
    """
    batch, of = routed.batch(4), np.broadcast_to(np.arange(B)[:, None] // 16, (B, L))
    batch = batch._replace(inputs=batch.inputs % (W // 2) + W // 2 * (of == 3).astype(np.int32))
    exact, seen = routed.oracle(batch), [(of == a, of <= a) for a in range(4)]
    value, term, counts, gradient = routed.run(routed.loss("buffer"), batch, 4)
    routed.check((value, term, counts, gradient), (*exact[:3], routed.oracle(batch, seen)[3]))
    tokens, expected = gradient["tokens"], exact[3]["tokens"]
    assert routed.error(tokens[W // 2 :], expected[W // 2 :]) < 3e-6
    assert routed.error(tokens[: W // 2], expected[: W // 2]) > 1e-3


def test_a_buffer_of_one_micro_batch_is_the_whole():
    batch = routed.batch(5)
    one, other = (routed.run(routed.loss(name), batch) for name in ("buffer", "global_batch"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(("A", "sizes"), [(1, MESHES[1]), (4, {"data": 4, "expert": 2})])
def test_micro_batch_is_the_mean_over_parts_of_rows(A, sizes):
    """The same rows anywhere: four are a part, where a device has two."""
    batch, of = routed.batch(0, 16), np.broadcast_to(np.arange(B)[:, None] // 4, (B, L))
    expected = routed.oracle(batch, [(of == g, of == g) for g in range(B // 4)], z=0.1)
    loss = routed.loss("micro_batch", rows=4, z=0.1)
    routed.check(routed.run(loss, batch, A, sizes), expected)
    assert expected[1] > 1.02 * whole(0, 16)[1]


def test_rows_that_do_not_divide():
    with pytest.raises(ValueError, match=r"^a balance over 3 rows does not divide a micro-batch"):
        routed.run(routed.loss("micro_batch", rows=3), routed.batch(0))


def _dealt(batch, A, parts=8):
    """The part of each token `[B L]`, as layers are told; of micro-batches of every A-th row."""
    told = lambda params, micro, ctx: {"group": ctx.group}
    loss = shuffled.make(dataclasses.replace(NOTHING, sums=told), (), parts=parts)
    run = jax.jit(lambda micro: loss.sums({}, micro, of_batch(micro))["group"])
    micros = [Batch(*(x[a::A] for x in batch)) for a in range(A)]
    return np.stack([run(micro) for micro in micros], 1).reshape(B, L)


def test_shuffled_deals_tokens_evenly_and_by_their_place_alone():
    batch = routed.batch(6)
    of = _dealt(batch, 1)
    np.testing.assert_array_equal(of, _dealt(routed.batch(7), 1))  # of other documents
    np.testing.assert_array_equal(of, _dealt(batch, 4))
    sizes = np.bincount(of.reshape(-1), minlength=8)
    assert len(sizes) == 8
    # Five standard deviations of a binomial with 512 draws.
    assert np.abs(sizes - B * L / 8).max() < 5 * np.sqrt(B * L / 8)
    later = batch._replace(sample=batch.sample + np.uint32([[0, B]]))
    assert 0.05 < np.mean(_dealt(later, 1) == of) < 0.25  # an eighth by chance


def test_shuffled_is_the_mean_over_its_parts():
    batch = routed.batch(6)
    of = _dealt(batch, 1)
    expected = routed.oracle(batch, [(of == g, of == g) for g in range(8)])
    routed.check(routed.run(routed.loss("shuffled"), batch, 2, MESHES[8]), expected)


def test_the_term_is_one_in_balance_and_all_experts_in_collapse():
    """Exactly; layers are added up, and their mean is logged."""
    even, one = np.full(E, 6.0, np.float32), np.float32(24 * np.eye(E)[1])
    for tokens in (24.0, 12.0):  # of one choice, and of two
        sums = jnp.stack([even, one]), jnp.stack([even, one]) * tokens / 24
        found = balance.term(*sums, jnp.float32(tokens))
        np.testing.assert_array_equal(found, [1.0, E])
    paths = (PATH, "prefix/0/ffn")
    loss = global_batch.make(NOTHING, paths, weight=0.5, z=0.25)
    totals = {f"{PATH}/{n}": np.stack([even, one]) for n in ("selected", "probability")}
    totals |= {f"{paths[1]}/{n}": one for n in ("selected", "probability")}
    for name, value in {"z": 12.0, "entropy": 0.0, "dropped": 0.0}.items():
        totals |= {f"{PATH}/{name}": np.full(2, value), f"{paths[1]}/{name}": np.float64(value)}
    totals = jax.tree.map(jnp.float32, totals | {"tokens": 24.0})
    scalar, metrics = loss.finish(totals)
    assert float(scalar) == 2.0 + 0.5 * (1 + E + E) + 0.25 * 3 * 0.5
    assert float(metrics["balance"]) == (1 + E + E) / 3
    np.testing.assert_array_equal(metrics[f"{PATH}/balance"], [1.0, E])
