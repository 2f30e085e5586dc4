"""Language models written from their papers in float64 numpy: one document at a time, no batch.

Weights come from the flat dictionary of the real model, a layer at a time; nothing else is shared.
"""

import math

import numpy as np


def layer_norm(x, scale, bias, eps):
    """Ba et al., arXiv 1607.06450, equation 4."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def rms_norm(x, scale, eps):
    """Zhang and Sennrich, arXiv 1910.07467, equation 4."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def gelu(x, tanh):
    """Hendrycks and Gimpel, arXiv 1606.08415, section 2."""
    if tanh:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def silu(x):
    return x / (1 + np.exp(-x))


def turned(x, base):
    """Rotary positions on [n K], arXiv 2104.09864, with the pairs (i, i + K/2)."""
    n, K = x.shape
    angle = np.arange(n)[:, None] * base ** (-2 * np.arange(K // 2) / K)
    z = (x[:, : K // 2] + 1j * x[:, K // 2 :]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def attention(x, w, *, causal, rope_base=None, window=None, cap=None):
    """Equation 1 of arXiv 1706.03762 for each query head, with keys shared by groups of them."""
    n, (H, G, K) = len(x), (w["q"].shape[1], w["kv"].shape[2], w["q"].shape[2])
    y = np.zeros((n, w["out"].shape[2]))
    for h in range(H):
        g = h // (H // G)
        q, k, v = x @ w["q"][:, h], x @ w["kv"][:, 0, g], x @ w["kv"][:, 1, g]
        if "q_bias" in w:
            q, k, v = q + w["q_bias"][h], k + w["kv_bias"][0, g], v + w["kv_bias"][1, g]
        if rope_base is not None:
            q, k = turned(q, rope_base), turned(k, rope_base)
        scores = q @ k.T / math.sqrt(K)
        if cap is not None:
            scores = cap * np.tanh(scores / cap)
        for i in range(n):
            last = i + 1 if causal else n
            first = max(0, i + 1 - window) if window else 0
            e = np.exp(scores[i, first:last] - scores[i, first:last].max())
            y[i] += (e / e.sum()) @ v[first:last] @ w["out"][h]
    return y + w.get("out_bias", 0.0)


def under(params, prefix, index=None):
    """The weights below a path, of one layer of the stack where an index is given."""
    below = {p.removeprefix(prefix): a for p, a in params.items() if p.startswith(prefix)}
    return {p: np.float64(a if index is None else a[index]) for p, a in below.items()}


def gpt2(params, tokens, n_layers, eps):
    """Radford et al. 2019: norms before sublayers and one at the end, learned positions, tied."""
    E, n = np.float64(params["tokens"]), len(tokens)
    x = E[tokens] + np.float64(params["positions"])[:n]
    for i in range(n_layers):
        w = under(params, "blocks/0/", i)
        norm = lambda x, j, w=w: layer_norm(x, w[f"norms/{j}/scale"], w[f"norms/{j}/bias"], eps)
        x = x + attention(norm(x, 0), under(w, "mixer/"), causal=True)
        h = gelu(norm(x, 1) @ w["ffn/up"] + w["ffn/up_bias"], tanh=True)
        x = x + h @ w["ffn/down"] + w["ffn/down_bias"]
    last = under(params, "final_norm/")
    return layer_norm(x, last["scale"], last["bias"], eps) @ E.T


def llama(params, tokens, n_layers, eps, rope_base):
    """Touvron et al., arXiv 2302.13971, section 2.2, with the grouped queries of 2307.09288."""
    x = np.float64(params["tokens"])[tokens]
    for i in range(n_layers):
        w = under(params, "blocks/0/", i)
        h = rms_norm(x, w["norms/0/scale"], eps)
        x = x + attention(h, under(w, "mixer/"), causal=True, rope_base=rope_base)
        h = rms_norm(x, w["norms/1/scale"], eps)
        x = x + (silu(h @ w["ffn/up"][:, 0]) * (h @ w["ffn/up"][:, 1])) @ w["ffn/down"]
    last = np.float64(params["final_norm/scale"])
    return rms_norm(x, last, eps) @ np.float64(params["head/kernel"])


def bert(params, tokens, types, n_layers, eps):
    """Devlin et al., arXiv 1810.04805: norms after sublayers, and after the sum of embeddings."""
    E, n = np.float64(params["tokens"]), len(tokens)
    norm = lambda x, w, at: layer_norm(x, w[f"{at}scale"], w[f"{at}bias"], eps)
    x = E[tokens] + np.float64(params["positions"])[:n] + np.float64(params["types"])[types]
    x = norm(x, under(params, "embed_norm/"), "")
    for i in range(n_layers):
        w = under(params, "blocks/0/", i)
        x = norm(x + attention(x, under(w, "mixer/"), causal=False), w, "norms/0/")
        h = gelu(x @ w["ffn/up"] + w["ffn/up_bias"], tanh=False)
        x = norm(x + h @ w["ffn/down"] + w["ffn/down_bias"], w, "norms/1/")
    w = under(params, "head/")
    h = norm(gelu(x @ w["dense"] + w["dense_bias"], tanh=False), w, "norm/")
    return h @ E.T + w["bias"]


def gemma2(params, tokens, periods, eps, *, scale, window, cap, final_cap):
    """arXiv 2408.00118, section 2: local and global layers in turn, norms around sublayers, caps.

    The global layers have squared ReLU here, to show that a layer may have a network of its own.
    """
    x = scale * np.float64(params["tokens"])[tokens]
    for i in range(2 * periods):
        w = under(params, f"blocks/{i % 2}/", i // 2)
        norm = lambda x, j, w=w: rms_norm(x, w[f"norms/{j}/scale"], eps)
        reach, base = ((window, 100.0), (None, 10000.0))[i % 2]
        own = dict(causal=True, rope_base=base, window=reach, cap=cap)
        x = x + norm(attention(norm(x, 0), under(w, "mixer/"), **own), 2)
        h = norm(x, 1)
        if i % 2:
            h = np.maximum(h @ w["ffn/up"], 0) ** 2
        else:
            h = silu(h @ w["ffn/up"][:, 0]) * (h @ w["ffn/up"][:, 1])
        x = x + norm(h @ w["ffn/down"], 3)
    x = rms_norm(x, np.float64(params["final_norm/scale"]), eps)
    return final_cap * np.tanh(x @ np.float64(params["head/kernel"]) / final_cap)
