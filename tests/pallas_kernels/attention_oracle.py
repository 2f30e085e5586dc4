"""Attention by brute force in float64, pair by pair as the docstring says it."""

import itertools

import numpy as np

from pallas_kernels.flash_attention.specs import Spec


def mask(spec: Spec, q_segments=None, kv_segments=None) -> np.ndarray:
    """[B L S]: which keys each query sees."""
    L, S = spec.shapes["q"][1], spec.shapes["k"][1]
    seen = np.zeros((spec.B, L, S), bool)
    ids = np.zeros((spec.B, S)) if kv_segments is None else kv_segments
    earlier = [[(row[:j] == row[j]).sum() for j in range(S)] for row in ids]
    for b, i, j in itertools.product(range(spec.B), range(L), range(S)):
        ahead = j - (i + S - L)
        ok = not (spec.causal and ahead > 0)
        near = spec.window is None or abs(ahead) < spec.window
        ok = ok and (near or earlier[b][j] < spec.first)
        if q_segments is not None:
            ok = ok and q_segments[b, i] == kv_segments[b, j] != 0
        seen[b, i, j] = ok
    return seen


def cotangents(spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Normal do [B L H V] and dlse [B L H], float32."""
    rng = np.random.default_rng(1)
    B, L, H, _ = spec.shapes["q"]
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    return draw(B, L, H, spec.shapes["v"][3]), draw(B, L, H)


def oracle(spec: Spec, inputs, do, dlse) -> dict[str, np.ndarray]:
    """o, lse and the gradients of q, k, v and sinks, in float64, one head at a time."""
    q, k, v, do, dlse = (np.float64(x) for x in (*(inputs[n] for n in "qkv"), do, dlse))
    seen = mask(spec, inputs.get("q_segments"), inputs.get("kv_segments"))
    o, lse = np.zeros_like(do), np.full(dlse.shape, -np.inf)
    dq, dk, dv, dsinks = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(spec.H)
    scale, R = spec.K**-0.5, spec.H // k.shape[2]
    sinks = np.exp(np.float64(inputs.get("sinks", np.full(spec.H, -np.inf))))
    for b, h in itertools.product(range(spec.B), range(spec.H)):
        g = h // R
        s = scale * q[b, :, h] @ k[b, :, g].T
        slope = 1.0
        if spec.softcap is not None:
            s = spec.softcap * np.tanh(s / spec.softcap)
            slope = 1 - (s / spec.softcap) ** 2
        e = np.where(seen[b], np.exp(s), 0)
        total = e.sum(1) + sinks[h]
        some = total > 0
        p = e / np.where(some, total, 1)[:, None]
        lse[b, some, h] = np.log(total[some])
        o[b, :, h] = p @ v[b, :, g]
        dp = do[b, :, h] @ v[b, :, g].T
        change = dp - (p * dp).sum(1, keepdims=True) + dlse[b, :, h, None]
        ds = scale * slope * p * change
        dq[b, :, h] = ds @ k[b, :, g]
        dk[b, :, g] += ds.T @ q[b, :, h]
        dv[b, :, g] += p.T @ do[b, :, h]
        # A sink is a key of value 0.
        share = sinks[h] / np.where(some, total, 1)
        dsinks[h] += (share * (dlse[b, :, h] - (p * dp).sum(1))).sum()
    grads = {"q": dq, "k": dk, "v": dv} | ({"sinks": dsinks} if "sinks" in inputs else {})
    return {"o": o, "lse": lse} | grads
