"""Matrix products of rows sorted by group, each group with a matrix of its own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch

__all__ = ["IMPLEMENTATIONS", "grouped_matmul"]

# The modules, in the order in which implementation=None tries them, and the platform of those that
# are for one. Each offers `forward` and `backward`. What no GPU has run yet is asked for by name.
IMPLEMENTATIONS = {"pallas_tpu": "tpu", "xla": None, "pallas_gpu": "gpu", "reference": None}
TUNED = ("pallas_tpu", "pallas_gpu")
# Which rows are whose is known where all rows are, so nothing is split.
WHOLE = {
    0: {0: "rows of x", 1: "width of x"},
    1: {0: "groups of w", 1: "rows of w", 2: "columns of w"},
    2: {0: "groups of sizes"},
}


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"],
    sizes: Int[Array, " G"],
    *,
    implementation: str | None = None,
    config: Any = None,
) -> Float[Array, "M N"]:
    """Each row of x times the matrix of its group: `y_m = x_m w_g` for row m of group g.

    The first sizes[0] rows are of group 0, the next sizes[1] of group 1, and so on; a group may be
    empty. Rows from sum(sizes) on are of none: they give 0 and get gradient 0, whatever they hold,
    NaN included.

    Sums are float32 and products of the inputs' dtype, those of float32 at full accuracy.
    Differentiable once, in reverse mode: `dx_m = dy_m w_g^T`, and `dw_g` is the sum of
    `x_m^T dy_m` over the rows of group g, 0 for an empty one. It runs on one shard: no dimension
    may be split over an Explicit mesh axis of more than one device.

    Args:
      x: rows, sorted by group.
      w: a matrix for each group, of x's dtype.
      sizes: rows of each group, not negative, at most M in all.
      implementation: name in IMPLEMENTATIONS; None takes the first that can.
      config: of the named implementation, its module's Config.

    Returns:
      y [M N] in x's dtype.

    Raises:
      ValueError: shapes, dtypes or config do not fit, an unknown implementation, or a dimension
        that is split.
      NotImplementedError: a named implementation cannot do this.

    Source: MegaBlocks, arXiv 2211.15841, section 3: experts of a mixture without dropped tokens.
    """
    _check(x, w, sizes)
    if config is not None and implementation not in TUNED:
        known = ", ".join(TUNED)
        raise ValueError(
            f"config {config} is for one of the implementations {known}: name the one."
        )
    return _product(config, implementation, *dispatch.vary(x, w, sizes.astype(jnp.int32)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(config: Any, implementation: str | None, *args):
    choices = dispatch.choices(__name__, IMPLEMENTATIONS, "forward")

    def run(*args):
        return dispatch.like(args, dispatch.pick(choices, implementation, *args, config))

    follow = lambda x, w, sizes: PartitionSpec(x[0], w[2])
    return dispatch.local(run, follow=follow, whole=WHOLE)(*args)


def _product_fwd(config: Any, implementation: str | None, *args):
    return _product(config, implementation, *args), args


def _product_bwd(config: Any, implementation: str | None, args, dy):
    choices = dispatch.choices(__name__, IMPLEMENTATIONS, "backward")

    def run(*args):
        return dispatch.like(args, dispatch.pick(choices, implementation, *args, config))

    return *dispatch.local(run, follow=(0, 1), whole=WHOLE)(*args, dy), None


_product.defvjp(_product_fwd, _product_bwd)


def _check(x, w, sizes):
    if (x.ndim, w.ndim, sizes.ndim) != (2, 3, 1):
        shapes = f"x {x.shape}, w {w.shape}, sizes {sizes.shape}"
        raise ValueError(f"A grouped product takes x [M K], w [G K N], sizes [G], not {shapes}.")
    if x.shape[1] != w.shape[1]:
        raise ValueError(
            f"x {x.shape} has rows of {x.shape[1]}, but the matrices of w {w.shape} take rows of "
            f"{w.shape[1]}: K of x [M K] and w [G K N] must be equal."
        )
    if sizes.shape != w.shape[:1]:
        raise ValueError(
            f"sizes {sizes.shape} are of {sizes.shape[0]} groups, but w {w.shape} has matrices for "
            f"{w.shape[0]}: give one size for each."
        )
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x and w need one floating dtype, not {x.dtype} and {w.dtype}: cast one of them."
        )
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(f"sizes count rows, but are {sizes.dtype}: give integers, as in int32.")
