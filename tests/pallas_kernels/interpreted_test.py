"""The race detectors detect: a kernel of each kind that does not wait, and one that does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from tests.pallas_kernels.interpreted import interpreted


def tpu_copy(waits: bool):
    """x copied to the output by a transfer that is read too early unless it is waited for."""

    def kernel(x, y, scratch, done):
        copy = pltpu.make_async_copy(x, scratch, done)
        copy.start()
        if waits:
            copy.wait()
        y[...] = scratch[...]
        if not waits:
            copy.wait()

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
    )


def gpu_copy(waits: bool):
    """x copied by one warpgroup through shared memory that another reads, too early or not."""

    def kernel(x, y, shared, written):
        @pl.when(lax.axis_index("group") == 0)
        def _():
            shared[...] = x[...]
            plgpu.barrier_arrive(written)

        @pl.when(lax.axis_index("group") == 1)
        def _():
            if waits:
                plgpu.barrier_wait(written)
            y[...] = shared[...]
            if not waits:
                plgpu.barrier_wait(written)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
        scratch_types=[plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()],
        num_threads=2,
        thread_name="group",
    )


@pytest.mark.parametrize(
    ("platform", "copy", "shape"), [("tpu", tpu_copy, (8, 128)), ("gpu", gpu_copy, (128,))]
)
def test_a_race_fails_and_waiting_does_not(platform, copy, shape):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    with interpreted(platform):
        np.testing.assert_array_equal(jax.jit(copy(True))(x), x)
    with pytest.raises(AssertionError, match="a kernel races"), interpreted(platform):
        jax.block_until_ready(jax.jit(copy(False))(x))


def test_a_program_without_a_kernel_is_no_proof():
    with pytest.raises(AssertionError, match="no kernel ran"), interpreted("tpu"):
        pass
