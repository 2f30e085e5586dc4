"""Which platform JAX shall start on. Call `choose` before anything imports jax.

Left alone, jax with libtpu or a CUDA plugin installed probes for hardware that may not be there,
prints errors about it, and can wait for minutes for a TPU's metadata server.
"""

import ctypes
import glob
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, MutableMapping

# On hosts with a TPU, chips are /dev/accel0.. (up to v4) or numbered VFIO groups (since v5e). The
# folder /dev/accel and the file /dev/vfio/vfio are there on other machines too.
TPU_NODES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
GPU_NODES = ("/dev/nvidia[0-9]*",)
# glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD, with the bytes to try in turn: older
# ones take 32 MiB at most for the first.
MALLOC_OPTIONS = {-3: (1 << 30, 32 << 20), -1: ((2 << 30) - 1,), -2: (64 << 20,)}
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_plugins.xla_cuda13")


def choose(environ: MutableMapping[str, str] = os.environ) -> str:
    """Sets JAX_PLATFORMS and the compilation cache, where the user has not; returns the platforms.

    Says one sentence on stderr where hardware stays unused because a package is missing. Does
    nothing once jax is imported, which has read its variables by then.

    The cache makes a second start of the same program compile nothing that took over a second. It
    is set by environment because worker processes inherit it.
    """
    if "jax" in sys.modules:
        return environ.get("JAX_PLATFORMS", "")
    if "JAX_PLATFORMS" not in environ:
        devices = present()
        environ["JAX_PLATFORMS"] = pick(devices, installed(), environ)
        _tell_unused(devices, environ)
    if "JAX_COMPILATION_CACHE_DIR" not in environ and (folder := _cache(environ)) is not None:
        environ["JAX_COMPILATION_CACHE_DIR"] = folder
    if environ["JAX_PLATFORMS"] == "cpu":
        keep_memory(environ)
    return environ["JAX_PLATFORMS"]


def keep_memory(environ: Mapping[str, str]) -> bool:
    """Has glibc keep freed memory instead of returning it to the kernel; whether it does now.

    XLA's temporaries on the CPU are buffers of megabytes, which glibc by default unmaps when they
    are freed, so that every step faults all its pages in anew. Measured on the quickstart: half of
    the time. The user's own MALLOC_ variables win; other C libraries are left alone.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in environ):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # A list: every option is set, whatever became of the one before.
    return all([any(mallopt(option, n) for n in sizes) for option, sizes in MALLOC_OPTIONS.items()])


def pick(devices: Collection[str], packages: Collection[str], environ: Mapping[str, str]) -> str:
    """The value of JAX_PLATFORMS: the user's own, else what is both plugged in and installed.

    devices: what is plugged in, of 'tpu' and 'gpu'.  packages: those of libtpu and CUDA_PLUGINS
    that can be imported.  jax starts every platform named and raises if one fails; the CPU is
    always among them for computations on the host.
    """
    if "JAX_PLATFORMS" in environ:
        return environ["JAX_PLATFORMS"]
    if "tpu" in devices and "libtpu" in packages:
        return "tpu,cpu"
    if "gpu" in devices and set(CUDA_PLUGINS) & set(packages) and not _hidden(environ):
        return "cuda,cpu"
    return "cpu"


def _tell_unused(devices: Collection[str], environ: Mapping[str, str]) -> None:
    if not devices or environ["JAX_PLATFORMS"] != "cpu" or (_hidden(environ) and "gpu" in devices):
        return
    name, extra = ("TPU", "tpu") if "tpu" in devices else ("GPU", "cuda")
    print(
        f"a {name} is here and unused, because jax's packages for it are not installed: "
        f"uv sync --extra {extra}",
        file=sys.stderr,
    )


def present() -> set[str]:
    """Accelerators plugged into this machine."""
    found = {"tpu"} if any(glob.glob(node) for node in TPU_NODES) else set()
    if any(glob.glob(node) for node in GPU_NODES) or _nvidia_smi():
        found.add("gpu")
    return found


def installed() -> set[str]:
    """Which of the packages for accelerators can be imported, found without importing them."""
    return {name for name in ("libtpu", *CUDA_PLUGINS) if _findable(name)}


def _findable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # The parent package is missing.
        return False


def _nvidia_smi() -> bool:
    """Whether the driver lists a GPU: WSL has no device nodes, and images hold the tool alone."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and b"GPU " in listed.stdout


def _hidden(environ: Mapping[str, str]) -> bool:
    """Whether the user has hidden all GPUs from CUDA."""
    return environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")


def _cache(environ: Mapping[str, str]) -> str | None:
    """A folder for this sort of processor, None where none can be made.

    Programs for the CPU use its instructions, jax's cache key does not name them, and unlike
    machines share home folders.
    """
    home = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = pathlib.Path(home, "meshwork", f"xla-{_processor()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(folder)


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:8]
