"""With a TPU's compiler installed and no TPU there, nothing but our own lines is on stderr."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from launch.files import ROOT
from launch.platform import present
from tests import tiny

# What train itself writes: the opening line and the progress bar with its scores.
OWN = re.compile(r"[\d,]+ parameters \(.*|(held-out: )? *\d+%\|.*|step +\d+ +held-out .*|")


@pytest.mark.aot
def test_train_is_quiet_where_libtpu_finds_no_tpu(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: uv sync --extra aot")
    if "tpu" in present():
        pytest.skip("there is a TPU")
    chosen = ("JAX_", "XLA_", "TPU_", "LIBTPU_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(chosen)}
    environ["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    own = tiny.flags(tiny.corpus(tmp_path / "corpus"), steps=2, train__eval_every=1)
    command = [sys.executable, "-m", "launch.train", "--config", "base"]
    done = subprocess.run(
        [*command, "--workdir", str(tmp_path / "run"), *own],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = re.split(r"[\r\n]+", done.stderr)
    assert [line for line in lines if not OWN.fullmatch(line.strip())] == []
    assert "held-out: " in done.stdout
