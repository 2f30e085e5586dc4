"""Eight virtual CPU devices, silent rank promotion forbidden, shapes checked against annotations."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of the tests' time, and the values do not depend on how well it is done.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

from jaxtyping import install_import_hook

install_import_hook(["models", "pallas_kernels", "training"], "beartype.beartype")
