"""The Hopper kernel's gradients, interpreted on the CPU, against float64, and free of races.

Interpreted, as with `deterministic`, each tile of keys writes its part of dq for itself: sums in
device memory are what the interpreter does not know.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import blocks, gpu_backward
from pallas_kernels.flash_attention.gpu_backward import Backward
from pallas_kernels.flash_attention.reference import Options
from pallas_kernels.flash_attention.specs import Spec
from tests.pallas_kernels.attention_oracle import cotangents, oracle
from tests.pallas_kernels.interpreted import interpreted

COLUMNS = Backward(block_kv=64)


def spec(name: str, L: int, H: int = 1, K: int = 64, **options) -> Spec:
    return Spec(name, "ci", **({"B": 1} | options), L=L, H=H, K=K)


CASES = (
    (spec("full", 256, causal=False), None),
    (spec("causal", 300), None),
    (spec("more_keys_grouped", 100, S=250, H=2, G=1), None),
    (spec("more_queries", 250, S=130), None),
    (spec("window", 256, B=2, window=50), None),
    (spec("both_sides_leading", 200, S=330, causal=False, window=60, first=5), None),
    (spec("segments", 256, B=2, documents=3), None),
    (spec("softcap", 130, causal=False, softcap=1.5), None),
    (spec("all_leading_128", 200, H=2, G=1, K=128, window=30, first=3, softcap=2.0, documents=3),
     None),
    (spec("one_stage_128", 130, K=128, B=2), Backward(stages=1)),
    (spec("columns_128", 200, K=128), COLUMNS),
    (spec("padded_heads", 130, K=80, V=96), Backward(64, 128, 2)),
    (spec("causal_256", 130, K=256), None),
    (spec("all_256", 130, S=140, H=2, G=1, K=256, window=40, first=2, softcap=2.0, documents=2),
     None),
)  # fmt: skip


def given(case: Spec, dtype, segments=None):
    """Inputs in dtype, the truth about them, and what a forward pass would have kept."""
    inputs = {n: np.float32(jnp.asarray(x, dtype)) for n, x in case.inputs().items() if n in "qkv"}
    inputs |= segments or case.segments()
    do, dlse = cotangents(case)
    do = np.float32(jnp.asarray(do, dtype))
    true = oracle(case, inputs, do, dlse)
    dlse = np.where(np.isinf(true["lse"]), 0, dlse)
    return inputs, true, (true["o"], true["lse"], do, dlse)


def gradients(case: Spec, config: Backward | None, dtype, inputs, o, lse, do, dlse):
    options = Options(case.causal, case.window, case.softcap, case.K**-0.5, case.first)
    config = config or Backward()
    q, k, v, o, do = (jnp.asarray(x, dtype) for x in (*(inputs[n] for n in "qkv"), o, do))
    segments = (inputs.get(n) for n in ("q_segments", "kv_segments"))
    segments = tuple(None if x is None else jnp.asarray(x) for x in segments)
    floats = jnp.asarray(lse, jnp.float32), jnp.asarray(dlse, jnp.float32)

    def run(q, k, v, segments, o, lse, do, dlse):
        return gpu_backward.backward(q, k, v, *segments, o, lse, do, dlse, options, config)

    with interpreted("gpu"):
        return jax.device_get(jax.jit(run)(q, k, v, segments, o, floats[0], do, floats[1]))


def assert_close(ours, true, eps: float):
    for name, got in zip("qkv", ours, strict=True):
        # p, ds, o and the result are each rounded to eps, as is p once more for ds of heads of 256
        # and of a soft cap; a part of that stays, since terms are of either sign.
        size = np.abs(true[name]).max()
        np.testing.assert_allclose(
            np.float64(got), true[name], rtol=0, atol=3 * eps * size, err_msg=name
        )


@pytest.mark.parametrize(("case", "config"), CASES, ids=lambda x: getattr(x, "name", ""))
def test_gradients_equal_the_oracle(case, config):
    inputs, true, kept = given(case, jnp.bfloat16)
    assert_close(gradients(case, config, jnp.bfloat16, inputs, *kept), true, 2**-8)


def test_float16_is_eight_times_as_exact():
    case = spec("float16", 200, H=2, G=1)
    inputs, true, kept = given(case, jnp.float16)
    assert_close(gradients(case, None, jnp.float16, inputs, *kept), true, 2**-11)


def test_segments_in_any_order_with_their_leading_keys():
    case = spec("shuffled", 200, B=2, window=40, first=2, documents=1)
    ids = np.random.default_rng(0).integers(0, 4, (2, 200)).astype(np.int32)
    inputs, true, kept = given(case, jnp.bfloat16, {"q_segments": ids, "kv_segments": ids})
    assert_close(gradients(case, None, jnp.bfloat16, inputs, *kept), true, 2**-8)


@pytest.mark.parametrize("K", [64, 256])
def test_scores_far_below_zero_leave_no_nan(K):
    """The padding of keys has the score 0, and exp(0 - lse) would be infinite."""
    case = spec("low", 70, S=100, K=K, causal=False)
    inputs, _, _ = given(case, jnp.float16)
    inputs["q"], inputs["k"] = 4 * np.abs(inputs["q"]), -4 * np.abs(inputs["k"])
    do, dlse = cotangents(case)
    true = oracle(case, inputs, np.float32(jnp.asarray(do, jnp.float16)), dlse)
    assert true["lse"].max() < -30
    ours = gradients(case, None, jnp.float16, inputs, true["o"], true["lse"], do, dlse)
    # One key has nearly all of the weight, so that dp - delta cancels to what o is rounded by.
    assert_close(ours, true, 2**-8)


def test_what_each_tile_of_keys_visits():
    options = Options(True, 100, None, 1.0)
    kinds = blocks.kinds(64, 128, 256, 256, None, None, options)
    order, counts = gpu_backward.visits(kinds)
    for j in range(2):
        tiles = [(x // 4, x % 4) for x in order[0, j, : counts[0, j]]]
        assert tiles == [(i, kinds[0, i, j]) for i in range(4) if kinds[0, i, j]]


@pytest.mark.parametrize(
    ("K", "config"),
    [(64, COLUMNS), (256, Backward(block_kv=128)), (128, Backward(128)), (256, Backward(stages=2))],
)
def test_tiles_that_do_not_fit_are_errors(K, config):
    case = spec("small", 64, K=K)
    inputs, _, kept = given(case, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"block_q and block_kv of|take fewer"):
        gradients(case, config, jnp.bfloat16, inputs, *kept)
