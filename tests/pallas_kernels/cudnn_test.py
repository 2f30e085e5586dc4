"""cuDNN's attention as far as it goes without a GPU: what it is asked for, what it declines."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.flash_attention.specs import Spec

B, L, H, K = 2, 256, 8, 64
BFLOAT16 = jnp.bfloat16


@pytest.fixture
def on_a_gpu():
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    axes = {"axis_types": (AxisType.Auto,), "abstract_device": device}
    with use_abstract_mesh(AbstractMesh((1,), ("x",), **axes)):
        yield


def arrays(dtype=BFLOAT16, S=L, G=2, V=K):
    shapes = (B, L, H, K), (B, S, G, K), (B, S, G, V)
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def gradients(implementation="cudnn", **options):
    attend = functools.partial(flash_attention, implementation=implementation, **options)
    total = lambda *qkv: sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(attend(*qkv)))
    return jax.value_and_grad(total, (0, 1, 2))


def called(fn, *args):
    """[(cuDNN's function, its configuration)] of the program for CUDA."""
    text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r'custom_call @__cudnn\$(\w+)\(.*?backend_config = "(.*?)", ', text)
    decoded = lambda config: json.loads(config.replace("\\22", '"'))["cudnn_fmha_backend_config"]
    return [(name, decoded(config)) for name, config in found]


@pytest.mark.parametrize(
    ("options", "mask", "window"),
    [
        ({}, "CAUSAL", 0),
        ({"window": 100}, "CAUSAL", 100),
        ({"window": L}, "CAUSAL", 0),  # which is none
        ({"causal": False}, "NO_MASK", 0),
        ({"sinks": jnp.zeros(H)}, "CAUSAL", 0),
    ],
)
def test_forward_and_backward_ask_for_what_was_asked(on_a_gpu, options, mask, window):
    calls = called(gradients(scale=0.5, **options), *arrays())
    assert [name for name, _ in calls] == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    for _, config in calls:
        assert (config["mask_type"], config["sliding_window_length"]) == (mask, window)
        assert config["fmha_scale"] == 0.5
        assert config["dropout_rate"] == 0


def test_lse_can_be_had_and_its_gradient_is_anothers(on_a_gpu):
    fn = lambda *qkv: flash_attention(*qkv, return_lse=True, implementation="cudnn")
    _, lse = jax.eval_shape(fn, *arrays())
    assert (lse.shape, lse.dtype) == ((B, L, H), jnp.float32)
    assert [name for name, _ in called(fn, *arrays())] == ["fmhaSoftmax"]
    with pytest.raises(NotImplementedError, match="no gradient of lse"):
        called(gradients(return_lse=True), *arrays())


@pytest.mark.parametrize(
    ("options", "shapes", "message"),
    [
        ({"softcap": 30.0}, {}, "does not know of a soft cap"),
        ({"window": 9, "first": 4}, {}, "does not know of leading keys beyond a window"),
        ({"window": 9, "causal": False}, {}, "does not know of a window on both sides"),
        ({}, {"S": 2 * L}, "256 and 512 are to be aligned at the end"),
        ({}, {"dtype": jnp.float32}, "takes 16-bit floats, not float32"),
        ({}, {"V": 36}, "needs head sizes of 8 n, not 64 and 36"),
    ],
)
def test_what_it_cannot_do_is_declined_in_a_sentence(on_a_gpu, options, shapes, message):
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(gradients(**options), *arrays(**shapes))


def test_documents_are_declined(on_a_gpu):
    row = jnp.ones((B, L), jnp.int32)
    with pytest.raises(NotImplementedError, match="does not know of documents of packed rows"):
        jax.eval_shape(gradients(q_segments=row, kv_segments=row), *arrays())


def test_a_cpu_is_declined():
    with pytest.raises(NotImplementedError, match="cudnn is for a gpu, not a cpu"):
        jax.eval_shape(gradients(), *arrays())


def test_it_is_what_none_takes_on_a_gpu(on_a_gpu):
    calls = called(gradients(None), *arrays())
    assert [name for name, _ in calls] == ["fmhaSoftmax", "fmhaSoftmaxBackward"]


@pytest.mark.aot
@pytest.mark.parametrize(
    "spec",
    [
        Spec("local", "", B=1, L=512, H=4, G=2, K=64, window=128, sinks=True),
        Spec("full", "", B=1, L=512, H=2, K=128, causal=False),
    ],
    ids=lambda spec: spec.name,
)
def test_it_compiles_for_an_h200(spec):
    from launch.kernels import gpu, targets

    given = {n: jax.ShapeDtypeStruct(*x) for n, x in spec.abstract(BFLOAT16).items()}
    names = list(given)

    def program(*args):
        arrays = dict(zip(names, args, strict=True))
        options = spec.options | {"implementation": "cudnn"}
        total = lambda arrays: flash_attention(**arrays, **options).astype(jnp.float32).sum()
        return jax.grad(total)(arrays)

    compiled = gpu.lower(program, list(given.values()), targets.target("h200")).compile()
    for name in ("fmhaSoftmax", "fmhaSoftmaxBackward"):
        assert f"__cudnn${name}" in compiled.as_text()
