"""Shared memory of the gradients' sweeps: rings of tiles, what fits, and the call of a kernel."""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention import gpu_tiles as tiles

FLOAT32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


class Ring:
    """Slots of shared memory that the producer fills and the consumers free, by turns."""

    def __init__(self, full, empty, stages: int):
        self.full, self.empty, self.stages = full, empty, stages

    def slot(self, n):
        return lax.rem(n, jnp.int32(self.stages))

    def claim(self, n):
        """(slot, barrier for the copies) of the n-th tile, once the slot is free."""
        slot = self.slot(n)
        pl.when(n >= self.stages)(lambda: plgpu.barrier_wait(self.empty.at[slot]))
        return slot, self.full.at[slot]

    def wait(self, n):
        """The slot of the n-th tile, once it is full."""
        slot = self.slot(n)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def free(self, n):
        plgpu.barrier_arrive(self.empty.at[self.slot(n)])

    def drain(self, count: int):
        """Who waits on a barrier at all must have seen its last arrival before the kernel ends."""
        for n in range(max(count - self.stages, 0), count):
            plgpu.barrier_wait(self.empty.at[n % self.stages])


def matrix(dtype, *shape):
    """Tiles of shared memory as tensor cores and TMA take them."""
    transforms = FLOAT32 if jnp.dtype(dtype).itemsize == 4 else tiles.TILED
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def barriers(plan, arrivals: dict[str, int], stages: dict[str, int]) -> dict:
    made = {}
    for name, count in arrivals.items():
        n = stages[name]
        made[f"{name}_full"] = plgpu.Barrier(num_arrivals=count, num_barriers=n)
        made[f"{name}_empty"] = plgpu.Barrier(num_arrivals=plan.consumers, num_barriers=n)
    return made


def shared(scratch: dict) -> int:
    """Bytes of shared memory: buffers begin at multiples of 1024; barriers need less."""
    buffers = [x for x in scratch.values() if not isinstance(x, plgpu.Barrier)]
    sizes = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in buffers)
    return sum(-(-size // 1024) * 1024 for size in sizes) + 1023


def fit(plan, form, dtype) -> dict[str, int]:
    """Stages of each ring: more for the first of `form.ORDER`, as shared memory allows.

    Raises:
      ValueError: not even one stage fits.
    """
    stages = dict.fromkeys(form.ORDER, 1)
    size = lambda stages: shared(form.scratch(plan, dtype, stages))
    if size(stages) > tiles.SHARED:
        raise ValueError(
            f"{plan.f} features and {plan.v} columns of values a thread block need {size(stages)} "
            f"bytes of shared memory, but there are {tiles.SHARED}: take fewer."
        )
    for _ in range(plan.stages - 1):
        for name in form.ORDER:
            more = stages | {name: stages[name] + 1}
            stages = more if size(more) <= tiles.SHARED else stages
    return stages


def call(form, plan, dtype, name: str, inputs: dict, outputs: dict):
    """Runs a sweep; arrays by name, outputs as their types; returns the outputs by name."""
    stages = fit(plan, form, dtype)
    names = (*inputs, *outputs)

    def body(*refs, **scratch):
        sweep = form(plan, stages, **dict(zip(names, refs, strict=True)), **scratch)
        loads = sweep.wg == plan.consumers
        pl.when(loads)(lambda: _with_registers(plan, sweep.produce, 32, "decrease"))
        pl.when(~loads)(lambda: _with_registers(plan, sweep.consume, 240, "increase"))

    kernel = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=form.scratch(plan, dtype, stages),
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=plan.consumers + 1,
        thread_name="wg",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return dict(zip(outputs, kernel(*inputs.values()), strict=True))


def _with_registers(plan, run, count: int, action: str):
    if plan.consumers > 1:  # one consumer and the producer have enough to begin with
        plgpu.set_max_registers(count, action=action)
    run()
