"""The Hopper kernels' gradients of linear attention, interpreted, against float64; no races."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.linear_attention import gpu_backward, reference
from pallas_kernels.linear_attention.gpu_backward import Backward
from pallas_kernels.linear_attention.reference import Arrays, Options
from pallas_kernels.linear_attention.specs import Spec
from tests.pallas_kernels.interpreted import interpreted

# What the specs that every implementation is held to have not: two consumers, parts and pieces.
CASES = (
    (Spec("wide", "ci", B=1, L=200, H=1, K=128, f=128, documents=2), None),
    (Spec("packed_pieces", "ci", B=2, L=200, H=1, K=64, f=64, documents=4, lag=30, state=True),
     Backward(pieces=2, stages=1)),
    (Spec("grouped_parts", "ci", B=1, L=140, H=2, G=1, K=64, V=128, f=128, documents=3, state=True),
     Backward(stages=1)),
    (Spec("parts_of_values", "ci", B=1, L=200, H=2, K=24, V=200, features="identity", state=True),
     Backward(pieces=2)),
)  # fmt: skip


def given(case: Spec, dtype) -> tuple:
    """Inputs in dtype, o, total and cotangents, and the true gradients."""
    floats = lambda n, x: np.asarray(jnp.asarray(x, dtype)) if n in ("q", "k", "v") else x
    inputs = {n: floats(n, x) for n, x in case.inputs().items()}
    arrays = Arrays(*(inputs.get(n) for n in Arrays._fields))
    rng, options = np.random.default_rng(1), Options(case.features)
    exact = lambda x: x if x is None or x.dtype == np.int32 else jnp.asarray(x, jnp.float64)
    with jax.enable_x64(True):
        wide = Arrays(*map(exact, arrays))
        o, total, *state = jax.jit(functools.partial(reference.forward, options=options))(wide)
        draw = lambda x: np.float32(jnp.bfloat16(rng.standard_normal(x.shape)))
        cotangents = [draw(x) for x in (o, total, *state)]
        back = functools.partial(reference.backward, options=options)
        wider = map(jnp.float64, cotangents)
        true = jax.device_get(jax.jit(back)(wide, None, None, *wider))
        kept = np.asarray(jnp.asarray(o, dtype)), np.float32(total)
    cotangents[0] = np.asarray(jnp.asarray(cotangents[0], dtype))
    return arrays, (*kept, *cotangents), true


def gradients(case: Spec, config: Backward | None, arrays: Arrays, rest: tuple) -> tuple:
    run = functools.partial(gpu_backward.backward, options=Options(case.features))
    run = jax.jit(functools.partial(run, config=config or Backward()))
    with interpreted("gpu"):
        return jax.device_get(run(arrays, *rest))


def assert_close(found: tuple, true: tuple, eps: float):
    for name, ours, exact in zip(Arrays._fields, found, true, strict=False):
        assert (ours is None) == (exact is None), name
        if exact is not None:
            # Features, weights, g and the states between chunks are each rounded to eps.
            size = max(1.0, np.abs(exact).max())
            np.testing.assert_allclose(
                np.float64(ours), exact, rtol=0, atol=3 * eps * size, err_msg=name
            )


@pytest.mark.parametrize(("case", "config"), CASES, ids=lambda x: getattr(x, "name", ""))
def test_gradients_equal_the_oracle(case, config):
    arrays, rest, true = given(case, jnp.bfloat16)
    assert_close(gradients(case, config, arrays, rest), true, 2**-8)


def test_float16_is_eight_times_as_exact():
    case = Spec("float16", "ci", B=1, L=100, H=1, K=64, features="elu")
    arrays, rest, true = given(case, jnp.float16)
    assert_close(gradients(case, None, arrays, rest), true, 2**-11)


@pytest.mark.parametrize("fields", [dict(queries_f=96), dict(block_v=256), dict(pieces=0)])
def test_sizes_that_no_kernel_has_are_errors(fields):
    with pytest.raises(ValueError, match=r"is one of|at least 1"):
        Backward(**fields)


def test_heads_that_share_keys_leave_no_registers_for_256_features():
    case = Spec("shared", "ci", B=1, L=64, H=2, G=1, K=8, f=8)
    arrays, rest, _ = given(case, jnp.bfloat16)
    with pytest.raises(ValueError, match="leave registers for keys_f up to 128"):
        gradients(case, Backward(keys_f=256), arrays, rest)


@pytest.mark.parametrize(
    ("size", "pieces"), [((4, 4096, 32), 1), ((2, 16384, 16), 4), ((1, 300, 2), 1)]
)
def test_rows_are_cut_to_keep_multiprocessors_busy(size, pieces):
    B, L, H = size
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        assert gpu_backward.heuristic(B, L, H, H, 256, 128).pieces == pieces
