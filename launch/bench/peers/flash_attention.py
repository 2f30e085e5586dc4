"""Whom `flash_attention` is measured against, and what is wanted of it.

cuDNN and XLA's own through jax.nn, tokamax' Mosaic GPU kernel, torch's scaled_dot_product_attention
on cuDNN and on FlashAttention, and torch's compiled FlexAttention. Each is used as its manual says,
with the tiles that it chooses by itself, and declines what it does not offer.
"""

from collections.abc import Callable, Mapping

import jax

from launch.bench.contender import Case, Declined, Jax, Torch, imported
from launch.bench.target import Target

# Implementations of the op that are no kernels of this repository.
NOT_OURS = ("cudnn", "reference")
TARGETS = (
    Target("forward", "forward", "cuDNN (jax.nn)", 1.0, lambda spec: True),
    Target("backward", "backward", "tokamax mosaic", 1.25, lambda spec: True),
    Target("window", "forward", "torch FlexAttention", 1.5, lambda s: s.window is not None),
    Target("window", "backward", "torch FlexAttention", 1.5, lambda s: s.window is not None),
    Target("segments", "forward", "torch FlexAttention", 1.5, lambda s: s.documents > 0),
    Target("segments", "backward", "torch FlexAttention", 1.5, lambda s: s.documents > 0),
)


def peers() -> Mapping[str, Callable[[Case], Jax | Torch]]:
    """{name: from a case to the contender}, which raises Declined. In the order of the report."""
    return {
        "jax.nn xla": lambda case: Jax(_jax_nn("xla", case), case),
        "cuDNN (jax.nn)": lambda case: Jax(_jax_nn("cudnn", case), case),
        "tokamax mosaic": lambda case: Jax(_tokamax(case), case),
        "torch SDPA cuDNN": lambda case: _torch(case, _sdpa("CUDNN_ATTENTION")),
        "torch SDPA flash": lambda case: _torch(case, _sdpa("FLASH_ATTENTION")),
        "torch FlexAttention": lambda case: _torch(case, _flex),
    }


def _jax_nn(implementation: str, case: Case) -> Callable:
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise Declined("it runs on a GPU")
    _decline(case.spec, "window")
    _decline_value(case.spec)
    if implementation == "xla" and case.spec.L * (case.spec.S or case.spec.L) > 4096**2:
        raise Declined("it keeps every score, too many at this length")
    options = {"is_causal": case.spec.causal, "implementation": implementation}
    if case.spec.window is not None:
        options["local_window_size"] = _sides(case.spec)
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options)


def _tokamax(case: Case) -> Callable:
    tokamax = imported("tokamax")
    if jax.default_backend() == "cpu":
        raise Declined("its kernel runs on a GPU or a TPU")
    _decline(case.spec, "window", "softcap")
    options = {"is_causal": case.spec.causal, "logits_soft_cap": case.spec.softcap}
    if case.spec.window is not None:
        options["local_window_size"] = _sides(case.spec)
    return lambda q, k, v: tokamax.dot_product_attention(
        q, k, v, implementation="mosaic", **options
    )


def _torch(case: Case, function: Callable) -> Torch:
    torch = imported("torch")
    if jax.default_backend() == "tpu":
        raise Declined("it runs on a GPU or a CPU")
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise Declined("this torch does not see the GPU")
    return Torch(function, case)


def _sdpa(backend: str) -> Callable:
    def prepare(spec, arrays):
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if backend == "CUDNN_ATTENTION" and not arrays["q"].is_cuda:
            raise Declined("it runs on a GPU")
        _decline(spec)
        _decline_value(spec)
        scores = torch.nn.functional.scaled_dot_product_attention

        def run(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(getattr(SDPBackend, backend)):
                o = scores(q, k, v, is_causal=spec.causal, enable_gqa=q.shape[1] != k.shape[1])
            return o.transpose(1, 2)

        return run

    return prepare


def _flex(spec, arrays):
    import torch
    from torch.nn.attention import flex_attention as flex

    if spec.sinks:
        raise Declined("it takes no sinks")
    if spec.first and spec.documents:
        raise Declined("first keys of documents are not written as its mask here")
    S, device = spec.S or spec.L, arrays["q"].device
    seen = _mask(spec, S, arrays.get("q_segments"), arrays.get("kv_segments"))
    blocks = None
    if spec.causal or spec.window is not None or spec.documents:
        B = spec.B if spec.documents else None
        blocks = flex.create_block_mask(seen, B, None, spec.L, S, device=device)
    cap = spec.softcap
    score = (lambda s, b, h, i, j: cap * torch.tanh(s / cap)) if cap else None
    # Recompiled for each spec: what was compiled for other shapes or masks would make it general.
    torch._dynamo.reset()
    attend = flex.flex_attention
    if arrays["q"].is_cuda:
        attend = torch.compile(attend, dynamic=False)

    def run(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        o = attend(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=grouped)
        return o.transpose(1, 2)

    return run


def _mask(spec, S: int, q_segments, kv_segments) -> Callable:
    """Which pairs are seen, as FlexAttention asks for it: of indices, aligned at the end."""
    offset = S - spec.L

    def seen(b, h, i, j):
        distance = i + offset - j
        found = i >= 0
        if spec.causal:
            found = found & (distance >= 0)
        if spec.window is not None:
            near = distance < spec.window
            near = near if spec.causal else near & (-distance < spec.window)
            found = found & (near | (j < spec.first))
        if q_segments is not None:
            found = found & (q_segments[b, i] == kv_segments[b, j]) & (kv_segments[b, j] != 0)
        return found

    return seen


def _sides(spec) -> tuple[int, int]:
    """Keys seen before and after one's own."""
    return spec.window - 1, 0 if spec.causal else spec.window - 1


def _decline(spec, *offered: str) -> None:
    """Raises Declined for what a spec asks for and a peer does not offer."""
    if spec.S not in (None, spec.L):
        raise Declined("it aligns unequal lengths at the start")
    asked = {
        "segments": spec.documents,
        "first keys": spec.first,
        "softcap": spec.softcap,
        "sinks": spec.sinks,
        "window": spec.window,
    }
    for name, value in asked.items():
        if value and name not in offered:
            raise Declined(f"it takes no {name}")


def _decline_value(spec) -> None:
    if spec.V not in (None, spec.K):
        raise Declined("its values are as wide as its keys")
