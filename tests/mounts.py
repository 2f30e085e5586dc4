"""A disk of a few megabytes for one process: a mount that nobody else sees, and ends with it."""

import functools
import subprocess

import pytest

WAYS = (["unshare", "--user", "--map-root-user", "--mount"], ["unshare", "--mount"])


@functools.cache
def private() -> list[str]:
    """The command before a command that may mount; the test is skipped where nothing lets it."""
    told = ""
    for way in WAYS:
        try:
            mount = [*way, "mount", "-t", "tmpfs", "none", "/mnt"]
            done = subprocess.run(mount, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            pytest.skip(f"no small disk can be mounted here: {error}")
        if done.returncode == 0:
            return way
        told = done.stderr.strip()
    pytest.skip(f"no small disk can be mounted here: {told}")
