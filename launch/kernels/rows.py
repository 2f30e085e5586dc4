"""One row of the table a pass: compiles a job and says what is predicted of it."""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

from launch.files import ROOT
from launch.kernels import child, predict
from launch.kernels.targets import Target
from pallas_kernels import tuning

DIGITS = 4  # significant digits that are kept of a prediction
COMPILERS = {"tpu": ("jax", "libtpu"), "gpu": ("jax", "jax-cuda13-plugin")}


@dataclasses.dataclass(frozen=True)
class Case:
    """A spec of an op, with what shall compute it and where."""

    op: str
    spec: Any
    target: Target
    implementation: str
    config: Mapping[str, Any] | None = None
    dtype: str = "bfloat16"

    @property
    def key(self) -> str:
        """What a row is found by, with its pass."""
        config = "" if self.config is None else f" {json.dumps(self.config, sort_keys=True)}"
        dtype = "" if self.dtype == "bfloat16" else f" {self.dtype}"
        how = f"{self.implementation}{config}{dtype}"
        return f"{self.op} {self.spec.name} {how} {self.target.name}"

    @property
    def job(self) -> child.Job:
        """For the child."""
        spec = dataclasses.asdict(self.spec)
        names = self.op, spec, self.target.name, self.implementation
        return child.Job(*names, self.config, self.dtype)

    def source(self) -> str:
        """A hash of all that the row depends on: shape, bounds, target, sources and compilers."""
        kernels, own = ROOT / "pallas_kernels", ROOT / "pallas_kernels" / self.op
        other = {"tpu": "gpu", "gpu": "tpu"}[self.target.platform]
        kept = [p for p in sorted(own.rglob("*.py")) if not _other(p.name, other)]
        kept += [*sorted(kernels.glob("*.py")), tuning.record(self.op, self.target.device_kind)]
        if peer := child.peers(self.op).get(self.implementation):
            kept = [peer, own / "blocks.py", own / "reference.py"]
        known = [dataclasses.asdict(self.job), dataclasses.asdict(self.target)]
        known += [bounds(self, side) for side in ("forward", "backward")]
        known += [{name: _version(name) for name in COMPILERS[self.target.platform]}]
        digest = hashlib.sha256(json.dumps(known).encode())
        for path in kept:
            if path.name != "specs.py" and path.exists():
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()[:16]


def _other(name: str, platform: str) -> bool:
    return name.startswith((f"{platform}_", f"pallas_{platform}", platform)) or name.endswith(
        "_test.py"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def rows(case: Case) -> tuple[list[dict], dict]:
    """(rows of the case, forward then backward, and the child's result). Errors are a row's."""
    result = child.run(case.job)
    base = {
        "op": case.op,
        "spec": case.spec.name,
        "implementation": case.implementation,
        "target": case.target.name,
        "config": case.config,
        "source": case.source(),
        "compilers": {name: _version(name) for name in COMPILERS[case.target.platform]},
    }
    if "error" in result:
        return [base | {"pass": "", "error": result["error"]}], result
    base["seconds"] = round(result["seconds"], 1)
    base["chosen"] = [entry["config"] for entry in result["choices"]]
    try:
        make = _tpu if case.target.platform == "tpu" else _gpu
        found = [base | row for row in make(case, result)]
        nothing = f"it runs no Pallas kernel for {case.target.name}, so that there is none to read"
        return found or [base | {"pass": "", "error": nothing}], result
    except predict.MismatchError as error:
        return [base | {"pass": "", "error": str(error)}], result


def bounds(case: Case, side: str) -> tuple[float, float]:
    """(FLOPs, bytes) of a pass."""
    backward = side == "backward"
    flops = case.spec.backward_flops if backward else case.spec.flops
    return flops, case.spec.hbm_bytes(case.dtype, backward)


def _tpu(case: Case, result: Mapping):
    for side, kernels in predict.passes(result["kernels"], result["executions"]).items():
        found = predict.predict(list(kernels.values()), case.target, *bounds(case, side))
        names = ("schedule", "hbm", "mxu", "ms", "tflops", "share", "busy", "cycles", "bundles")
        row = {"pass": side} | {name: _round(getattr(found, name)) for name in names}
        row["use"] = {name: round(share, 3) for name, share in found.use.items()}
        row |= {"spills": round(found.spills), "fills": round(found.fills)}
        row["vmem"] = max(kernel.program.vmem for kernel in kernels.values())
        row["temporaries"] = max(result["kernels"][name]["temporaries"] for name in kernels)
        row["counted"] = result["executions"] is not None
        row["kernels"] = {name: _pieces(kernel, case.target) for name, kernel in kernels.items()}
        yield row


def _pieces(kernel: predict.Kernel, target: Target) -> dict:
    names, weighed = ("bundles", "cycles", "depth", "matmuls"), []
    for piece, runs in zip(kernel.program.pieces, kernel.weights(target), strict=True):
        if piece in kernel.program.heavy:
            row = {name: getattr(piece, name) for name in names}
            weighed.append(row | {"runs": _round(runs)})
    return {"cores": kernel.cores(target), "steps": kernel.steps(target), "heavy": weighed}


def _gpu(case: Case, result: Mapping):
    sides = {"forward": {}, "backward": {}}
    for name, facts in result["kernels"].items():
        side = "backward" if any(word in name for word in predict.BACKWARD) else "forward"
        sides[side][name] = facts
    for side, kernels in sides.items():
        if kernels:
            flops, size = bounds(case, side)
            floors = {
                "hbm": _round(size / case.target.bandwidth * 1e3),
                "mxu": _round(flops / case.target.peak * 1e3),
            }
            worst = {
                name: max(facts[name] for facts in kernels.values())
                for name in ("registers", "spill_stores", "spill_loads", "shared", "temporaries")
            }
            yield {"pass": side} | floors | worst | {"kernels": kernels}


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
