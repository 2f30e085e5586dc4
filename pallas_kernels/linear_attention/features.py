"""Feature maps of linear attention: how a query or a key becomes positive features.

With z = x W + b (x itself without W), of width f:

- identity  x are features already, F = f; they must not be negative
- elu       1 + elu(z), F = f (Katharopoulos et al., arXiv 2006.16236, eq. 7)
- relu      max(z, 0), F = f (T2R, arXiv 2103.13076, eq. 5)
- exp       [exp z, exp -z], F = 2 f, |z| bounded by BOUND (Hedgehog, arXiv 2402.04347, section 4.2)
- softmax   [softmax z, softmax -z], F = 2 f (LoLCATs, arXiv 2410.10254, its released code)
- joint     softmax [2z, -2z], F = 2 f (flash-linear-attention's Hedgehog)
- taylor    [1, z / c, vec(z z^T) / (sqrt 2 c^2)], c = f^(1/4), F = 1 + f + f^2, so that features
            multiply to 1 + s + s^2 / 2 with s = z_q . z_k / sqrt f (Based, arXiv 2402.18668)

The three forms of Hedgehog are different models: normalising a key's features weighs that key.
Deviation: LoLCATs' code bounds every feature by 1e-12 from below. Here none is bounded, and where
softmax or joint have no feature in common with any key seen, the sum of weights may be as small as
the eps of the denominator, and the output nearer to 0 than a mean of values.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

FORMS = ("identity", "elu", "relu", "exp", "softmax", "joint", "taylor")
BOUND = 20.0  # of z in 'exp': products of two features stay far inside float32


def count(form: str, f: int) -> int:
    """F, the features that a map of width f gives.

    Raises:
      ValueError: an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"features {form!r} are unknown; known: {', '.join(FORMS)}")
    return {"exp": 2 * f, "softmax": 2 * f, "joint": 2 * f, "taylor": 1 + f + f * f}.get(form, f)


def of(form: str, z):
    """Features [... F] of z [... f], both in float32 or wider."""
    match form:
        case "identity":
            return z
        case "elu":
            return jnp.where(z > 0, 1 + z, jnp.exp(jnp.minimum(z, 0)))
        case "relu":
            return jnp.maximum(z, 0)
        case "exp":
            z = jnp.clip(z, -BOUND, BOUND)
            return jnp.concatenate([jnp.exp(z), jnp.exp(-z)], -1)
        case "softmax":
            return jnp.concatenate([jax.nn.softmax(z, -1), jax.nn.softmax(-z, -1)], -1)
        case "joint":
            return jax.nn.softmax(jnp.concatenate([2 * z, -2 * z], -1), -1)
        case "taylor":
            scaled = z * z.shape[-1] ** -0.25
            square = scaled[..., :, None] * scaled[..., None, :] * 2**-0.5
            square = square.reshape(*z.shape[:-1], -1)
            return jnp.concatenate([jnp.ones_like(z[..., :1]), scaled, square], -1)
    raise ValueError(f"features {form!r} are unknown; known: {', '.join(FORMS)}")


def project(x, weight, bias):
    """z [... h f] in float32 or wider from x [... h K], weight [h K f] and bias [h f], or None."""
    exact = jnp.promote_types(x.dtype, jnp.float32)
    if weight is None:
        return x.astype(exact)
    z = dot("...hk,hkf->...hf", x, weight.astype(x.dtype))
    return z if bias is None else z + bias.astype(exact).reshape((1,) * (z.ndim - 2) + bias.shape)


def dot(subscripts: str, a, b):
    """An einsum whose sums are float32 or wider, of factors rounded to their dtypes."""
    exact = jnp.promote_types(a.dtype, jnp.float32)
    if dispatch.platform() == "cpu":  # XLA has no product of 16-bit factors for every layout there
        a, b = a.astype(exact), b.astype(exact)
    return jnp.einsum(subscripts, a, b, preferred_element_type=exact)
