"""Counts of a GPU kernel's machine instructions, where the CUDA toolkit's tools are on PATH.

PTX is not yet what runs: ptxas fuses, moves and drops. With `ptxas` and `nvdisasm` at hand the
kernel's PTX is assembled and taken apart again; jax's own compiler gives no machine code away.
"""

import collections
import pathlib
import re
import shutil
import subprocess

TOOLS = ("ptxas", "nvdisasm")
LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9.]*)", re.MULTILINE)
# Name in the facts -> how the instruction begins.
COUNTED = {
    "wgmma": "HGMMA",
    "tma_loads": "UTMALDG",
    "tma_stores": "UTMASTG",
    "exp2": "MUFU.EX2",
    "spill_stores": "STL",
    "spill_loads": "LDL",
}


def count(source: pathlib.Path, architecture: str = "sm_90a") -> dict[str, int] | None:
    """What a file of PTX becomes: COUNTED and `instructions`; None without the tools.

    Raises RuntimeError, with the tool's own words: ptxas does not take this PTX, as one of an older
    toolkit does not.
    """
    if not all(map(shutil.which, TOOLS)):
        return None
    binary = source.with_suffix(".cubin")
    _output("ptxas", f"-arch={architecture}", source, "-o", binary)
    return parse(_output("nvdisasm", "-c", binary))


def parse(text: str) -> dict[str, int]:
    """The counts of nvdisasm's output; padding behind the last instruction is not counted."""
    names = collections.Counter(name for name in LINE.findall(text) if name != "NOP")
    starts = lambda start: sum(n for name, n in names.items() if name.startswith(start))
    return {key: starts(start) for key, start in COUNTED.items()} | {"instructions": names.total()}


def _output(*command) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {said[0]}")
    return done.stdout
