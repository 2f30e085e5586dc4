"""Studies whose runs were never run: files as `sweep` and `train` leave them."""

import json
import pathlib

CONFIG = {
    "steps": 40,
    "seed": 0,
    "data": {"batch_size": 4, "length": 8, "source": "stdlib", "prefetch": 2, "micro_batches": 1},
    "optim": {"name": "adamw", "lr": 0.1},
    "train": {"eval_rows": 16},
}
METRIC = "validation/bits_per_byte"
OLD = {"0.1": [2.00, 2.10, 2.20], "0.2": [2.50, 2.60, 2.70]}
NEW = {"0.1": [1.99, 2.00, 2.01], "0.2": [1.90, 2.01, 2.09], "0.4": [1.80, 1.90, 3.00]}
VALUES = {"old": OLD, "new": NEW}
EVERY = 10  # steps between two evaluations


def header(**changes) -> dict:
    """Of a run; `config` among the changes holds sections that replace those above."""
    config = CONFIG | changes.pop("config", {})
    return {
        "config": config,
        "parameters": {"total": 100},
        "flops_per_token": {"visible": 600.0},
        "fingerprint": "corpus",
        "tokenizer": "bytes",
        "seed": config["seed"],
        "device": {"kind": "cpu", "count": 1},
        "processor": {"kind": "abacus", "cores": 1},
        "versions": {"jax": "0.11.2"},
        "commit": "abc",
    } | changes


def rows(config: dict, value: float, start: float = 100.0) -> list[dict]:
    """A row a step, two seconds apart; scores halve their distance to `value` each time."""
    size, found = config["data"]["batch_size"] * config["data"]["length"], []
    for step in range(1, config["steps"] + 1):
        at = {"step": step, "tokens": step * size, "time": start + 2 * step}
        found.append({**at, "loss": 3.0 + 1 / step, "gradient_norm": 1.0, "parameter_norm": 9.0})
        if step % EVERY == 0 and step < config["steps"]:
            found.append({**at, METRIC: value + 0.5 ** (step / EVERY)})
    found[0]["seconds_to_first_step"] = 5.0
    return [*found, {**at, "time": at["time"] + 3, METRIC: value, "validation/loss": 2.0}]


def run(folder: pathlib.Path, value: float, **changes) -> None:
    """A run that has ended with this value of the metric."""
    head = header(**changes)
    write(folder, [{"header": head}, *rows(head["config"], value)])
    score = {"step": head["config"]["steps"], "nll": 1.0, "targets": 2.0, "bytes": 3}
    (folder / "final.json").write_text(json.dumps(score))


def write(folder: pathlib.Path, lines: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def study(folder: pathlib.Path, values: dict[str, dict[str, list[float]]], **changes) -> dict:
    """study.json, and a finished run for each value: {arm: {value of optim.lr: one a seed}}.

    A value of None makes a run that never began. The first arm is the baseline.
    """
    runs, (base, *others) = {}, values
    for arm, grid in values.items():
        for lr, by_seed in grid.items():
            for seed, value in enumerate(by_seed):
                name, point = f"{arm}-lr={lr}-seed={seed}", {"optim.lr": lr}
                runs[name] = {"arm": arm, "point": point, "seed": seed, "overrides": {}}
                config = {"seed": seed, "optim": {"name": arm, "lr": float(lr)}}
                if value is not None:
                    run(folder / name, value, config=config)
    seeds = list(range(max(run["seed"] for run in runs.values()) + 1))
    given = {
        "name": "fake",
        "title": "Two arms that nobody trained.",
        "command": "uv run sweep experiments/fake.py",
        "rule": "Claimed: something.",
        "earlier_rules": [],
        "baseline": base,
        "metric": METRIC,
        "margin": 0.01,
        "claims": {arm: "better" for arm in others},
        "higher": False,
        "seeds": seeds,
        "runs": runs,
    } | changes
    folder.mkdir(exist_ok=True)
    (folder / "study.json").write_text(json.dumps(given))
    return given


def rerun(folder, name, value=2.0, **changes):
    """A run of the study in other circumstances."""
    arm, seed = name.partition("-")[0], int(name.rpartition("=")[2])
    own = {"seed": seed, "optim": {"name": arm, "lr": 0.1}} | changes.pop("config", {})
    run(folder / name, value, config=own, **changes)
