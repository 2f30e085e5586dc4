"""The Hopper kernels of linear attention, interpreted on the CPU, against float64, without races.

The interpreter runs barriers, loads and stores by TMA and warpgroups as threads; products are sums
of ordinary values there. What the contract's shapes leave out is here: values in two warpgroups,
two heads a thread block, wide heads, pieces of rows, and maps whose exponentials overflow.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_attention import gpu_maps, pallas_gpu, reference, specs
from pallas_kernels.linear_attention.pallas_gpu import Config
from pallas_kernels.linear_attention.reference import Arrays, Options
from tests.pallas_kernels.flash_attention_gpu_test import hopper
from tests.pallas_kernels.interpreted import interpreted

# The features, the weights and the state are rounded to 8 or 11 bits before products, o after.
ROUNDED = {"bfloat16": 2**-8, "float16": 2**-11}


def drawn(dtype=jnp.bfloat16, **sizes) -> Arrays:
    spec = specs.Spec("drawn", "", **sizes)
    own = lambda n, x: jnp.asarray(x, dtype if n in specs.PRODUCTS else x.dtype)
    return Arrays(**{n: own(n, x) for n, x in spec.inputs().items()})


def exact(arrays: Arrays, features: str):
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(np.asarray(x), x.dtype if x.dtype == jnp.int32 else float)
        rounded = arrays._replace(
            **{n: getattr(arrays, n).astype(arrays.q.dtype) for n in ("q_map", "k_map")}
        ) if arrays.q_map is not None else arrays  # fmt: skip
        return jax.device_get(reference.forward(jax.tree.map(wide, rounded), Options(features)))


def check(arrays: Arrays, features: str, config: Config):
    options = Options(features, config)
    with interpreted("gpu"):
        found = jax.device_get(jax.jit(lambda a: pallas_gpu.forward(a, options))(arrays))
    rounding = ROUNDED[arrays.q.dtype.name]
    for ours, true in zip(found, exact(arrays, features), strict=True):
        error = np.abs(np.asarray(ours, np.float64) - true).max()
        assert error <= 1.5 * rounding * max(1.0, np.abs(true).max())


CASES = {
    "two warpgroups, 256 features": (
        dict(B=1, L=130, H=1, K=128, V=128, f=128, state=True), Config(),
    ),
    "two heads a block, in pieces": (
        dict(B=1, L=200, H=4, K=64, G=2, f=40, documents=3, state=True), Config(2, 2),
    ),
    "pieces without segments": (
        dict(B=1, L=330, H=1, K=64, V=192, features="elu"), Config(1, 3),
    ),
    "identity, wide": (dict(B=1, L=64, H=1, K=200, V=64, features="identity"), Config()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_forward(name):
    sizes, config = CASES[name]
    check(drawn(**sizes), sizes.get("features", "softmax"), config)


def test_float16_with_biases():
    sizes = dict(B=1, L=64, H=1, K=64, V=64, features="joint", f=64, bias=True)
    check(drawn(jnp.float16, **sizes), "joint", Config())


@pytest.mark.parametrize("form", ["softmax", "joint"])
@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
def test_exponentials_of_any_size(form, spread):
    z = spread * np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    z[0] = 500.0
    z[1, :32], z[1, 32:] = 400.0, -300.0
    halves = [x if s is None else x * s[:, None] for x, s in gpu_maps.of(form, jnp.array(z), 64)]
    signed = np.stack([z, -z], 1).astype(np.float64)
    signed *= 2 if form == "joint" else 1
    axes = (1, 2) if form == "joint" else 2
    true = np.exp(signed - signed.max(axes, keepdims=True))
    true /= true.sum(axes, keepdims=True)
    for ours, half in zip(halves, true.swapaxes(0, 1), strict=True):
        # A product with log2 e is rounded to 24 bits of numbers up to 2000.
        np.testing.assert_allclose(ours, half, rtol=4e-4, atol=2.0**-60)


def test_declines():
    x = jnp.ones((1, 8, 1, 64), jnp.bfloat16)
    long, wide = jnp.ones((1, 8, 1, 256), x.dtype), jnp.ones((1, 256, 128), jnp.float32)
    call = lambda features, *arrays: pallas_gpu.forward(Arrays(*arrays), Options(features))
    for kind, features, arrays, sentence in [
        ("NVIDIA A100-SXM4-40GB", "elu", (x, x, x), "needs compute capability 9.0"),
        ("NVIDIA H200", "elu", [x.astype(jnp.float32)] * 3, "not float32: cast"),
        ("NVIDIA H200", "taylor", (x, x, x), "no 'taylor' features"),
        ("NVIDIA H200", "exp", [long] * 3, "256 features, not 512"),
        ("NVIDIA H200", "softmax", (long, long, x, wide, wide), "bytes of shared memory"),
    ]:
        with hopper(kind=kind), pytest.raises(NotImplementedError, match=sentence):
            jax.eval_shape(lambda arrays, f=features: call(f, *arrays), tuple(arrays))


def test_config_names_its_limits():
    for field in ("stages", "pieces"):
        with pytest.raises(ValueError, match=f"{field} must be at least 1, not 0"):
            Config(**{field: 0})
    x = jnp.ones((1, 8, 1, 128), jnp.bfloat16)
    weight = jnp.ones((1, 128, 128), jnp.float32)
    options = Options("softmax", Config(stages=2))
    with hopper(), pytest.raises(ValueError, match="2 stages of keys of 128 columns"):
        jax.eval_shape(lambda *a: pallas_gpu.forward(Arrays(*a), options), *[x] * 3, *[weight] * 2)


def test_heuristic_keeps_multiprocessors_busy():
    like = lambda B, L, H, D: Arrays(*[jax.ShapeDtypeStruct((B, L, H, D), jnp.bfloat16)] * 3)
    with hopper(cores=132):
        found = {
            (B, H): pallas_gpu.heuristic(like(B, 16384, H, 128), Options("elu")).pieces
            for B, H in ((4, 32), (2, 16), (1, 8))
        }
    assert found == {(4, 32): 1, (2, 16): 4, (1, 8): 16}
