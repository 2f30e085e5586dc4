"""Predictions against walking through a kernel's grid step by step."""

import itertools

import pytest

from launch.kernels import child, predict
from launch.kernels.program import Piece, Program
from launch.kernels.targets import TARGETS, Target, target
from launch.schema import UsageError

CAPACITY = {"MXU": 4, "VALU": 4, "VSTORE:SPILL": 1, "VLOAD:FILL": 3, "SALU": 2}
TPUS = [chip for chip in TARGETS.values() if chip.platform == "tpu"]
V5P, V6E = TARGETS["v5p"], TARGETS["v6e"]


def piece(start, bundles, *, depth=1, wait=0, vector=True, busy=0, spills=0, inside=()):
    slots = dict.fromkeys(CAPACITY, 0)
    slots |= {"MXU": busy, "VALU": bundles if vector else 0, "VSTORE:SPILL": spills}
    matmuls = busy // 16
    return Piece(start, start + bundles, depth, inside, bundles + wait, slots, matmuls, 0)


def program(pieces, bound, megacore=False):
    return Program("kernel", tuple(pieces), CAPACITY, bound, megacore, 0, {})


def blocks(i, j):
    """A causal grid: (first of a row, on or below the diagonal, last of a row)."""
    return j == 0, j <= i, j == 3


@pytest.mark.parametrize("cores", [1, 2])
def test_against_a_walk_through_the_grid(cores):
    steer, start = piece(10, 70, vector=False), piece(80, 100, inside=(1,))
    light = piece(180, 20)
    body = piece(200, 400, wait=90, busy=1200, spills=7, inside=(2,))
    inner = piece(600, 30, depth=2, wait=5, inside=(2,))
    finish, end = piece(630, 90, inside=(3,)), piece(720, 8, depth=0)
    pieces = [piece(0, 10, depth=0), steer, start, light, body, inner, finish, end]
    heads, rows, columns, turns = 6, 4, 4, 11
    steps = heads * rows * columns
    counts = {id(p): 0 for p in pieces}
    runs = [0, 0, 0, 0]
    for _, i, j in itertools.product(range(heads), range(rows), range(columns)):
        first, seen, last = blocks(i, j)
        ran = [first, seen, seen * turns, last]
        runs = [a + b for a, b in zip(runs, ran, strict=True)]
        for p, times in zip(
            (steer, start, light, body, inner, finish), (1, first, 1, *ran[1:]), strict=True
        ):
            counts[id(p)] += times / cores
    counts[id(pieces[0])] = counts[id(end)] = 1
    kernel = predict.Kernel(program(pieces, steps // cores + 2, cores == 2), steps, 1, runs)
    found = predict.predict([kernel], V5P, flops=1e9, size=1e6)
    assert kernel.cores(V5P) == cores
    cycles = sum(counts[id(p)] * p.cycles for p in pieces)
    assert found.cycles == pytest.approx(cycles)
    assert found.bundles == pytest.approx(sum(counts[id(p)] * p.bundles for p in pieces))
    assert found.busy == pytest.approx(1200 * counts[id(body)] / (4 * cycles))
    assert found.spills == pytest.approx(7 * counts[id(body)])
    assert found.schedule == pytest.approx(cycles / 1.75e9 * 1e3)


def test_floors():
    kernel = predict.Kernel(program([piece(0, 100)], 12), 10, 1, [10])
    slow = predict.predict([kernel], V6E, flops=918e9, size=1640e6)
    assert (slow.hbm, slow.mxu, slow.ms) == pytest.approx((1.0, 1.0, 1.0))
    assert (slow.tflops, slow.share) == pytest.approx((918, 1.0))
    fast = predict.predict([kernel], V6E, flops=1.0, size=1.0)
    assert fast.ms == fast.schedule == pytest.approx(1000 / 1.75e9 * 1e3)


def test_kernels_of_a_pass_and_calls_of_a_kernel_add_up():
    kernel = lambda calls, runs: predict.Kernel(program([piece(0, 100)], 12), 10, calls, runs)
    times = [
        predict.predict(kernels, V6E, 1.0, 0.0).cycles
        for kernels in ([kernel(1, [10])], [kernel(1, [10])] * 3, [kernel(3, [30])])
    ]
    assert times[1] == times[2] == 3 * times[0]


def test_without_runs_a_piece_counts_once_a_step():
    kernel = predict.Kernel(program([piece(0, 100), piece(100, 70)], 12), 10)
    assert predict.predict([kernel], V6E, 1.0, 0.0).cycles == 1700


def test_a_core_that_rests_is_seen():
    """A grid without a parallel dimension runs on one core of two."""
    whole = predict.Kernel(program([piece(0, 100)], 12, megacore=True), 10, 1, [10])
    assert whole.cores(V5P) == 1
    assert predict.predict([whole], V5P, 1.0, 0.0).cycles == 1000


@pytest.mark.parametrize("runs", [[1.0], [1.0, 2.0, 3.0]])
def test_other_runs_than_pieces_lists_the_pieces(runs):
    kernel = predict.Kernel(program([piece(0, 100), piece(100, 70, busy=64)], 12), 10, 1, runs)
    with pytest.raises(predict.MismatchError) as error:
        predict.predict([kernel], V6E, 1.0, 0.0)
    first, *pieces = str(error.value).splitlines()
    assert f"2 heavy pieces and its implementation's `executions` gives {len(runs)} runs" in first
    assert [line.split(", loops")[0] for line in pieces] == [
        "  0x0..0x64: 100 bundles, 100 cycles",
        "  0x64..0xaa: 70 bundles, 70 cycles",
    ]
    assert "4 matmuls" in pieces[1]


def test_passes():
    facts = {"program": program([piece(0, 100)], 12).plain(), "grid": 10, "calls": 1}
    names = ("op_forward", "op_backward_dq", "op_backward_dkv")
    sides = predict.passes(dict.fromkeys(names, facts), {name: [10] for name in names})
    assert {side: list(kernels) for side, kernels in sides.items()} == {
        "forward": [names[0]],
        "backward": [*names[1:]],
    }
    assert sides["forward"]["op_forward"].runs == [10]
    with pytest.raises(predict.MismatchError, match="gives no runs"):
        predict.passes({"op_forward": facts}, {"other": [10]})


def test_a_program_without_a_loop_is_not_counted():
    facts = {"program": program([piece(0, 100, depth=0)], None).plain(), "grid": 2, "calls": 1}
    with pytest.raises(predict.MismatchError, match="one step a core"):
        predict.passes({"op_forward": facts}, {"op_forward": [2]})


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_matrix_units_make_the_peak(chip: Target):
    """Makers round: v5e's clock is 1.503 GHz by its peak."""
    assert chip.matrix_flops == pytest.approx(chip.peak, rel=3e-3)


@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_targets_agree_with_jax(chip):
    from jax.experimental.pallas import tpu as pltpu

    with child.mesh(chip):
        info = pltpu.get_tpu_info()
    assert (info.num_mxus, info.mxu_column_size) == (chip.units, chip.side)
    assert info.vmem_capacity_bytes == chip.fast
    assert info.bf16_ops_per_second * chip.cores == pytest.approx(chip.peak, rel=5e-3)


def test_an_unknown_target_is_one_sentence():
    with pytest.raises(UsageError, match="no target 'v9'; there are: v5e, v5p"):
        target("v9")
