"""Eight virtual CPU devices, no silent rank promotion, shapes checked against annotations."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of the tests' time, and the values do not depend on how well it is done.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook(["models", "pallas_kernels", "training"], "beartype.beartype")
# The same examples each time; `--hypothesis-profile=default` looks for others.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """What is kept of dear computations, for this session alone."""
    os.environ["MESHWORK_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Each file's compiled programs go with it: a process may hold 65,530 memory maps, and the
    compiler dies of a segmentation fault at the first program beyond them."""
    yield
    jax.clear_caches()


def pytest_terminal_summary(terminalreporter):
    """The slowest files, so that a budget that is exceeded has a name."""
    seconds: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                file = report.nodeid.partition("::")[0]
                seconds[file] = seconds.get(file, 0.0) + report.duration
    terminalreporter.section("slowest files")
    for file, spent in sorted(seconds.items(), key=lambda item: -item[1])[:12]:
        terminalreporter.write_line(f"{spent:7.1f} s  {file}")
    terminalreporter.write_line(f"{sum(seconds.values()):7.1f} s  in all")
