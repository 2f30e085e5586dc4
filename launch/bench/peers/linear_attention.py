"""Whom `linear_attention` is measured against, and what is wanted of it.

flash-linear-attention's chunked kernels with its normaliser, fed by feature maps that torch
compiles; and cuDNN's causal softmax attention, which is what linear attention means to replace: it
computes something else, so its results are not compared.
"""

from collections.abc import Callable, Mapping

import jax

from launch.bench.contender import Case, Declined, Jax, Torch, imported
from launch.bench.target import Target

FLA, CUDNN = "fla chunk_linear_attn", "cuDNN softmax (jax.nn)"
# Peers that compute another result.
OTHERS = (CUDNN,)
TARGETS = (
    Target("forward", "forward", FLA, 5.0, lambda spec: spec.f > 0 and spec.L >= 4096),
    Target("both", "both", FLA, 5.0, lambda spec: spec.f > 0 and spec.L >= 4096),
    Target("softmax at 16k", "forward", CUDNN, 10.0, lambda spec: spec.L == 16384),
    Target("softmax at 64k", "forward", CUDNN, 40.0, lambda spec: spec.L == 65536),
)


def peers() -> Mapping[str, Callable[[Case], Jax | Torch]]:
    """{name: from a case to the contender}, which raises Declined. In the order of the report."""
    return {
        CUDNN: lambda case: Jax(_softmax(case), case),
        FLA: lambda case: Torch(_fla, _checked(case)),
    }


def _softmax(case: Case) -> Callable:
    if jax.default_backend() != "gpu":
        raise Declined("it runs on a GPU")
    if case.spec.documents:
        raise Declined("it takes no segments")

    def run(q, k, v, **others):
        del others
        options = {"is_causal": True, "implementation": "cudnn"}
        return jax.nn.dot_product_attention(q, k, v, **options)

    return run


def _checked(case: Case) -> Case:
    torch, _ = (imported(name) for name in ("torch", "fla.ops.linear_attn"))
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        raise Declined("its kernels run on a GPU")
    spec = case.spec
    if spec.documents or spec.state or spec.bias:
        raise Declined("segments, states and biases are not written for it here")
    if spec.features not in _maps(torch):
        raise Declined(f"features {spec.features!r} are not written for it here")
    return case


def _fla(spec, arrays):
    import torch
    from fla.ops.linear_attn import chunk_linear_attn

    groups = arrays["q"].shape[2] // arrays["k"].shape[2]
    form = _maps(torch)[spec.features]

    @torch.compile(dynamic=False)
    def features(x, weight):
        z = x if weight is None else torch.einsum("blhk,hkf->blhf", x, weight)
        return form(z.float()).to(x.dtype)

    def run(q, k, v, q_map=None, k_map=None):
        phi_q, phi_k = features(q, q_map), features(k, k_map)
        repeat = lambda x: x if groups == 1 else x.repeat_interleave(groups, 2)
        o, _ = chunk_linear_attn(phi_q, repeat(phi_k), repeat(v), scale=1.0, normalize=True)
        return o

    return run


def _maps(torch) -> Mapping[str, Callable]:
    both = lambda f: lambda z: torch.cat([f(z), f(-z)], -1)
    return {
        "identity": lambda z: z,
        "elu": lambda z: 1 + torch.nn.functional.elu(z),
        "relu": torch.relu,
        "exp": both(lambda z: torch.exp(z.clamp(-20, 20))),
        "softmax": both(lambda z: torch.softmax(z, -1)),
        "joint": lambda z: torch.softmax(torch.cat([2 * z, -2 * z], -1), -1),
    }
