"""`--tune`: the implementation's candidates, each compiled, the best by predicted time."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

from launch.kernels import child, rows
from launch.kernels.rows import Case
from launch.schema import UsageError


def tune(case: Case, record: bool, say: Callable[[str], None]) -> list[dict]:
    """The rows of every candidate, best first; those that do not compile are last.

    Args:
      record: keep the best in the op's `tuned` folder, for the key that `tuning.choose` was asked.

    Raises:
      UsageError: the implementation has no `candidates`, or none that compiles and is counted.
    """
    if case.target.platform != "tpu":
        raise UsageError("--tune goes by predicted time, and only TPUs have one")
    module = child.module(case.job)
    if not hasattr(module, "candidates"):
        raise UsageError(f"{case.implementation} of {case.op} has no `candidates` to try")
    with child.mesh(case.target):
        candidates = [dataclasses.asdict(config) for config in module.candidates(case.spec)]
    if not candidates:
        raise UsageError(f"{case.implementation} has no candidates for {case.spec.name}")
    tried = []
    for i, config in enumerate(candidates, 1):
        say(f"{i}/{len(candidates)} {_differing(config, candidates)}")
        found, result = rows.rows(dataclasses.replace(case, config=config))
        total = sum(row.get("ms", float("inf")) for row in found)
        tried.append((total, i, found, result))
        say(f"  {total:.4g} ms" if total < float("inf") else f"  {_why(found)}")
    tried.sort(key=lambda entry: entry[:2])
    if tried[0][0] == float("inf"):
        why = _why(tried[0][2])
        raise UsageError(f"none of {len(candidates)} candidates has a time, the first as: {why}")
    if record:
        say(f"kept in {keep(case, tried[0][3], tried[0][0])}")
    return [row for _, _, found, _ in tried for row in found]


def _differing(config: dict, candidates: list[dict]) -> str:
    """The fields in which candidates differ."""
    names = [name for name in config if any(other[name] != config[name] for other in candidates)]
    return " ".join(f"{name}={config[name]}" for name in names or config)


def _why(found: list[dict]) -> str:
    return found[0].get("error", "no time").splitlines()[0]


def keep(case: Case, result: dict, ms: float) -> pathlib.Path:
    """Writes what was chosen into the record of the target's kind of device; its path."""
    from pallas_kernels import tuning

    path = tuning.record(case.op, case.target.device_kind)
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for choice in result["choices"]:
        entries = record.setdefault(choice["implementation"], [])
        entries[:] = [entry for entry in entries if entry["key"] != choice["key"]]
        found = {"spec": case.spec.name, "predicted_ms": float(f"{ms:.4g}")}
        entries.append({"key": choice["key"], "config": choice["config"], "found": found})
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
