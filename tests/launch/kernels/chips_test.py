"""Limits of GPUs, how many blocks a core holds, and floors."""

import pytest

from launch.kernels import chips
from launch.kernels.targets import TARGETS
from launch.schema import UsageError

H200 = chips.chip("h200")


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_descriptions_agree_with_targets(name):
    chip, target = chips.chip(name), TARGETS[name]
    assert chip.cores == target.cores
    assert chip.shared_a_block == target.fast
    assert chip.bandwidth == pytest.approx(target.bandwidth, rel=1e-3)


def test_an_unknown_gpu_is_one_sentence():
    with pytest.raises(UsageError, match="'b200'; there are: h100, h200"):
        chips.chip("b200")


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "found"),
    [
        (168, 384, 1024, (1, "registers")),  # 12 warps x 168 x 32 = 64512 of 65536
        (168, 128, 1024, (3, "registers")),  # 21504 a block
        (65, 128, 1024, (7, "registers")),  # 65 is rounded to 72: 9216 a block
        (64, 256, 1024, (4, "registers")),
        (32, 256, 1024, (8, "registers")),  # threads bound as much: 2048 / 256
        (32, 128, 100_000, (2, "shared memory")),  # (100000 + 1024) x 2 of 233472
        (32, 1024, 1024, (2, "registers")),
        (16, 1024, 1024, (2, "threads")),
        (32, 128, 232_448, (1, "shared memory")),
        (32, 128, 232_449, (0, "shared memory")),
    ],
)
def test_occupancy_is_the_tightest_limit(registers, threads, shared, found):
    assert chips.occupancy(registers, threads, shared, H200) == found


def test_floors_are_of_the_chip():
    # 989.4 TFLOP/s, 4.8 TB/s, 16 exponentials a clock on 132 cores at 1.8295 GHz.
    found = chips.floors(989.4e12, 132 * 16 * 1.8295e9, 4.8e12, H200)
    assert found["tensor cores"] == pytest.approx(1e3, rel=1e-3)
    assert found["practical"] == pytest.approx(989e3 / 790, rel=1e-3)
    assert found["exponentials"] == pytest.approx(1e3)
    assert found["memory"] == pytest.approx(1e3)
    assert chips.floors(1e12, 0, 0, H200, "tf32")["tensor cores"] == pytest.approx(
        2 * chips.floors(1e12, 0, 0, H200)["tensor cores"]
    )
    assert chips.chip("h100").bandwidth == pytest.approx(3.352e12, rel=1e-3)


def test_a_device_is_known_by_what_it_calls_itself():
    assert chips.chip_of("NVIDIA H100 80GB HBM3") == chips.chip("h100")
    assert chips.chip_of("NVIDIA H200") == H200
    assert chips.chip_of("cpu") is None
