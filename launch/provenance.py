"""Where a number came from: the commit that ran, and the processor it ran on."""

import functools
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")
RESULTS = "experiments/results"  # written from runs and read by none, so it changes no number


@functools.cache
def commit(root: pathlib.Path = ROOT) -> str | None:
    """The commit of the sources, with `+changes` where files differ from it; None outside of git.

    Results are left out: a report that was just written does not make the next run another one.
    """
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", ".", f":(exclude){RESULTS}")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+changes" if changed else head


def _git(root: pathlib.Path, *command: str) -> str:
    asked = dict(cwd=root, capture_output=True, check=True, text=True, timeout=30)
    return subprocess.run(["git", *command], **asked).stdout.strip()


def processor() -> dict:
    """The host's processor, and how many of its cores this process may use."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return {"kind": next(names, platform.machine()), "cores": cores()}


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of Python, whose library is the quickstart's corpus, and of what computes and saves."""
    return {"python": platform.python_version()} | {n: metadata.version(n) for n in packages}


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
