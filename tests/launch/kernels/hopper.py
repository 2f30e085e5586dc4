"""A small Mosaic GPU kernel with what a Hopper kernel has, to be compiled by tests."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

M, N, K, STEPS = 64, 64, 64, 4
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def product(x, y):
    """exp2(x @ y), x `[2 M, STEPS K]`, y `[STEPS K, N]`: one warpgroup loads, one multiplies."""

    def body(x_gmem, y_gmem, o_gmem, x_smem, y_smem, o_smem, full, empty):
        row = pl.ds(jax.lax.axis_index("row") * M, M)

        @pl.when(jax.lax.axis_index("role") == 0)
        def _multiply():
            plgpu.set_max_registers(240, action="increase")

            def step(_, acc):
                plgpu.barrier_wait(full)
                plgpu.wgmma(acc, x_smem, y_smem)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty)

            def multiply(acc):
                jax.lax.fori_loop(0, STEPS, lambda i, _: step(i, acc), None)
                return acc[...]

            o_smem[...] = jnp.exp2(pl.run_scoped(multiply, plgpu.ACC((M, N)))).astype(o_smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_smem, o_gmem.at[row])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(jax.lax.axis_index("role") == 1)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            def step(i, _):
                @pl.when(i > 0)
                def _wait():
                    plgpu.barrier_wait(empty)

                column = pl.ds(i * K, K)
                plgpu.copy_gmem_to_smem(x_gmem.at[row, column], x_smem, full)
                plgpu.copy_gmem_to_smem(y_gmem.at[column], y_smem, full)

            jax.lax.fori_loop(0, STEPS, step, None)

    tile = lambda *shape: plgpu.SMEM(shape, jnp.bfloat16, transforms=TILED)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((2 * M, N), jnp.bfloat16),
        scratch_types=[
            *(tile(M, K), tile(K, N), tile(M, N)),
            *(plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_arrivals=1)),
        ],
        grid=(2,),
        grid_names=("row",),
        num_threads=2,
        thread_name="role",
        kernel_name="product",
    )(x, y)


ARGUMENTS = (
    jax.ShapeDtypeStruct((2 * M, STEPS * K), jnp.bfloat16),
    jax.ShapeDtypeStruct((STEPS * K, N), jnp.bfloat16),
)
