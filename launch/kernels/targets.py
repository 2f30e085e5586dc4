"""The accelerators that kernels are compiled for, and what their makers say of them.

TPU: matrix units, their shape, vector memory and HBM are those of JAX's `pallas.tpu.get_tpu_info`
(jax/_src/tpu_info.py) and of cloud.google.com/tpu/docs (v5e, v5p, v6e, tpu7x). The clock is not
published for all of them: it is peak / (2 x units x shape x rows a cycle), which gives the known
1.75 GHz of v5p, and the tests hold the four to each other. From v6e on a unit takes two rows a
cycle: its busy cycles in the compiler's tables of slot use are 8 for 16 rows.
GPU: NVIDIA's data sheets (H100 SXM5, H200 SXM), dense bfloat16; the clock is the boost clock.

A Target is one jax device: a v5p chip is one device of two TensorCores ("megacore"), a TPU7x chip
is two devices of one.
"""

import dataclasses

from launch.schema import UsageError


@dataclasses.dataclass(frozen=True)
class Target:
    """One jax device of an accelerator.

    platform: 'tpu' or 'gpu'.  device_kind: as `dispatch.device_kind()` gives it.
    topology, accelerator: of the real compiler: `get_topology_desc` and TPU_ACCELERATOR_TYPE.
    cores: that one kernel may use: TensorCores, or streaming multiprocessors.
    clock: Hz.  peak: bfloat16 FLOP/s.  bandwidth: HBM bytes/s.  memory: HBM bytes.
    fast: bytes of vector memory a TensorCore, or shared memory a block.
    units, side, rows: matrix units a TensorCore, each [side side], taking `rows` rows a cycle.
    """

    name: str
    platform: str
    device_kind: str
    topology: str
    accelerator: str
    cores: int
    clock: float
    peak: float
    bandwidth: float
    memory: float
    fast: int
    units: int = 0
    side: int = 0
    rows: int = 1

    @property
    def matrix_flops(self) -> float:
        """FLOP/s of all matrix units, for bfloat16 in full tiles; 0 if their shape is not given."""
        return 2 * self.cores * self.units * self.side**2 * self.rows * self.clock


MIB = 2**20
TARGETS = {
    target.name: target
    for target in (
        Target(
            "v5e", "tpu", "TPU v5 lite", "v5e:2x2", "v5litepod-4", 1, 1.5e9, 197e12, 819e9, 16e9,
            128 * MIB, 4, 128,
        ),
        Target(
            "v5p", "tpu", "TPU v5", "v5p:2x2x1", "v5p-8", 2, 1.75e9, 459e12, 2765e9, 95e9,
            64 * MIB, 4, 128,
        ),
        Target(
            "v6e", "tpu", "TPU v6 lite", "v6e:2x2", "v6e-4", 1, 1.75e9, 918e12, 1640e9, 32e9,
            128 * MIB, 2, 256, 2,
        ),
        Target(
            "tpu7x", "tpu", "TPU7x", "tpu7x:2x2x1", "tpu7x-8", 1, 2.2e9, 1153.5e12, 3690e9, 96e9,
            64 * MIB, 2, 256, 2,
        ),
        Target(
            "h100", "gpu", "NVIDIA H100 80GB HBM3", "1x1x1", "", 132, 1.98e9, 989.4e12, 3352e9,
            80e9, 227 * 1024,
        ),
        Target(
            "h200", "gpu", "NVIDIA H200", "1x1x1", "", 132, 1.98e9, 989.4e12, 4800e9, 141e9,
            227 * 1024,
        ),
    )
}  # fmt: skip


def target(name: str) -> Target:
    """The target of this name. Raises UsageError, which names those that there are."""
    if name not in TARGETS:
        raise UsageError(f"there is no target {name!r}; there are: {', '.join(TARGETS)}")
    return TARGETS[name]
