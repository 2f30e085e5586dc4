"""The platform follows what is plugged in and installed, unless the user has chosen."""

import os
import subprocess
import sys

import pytest

from launch import platform
from launch.files import ROOT

PLUGIN = "jax_cuda13_plugin"


@pytest.mark.parametrize(
    ("devices", "packages", "environ", "expected"),
    [
        (set(), set(), {}, "cpu"),
        (set(), {"libtpu", PLUGIN}, {}, "cpu"),
        ({"tpu"}, set(), {}, "cpu"),
        ({"tpu"}, {"libtpu"}, {}, "tpu,cpu"),
        ({"gpu"}, set(), {}, "cpu"),
        ({"gpu"}, {"libtpu"}, {}, "cpu"),
        ({"gpu"}, {PLUGIN}, {}, "cuda,cpu"),
        ({"gpu"}, {"jax_plugins.xla_cuda13"}, {}, "cuda,cpu"),
        ({"gpu"}, {PLUGIN}, {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        ({"gpu"}, {PLUGIN}, {"CUDA_VISIBLE_DEVICES": "0"}, "cuda,cpu"),
        ({"gpu", "tpu"}, {PLUGIN, "libtpu"}, {}, "tpu,cpu"),
        ({"gpu"}, {PLUGIN}, {"JAX_PLATFORMS": "cpu"}, "cpu"),
        (set(), set(), {"JAX_PLATFORMS": "cuda"}, "cuda"),
        ({"tpu"}, {"libtpu"}, {"JAX_PLATFORMS": ""}, ""),
    ],
)
def test_pick(devices, packages, environ, expected):
    assert platform.pick(devices, packages, environ) == expected


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine before jax is imported, with what a test plugs into it."""

    def plug(devices, packages):
        monkeypatch.setattr(platform, "present", lambda: devices)
        monkeypatch.setattr(platform, "installed", lambda: packages)
        return {"XDG_CACHE_HOME": str(tmp_path)}

    monkeypatch.delitem(sys.modules, "jax", raising=False)
    return plug


def test_choose_sets_platform_and_cache(machine, tmp_path, capsys):
    environ = machine({"gpu"}, {PLUGIN})
    assert platform.choose(environ) == "cuda,cpu"
    assert environ["JAX_PLATFORMS"] == "cuda,cpu"
    cache = environ["JAX_COMPILATION_CACHE_DIR"]
    assert cache.startswith(str(tmp_path / "meshwork" / "xla-"))
    assert os.path.isdir(cache)
    assert capsys.readouterr().err == ""


def test_choose_leaves_what_the_user_has_set(machine):
    environ = machine({"gpu"}, {PLUGIN})
    environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""}
    before = dict(environ)
    assert platform.choose(environ) == "cpu"
    assert environ == before


def test_choose_tells_of_unused_hardware(machine, capsys):
    assert platform.choose(machine({"gpu"}, set())) == "cpu"
    assert "uv sync --extra cuda" in capsys.readouterr().err
    assert platform.choose(machine({"tpu"}, {PLUGIN})) == "cpu"
    assert "uv sync --extra tpu" in capsys.readouterr().err
    assert platform.choose(machine({"gpu"}, set()) | {"CUDA_VISIBLE_DEVICES": "-1"}) == "cpu"
    assert capsys.readouterr().err == ""


def test_no_cache_where_no_folder_can_be_made(machine, tmp_path):
    environ = machine(set(), set())
    (tmp_path / "file").write_text("")
    environ["XDG_CACHE_HOME"] = str(tmp_path / "file")
    platform.choose(environ)
    assert "JAX_COMPILATION_CACHE_DIR" not in environ


def test_nothing_happens_once_jax_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", object())
    environ = {}
    assert platform.choose(environ) == ""
    assert environ == {}


def test_devices_are_device_nodes_with_numbers(monkeypatch, tmp_path):
    for name in ("accel0", "nvidia1"):
        (tmp_path / name).touch()
    for name in ("accel", "vfio"):
        (tmp_path / name).mkdir()
    (tmp_path / "vfio" / "vfio").touch()
    monkeypatch.setattr(platform, "_nvidia_smi", lambda: False)
    nodes = lambda patterns: tuple(str(tmp_path / pattern[5:]) for pattern in patterns)
    monkeypatch.setattr(platform, "TPU_NODES", nodes(platform.TPU_NODES))
    monkeypatch.setattr(platform, "GPU_NODES", nodes(platform.GPU_NODES))
    assert platform.present() == {"tpu", "gpu"}
    (tmp_path / "accel0").unlink()
    (tmp_path / "nvidia1").unlink()
    assert platform.present() == set()
    (tmp_path / "vfio" / "3").touch()
    assert platform.present() == {"tpu"}


def test_a_real_process_stays_clean_and_imports_no_jax(tmp_path):
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environ["XDG_CACHE_HOME"] = str(tmp_path)
    code = "import sys; from launch.platform import choose; print(choose(), 'jax' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    platforms, imported = done.stdout.split()
    assert platforms in ("cpu", "cuda,cpu", "tpu,cpu")
    assert imported == "False"


PEAK = """
import resource, sys
from launch.platform import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory({})
import ctypes
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = 24 << 20
for _ in range(20):
    at = libc.malloc(size)
    ctypes.memset(at, 1, size)
    libc.free(at)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def _libc_is_glibc():
    return sys.platform == "linux" and os.confstr("CS_GNU_LIBC_VERSION") is not None


@pytest.mark.skipif(not _libc_is_glibc(), reason="the C library is not glibc")
def test_freed_memory_is_kept():
    """Page faults of 20 turns of one large buffer: those of one turn, not of twenty.

    The buffer is below glibc's own moving threshold, so a MALLOC_ variable pins that first.
    """
    environ = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    run = lambda how: subprocess.run(
        [sys.executable, "-c", PEAK, how], env=environ, capture_output=True, text=True, check=True
    )
    kept, plain = int(run("keep").stdout), int(run("plain").stdout)
    pages = (24 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert plain - kept > 10 * pages


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_the_users_own_allocator_settings_win(name):
    assert platform.keep_memory({name: "1"}) is False
