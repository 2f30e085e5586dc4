"""The Hopper GPUs that kernels are compiled for: their limits, and the least time of a task.

What XLA is told of a GPU is in NAME.txtpb, and the limits are read from there.
"""

import dataclasses
import functools
import pathlib
import re

from launch.schema import UsageError

FOLDER = pathlib.Path(__file__).parent
# A Hopper core (SM) at the clock for which its maker states 989 TFLOP/s; what matrix products
# reach under the power limit is 790.
CLOCK = 1.8295e9
FLOPS_A_CLOCK = {"bf16": 4096, "f16": 4096, "tf32": 2048, "e4m3": 8192, "e5m2": 8192}
EXPS_A_CLOCK = 16
PRACTICAL = 790 / 989
BLOCK_RESERVES = 1024  # bytes of shared memory


@dataclasses.dataclass(frozen=True)
class Chip:
    """Limits of one GPU: cores (SMs); threads, 32-bit registers, bytes of shared memory a core.

    shared_a_block: bytes that one block may have.  bandwidth: of the memory, bytes/s.
    """

    cores: int
    threads: int
    registers: int
    shared: int
    shared_a_block: int
    bandwidth: float


def description(name: str) -> str:
    """What XLA is told of a GPU, as text. Raises UsageError: it is not known."""
    path = FOLDER / f"{name}.txtpb"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.txtpb")))
        raise UsageError(f"there is no description of a GPU {name!r}; there are: {known}")
    return path.read_text(encoding="utf-8")


@functools.cache
def chip(name: str) -> Chip:
    """The limits of a GPU, from its description. Raises UsageError."""
    numbers = re.findall(r"^\s*(\w+): ([\d.]+)$", description(name), re.MULTILINE)
    value = {key: float(number) for key, number in numbers}
    return Chip(
        cores=int(value["core_count"]),
        threads=int(value["threads_per_core_limit"]),
        registers=int(value["registers_per_core_limit"]),
        shared=int(value["shared_memory_per_core"]),
        shared_a_block=int(value["shared_memory_per_block_optin"]),
        bandwidth=value["memory_bandwidth"],
    )


def chip_of(device_kind: str) -> Chip | None:
    """The limits of the GPU that a device calls itself; None where it has no description here."""
    names = (path.stem for path in FOLDER.glob("*.txtpb"))
    found = [name for name in names if name.upper() in device_kind]
    return chip(found[0]) if found else None


def occupancy(registers: int, threads: int, shared: int, chip: Chip) -> tuple[int, str]:
    """(blocks that a core holds at once, what bounds them); 0 where not even one fits.

    A warp gets registers in pieces of 256, a block 1 KiB of shared memory beyond its own.
    """
    warps = -(-threads // 32)
    a_block = warps * (-(-registers * 32 // 256) * 256)
    fits = {
        "registers": chip.registers // a_block,
        "shared memory": chip.shared // (shared + BLOCK_RESERVES),
        "threads": chip.threads // (warps * 32),
    }
    if shared > chip.shared_a_block:
        fits["shared memory"] = 0
    limit = min(fits, key=fits.get)
    return fits[limit], limit


def floors(flops: float, exps: float, traffic: float, chip: Chip, dtype: str = "bf16") -> dict:
    """Least milliseconds by each unit, whatever the kernel: {'tensor cores': ms, ...}.

    Args:
      flops: of matrix products.  exps: exponentials.  traffic: bytes to and from memory.
      dtype: of the products' operands, a key of FLOPS_A_CLOCK.

    `practical` is that of the tensor cores at 790 of 989 TFLOP/s, which is what the largest matrix
    products reach.
    """
    a_second = chip.cores * CLOCK
    tensor = 1e3 * flops / (a_second * FLOPS_A_CLOCK[dtype])
    return {
        "tensor cores": tensor,
        "practical": tensor / PRACTICAL,
        "exponentials": 1e3 * exps / (a_second * EXPS_A_CLOCK),
        "memory": 1e3 * traffic / chip.bandwidth,
    }
