"""What is read of PTX, against counts by hand of what the compiler printed for hopper.product."""

import dataclasses
import pathlib

import pytest

from launch.kernels import chips, ptx

PRINTED = pathlib.Path(__file__).parent / "data" / "product_printed.txt"
LAUNCH = ptx.Launch((2, 1, 1), (256, 1, 1), (1, 1, 1), 24592)
H200 = chips.chip("h200")
LOSS = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to insufficient register resources for the wgmma pipeline in the function "
    "'product_mosaic_gpu_kernel'\n"
)


def printed():
    return PRINTED.read_text(encoding="utf-8")


def kernel(text, launch=LAUNCH):
    ((_, source, account),) = ptx.split(text)
    return ptx.parse(source, account, launch, H200)


def test_a_kernel_is_counted_as_by_hand():
    found = kernel(printed())
    assert (found.registers, found.spill_stores, found.spill_loads, found.stack) == (240, 0, 0, 0)
    assert found.shared == 24592 + 1
    assert (found.named_barriers, found.barriers, found.threads) == (16, 2, 256)
    assert found.setmaxnreg == (240, 40)
    assert found.wgmma == {"m64n64k16.bf16": 4}
    assert (found.tma_loads, found.tma_stores, found.tma_reductions) == (8, 1, 0)
    assert (found.bulk_copies, found.reductions) == (0, 0)
    assert (found.exp2, found.bar_sync, found.arrives, found.waits) == (32, 14, 9, 4)
    assert found.warnings == ()


def test_the_loop_that_multiplies_is_found_and_the_unrolled_one_is_none():
    (loop,) = kernel(printed()).loops
    # One n64 takes 32 clocks. By hand: 6 until data is there, 8 for wgmma, 3 after, 2 of the loop.
    clocks = {"tensor cores": 4 * 32.0, "exponentials": 0.0, "issue": 19.0}
    assert loop == ptx.Loop(0, {"m64n64k16.bf16": 4}, 4 * 2 * 64 * 64 * 16, 0, 0, 1, clocks)


def test_loops_nest_and_share_their_labels():
    body = """
$L__BB0_1:
	wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, p, 1, 1, 0, 0;
$L__BB0_2:
	@%p1 bra 	$L__BB0_9;
	ex2.approx.ftz.f32 %r1, %r2; ex2.approx.ftz.f32 %r2, %r3;
	{ .reg .pred p; wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r1}, %rd1, %rd2; }
	@%p2 bra 	$L__BB0_2;
	bra.uni 	$L__BB0_2; // ex2.approx.f32 in a comment is none
$L__BB0_9:
	@!%p3 bra 	$L__BB0_1;
	bra.uni 	$L__BB0_10;
$L__BB0_10:
	wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r1}, %rd1, %rd2;
"""
    outer, inner = ptx._Program(body).loops()
    assert (outer.depth, inner.depth) == (0, 1)
    assert outer.wgmma == {"m64n256k16.bf16": 1, "m64n8k8.tf32": 1}
    assert inner.wgmma == {"m64n8k8.tf32": 1}
    assert (outer.flops, inner.flops) == (2 * 64 * (256 * 16 + 8 * 8), 2 * 64 * 8 * 8)
    assert outer.exp2 == inner.exp2 == 2
    # 8192 FLOPs at 2048 a clock; 2 x 128 exponentials at 16; plain branches are not counted.
    assert inner.clocks == {"tensor cores": 4.0, "exponentials": 16.0, "issue": 4.0}


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("@%p1 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier [a]", "tma_loads"),
        ("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier.multicast::cluster", "tma_loads"),
        ("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [a]", "tma_stores"),
        ("@%p2 cp.reduce.async.bulk.tensor.3d.global.shared::cta.add [a]", "tma_reductions"),
        ("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [a]", "tma_reductions"),
        ("cp.async.bulk.global.shared::cta.bulk_group [a]", "bulk_copies"),
        ("red.global.add.f32 [a], %f1;", "reductions"),
        ("atom.global.add.u32 %r1, [a], 1;", "reductions"),
        ("mbarrier.arrive.expect_tx.shared.b64 %rd1, [a], 3;", "arrives"),
        ("mbarrier.init.shared::cta.b64 [a], 1;", "barriers"),
    ],
)
def test_an_instruction_counts_under_its_name(line, field):
    before, after = kernel(printed()), kernel(printed().replace("\tret;", f"\t{line}\n\tret;"))
    changed = {f.name for f in dataclasses.fields(ptx.Kernel)}
    changed = {n for n in changed if getattr(before, n) != getattr(after, n)}
    assert changed == {field}
    assert getattr(after, field) == getattr(before, field) + 1


def test_spills_and_losses_are_told():
    text = printed().replace("0 bytes spill stores, 0 bytes", "16 bytes spill stores, 20 bytes")
    text = text.replace("    0 bytes stack", "    24 bytes stack")
    found = kernel(
        text.replace("ptxas info    : 0 bytes gmem", LOSS + "ptxas info    : 0 bytes gmem")
    )
    assert (found.stack, found.spill_stores, found.spill_loads) == (24, 16, 20)
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("(C7510) Potential Performance Loss")


def test_kernels_are_told_apart_and_nothing_is_guessed():
    other = (
        printed().replace("product_mosaic", "other_mosaic").replace("240 registers", "90 registers")
    )
    first, second = ptx.split(printed() + other)
    assert first[0] == "product_mosaic_gpu_kernel"
    assert second[0] == "other_mosaic_gpu_kernel"
    assert ptx.parse(*second[1:], LAUNCH, H200).registers == 90
    silent = "\n".join(x for x in printed().splitlines() if not x.startswith("ptxas"))
    with pytest.raises(RuntimeError, match="ptxas printed nothing"):
        list(ptx.split(silent))
    mixed = printed().replace("entry function 'product", "entry function 'other")
    with pytest.raises(RuntimeError, match="ptxas printed 'other_mosaic_gpu_kernel'"):
        list(ptx.split(mixed))
    with pytest.raises(RuntimeError, match="registers"):
        kernel(printed().replace("Used 240 registers, ", ""))


def test_waves_count_all_cores():
    found = kernel(printed(), dataclasses.replace(LAUNCH, grid=(132, 3, 1)))
    assert (found.occupancy, found.waves) == (1, 3.0)
