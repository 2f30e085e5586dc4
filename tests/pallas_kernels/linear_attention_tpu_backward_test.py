"""The TPU's backward kernels in the interpreter, with its race detector, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention import reference, tpu_backward, tpu_backward_sweeps
from pallas_kernels.linear_attention.reference import Arrays, Options
from pallas_kernels.linear_attention.specs import Spec
from pallas_kernels.linear_attention.tpu_backward import Backward
from tests.pallas_kernels.interpreted import interpreted

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8}


def spec(name: str, L: int, **more) -> Spec:
    return Spec(name, "", **({"B": 1, "H": 1, "K": 8} | more), L=L)


CASES = [
    # Steps of one chunk; no map, so that z itself is turned; rows that end inside of a chunk.
    (spec("elu", 300, features="elu"), Backward(T=128, C=128, R=1)),
    # Two groups of heads share a key head, whose gradients and those of the state are parts.
    (
        spec("groups", 200, B=2, H=4, G=1, f=12, bias=True, documents=4, state=True),
        Backward(T=256, C=128, R=2),
    ),
    # Chunks wider than a row of lanes, and keys that come later than their queries.
    (
        spec("lagging", 300, features="exp", f=8, bias=True, documents=3, lag=30, V=24),
        Backward(T=256, C=256, R=1),
    ),
    # A bias would see the padding, whose keys the gradient of the last state reaches.
    (spec("padded", 140, features="relu", f=8, bias=True, state=True), Backward(256, 128, 1)),
]


def cast(inputs, dtype):
    return {n: jnp.asarray(x, dtype if n in "qkv" else x.dtype) for n, x in inputs.items()}


def compared(spec: Spec, config: Backward, dtype: str):
    """{argument: (the kernel's gradient, that of the definition in float64)}."""
    options, inputs = Options(spec.features), cast(spec.inputs(), dtype)
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(np.float64(x)) if jnp.issubdtype(x.dtype, jnp.floating) else x
        exact = Arrays(**{n: wide(x) for n, x in inputs.items()})
        kept = jax.jit(reference.forward, static_argnums=1)(exact, options)
        cotangents = [np.float32(jnp.bfloat16(rng.standard_normal(x.shape))) for x in kept]
        args = exact, *kept[:2], *map(np.float64, cotangents)
        true = jax.jit(reference.backward, static_argnums=7)(*args, options)
        true = [None if x is None else np.asarray(x) for x in true]
        o, total = (np.float64(x) for x in kept[:2])
    kept = jnp.asarray(o, dtype), jnp.asarray(total, jnp.float32)
    cotangents[0] = jnp.asarray(cotangents[0], dtype)
    with interpreted("tpu"):
        run = jax.jit(lambda *args: tpu_backward.backward(*args, options, config))
        ours = [
            None if x is None else np.float64(x) for x in run(Arrays(**inputs), *kept, *cotangents)
        ]
    assert [x is None for x in ours] == [x is None for x in true]
    pairs = zip(Arrays._fields, ours, true, strict=False)
    return {n: (got, want) for n, got, want in pairs if want is not None}


@pytest.mark.parametrize(("spec", "config"), CASES, ids=lambda x: getattr(x, "name", ""))
def test_gradients_equal_the_definition(spec, config, monkeypatch):
    monkeypatch.setattr(tpu_backward_sweeps, "MOST", 2)  # so that short rows take many steps too
    found = compared(spec, config, "float32")
    assert set(found) == set(spec.differentiable)
    for name, (ours, true) in found.items():
        # Sums of some hundred terms of order 1, and o and total rounded: within 32 eps.
        atol = 32 * EPS["float32"] * max(1.0, np.abs(true).max())
        np.testing.assert_allclose(ours, true, rtol=0, atol=atol, err_msg=name)


def test_bfloat16_sums_in_float32():
    found = compared(spec("bf16", 300, f=16), Backward(T=256, C=128, R=1), "bfloat16")
    for name, (ours, true) in found.items():
        # o is rounded by 2^-9 of itself, which gradients of q see as a change of each weight.
        atol = 6 * EPS["bfloat16"] * max(1.0, np.abs(true).max())
        np.testing.assert_allclose(ours, true, rtol=0, atol=atol, err_msg=name)


def test_each_step_is_counted_once():
    shape = spec("grouped", 1000, B=3, H=8, G=2)
    runs = tpu_backward.executions(shape, Backward(T=256, C=128, R=2))
    # The states of a row's 8 chunks are one step's work.
    assert runs == {tpu_backward.STATES: [3 * 2], tpu_backward.NAME: [3 * 4 * 4]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"C": 100}, "C 100 is no multiple of 128"),
        ({"T": 300}, "T 300 is no multiple of C 128"),
        ({"R": 0}, "R 0 query heads are none"),
    ],
)
def test_errors_are_sentences(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Backward(T=256, C=128, R=1), **change)


def test_heads_must_divide_those_of_a_key_head():
    given = {n: jnp.zeros(*array) for n, array in CASES[1][0].abstract("float32").items()}
    arrays, config = Arrays(**given), Backward(T=128, C=128, R=3)
    kept = arrays.q, arrays.q[..., 0]
    args = arrays, *kept, *kept, arrays.values, arrays.keys, Options("softmax")
    with pytest.raises(ValueError, match="R 3 does not divide 4 query heads"):
        tpu_backward.backward(*args, config)


@pytest.mark.parametrize("kind", ["TPU v5e", "TPU v5p", "TPU v6e", "TPU7x"])
@pytest.mark.parametrize("L", [1, 300, 4096, 65537])
@pytest.mark.parametrize("heads", [1, 3, 8, 32])
@pytest.mark.parametrize("sizes", [(8, 8, 16), (128, 128, 256), (256, 512, 512)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_the_heuristic_chooses_fits_the_memory(kind, L, heads, sizes, dtype):
    (K, V, F), size = sizes, jnp.dtype(dtype).itemsize
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        config = tpu_backward.heuristic(L, heads, K, V, F, dtype)
        room = pltpu.get_tpu_info().vmem_capacity_bytes
    lanes = [-(-x // 128) * 128 for x in (K, V)]
    token = sum(lanes) * (2 * config.R + 3) * size + lanes[1] * F * size // config.C
    assert 2 * config.T * token <= room // 2
    assert heads % config.R == 0
    assert -(-L // config.T) * config.T < L + config.C * -(-L // config.T)
