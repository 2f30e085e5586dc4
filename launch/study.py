"""A study: a configuration with the grid of its runs and the rule of its verdict beside it.

A study is a file of experiments/ that has, besides get_config():

    BASELINE = "adamw"                         the arm that others are compared with
    ARMS = {"adamw": {"optim.lr": [1e-3, 2e-3]}, "sgd": {"optim.name": "sgd"}}
                                               {arm: {key: value, or a list of values to try}}
    SEEDS = (0, 1, 2)                          every point of an arm runs with each of them
    METRIC = "validation/bits_per_byte"        at the last step
    MARGIN = 0.005                             the least difference in it that counts
    CLAIMS = {"sgd": "no worse"}               or "better"; left out: every other arm is better
    HIGHER = False                             whether more of the metric is better; may be left out
    FLOPS = 0.0                                share by which FLOPs a token may differ; likewise
    TOWARD = "softmax"                         what share of the way from the baseline to this arm
                                               others come is reported; likewise
    SETTINGS = {"long": {"data.length": 512}}  keys in which every arm runs once more, and is judged
                                               against the baseline in them; likewise
    AFTER = {"tuned": "taught"}                arms whose runs begin with the parameters of another
                                               arm's run of the same seed and setting; likewise

and a paragraph of the docstring, `RULE  ...`, that says what `analysis.compare` will compute. No
jax is needed to read it.
"""

import dataclasses
import fnmatch
import importlib.util
import inspect
import itertools
import json
import pathlib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from analysis.compare import Rule, cell
from analysis.records import Record
from analysis.records import read as read_run
from analysis.studies import lacks
from launch.config import fitted, unused
from launch.files import find, leaves, load
from launch.schema import UsageError, spell
from launch.study_checks import wrong

OPTIONAL = {"HIGHER": False, "FLOPS": 0.0, "TOWARD": None}
MAPPINGS = ("SETTINGS", "AFTER")  # that may be left out
CONSTANTS = {"BASELINE": str, "ARMS": dict, "SEEDS": tuple, "METRIC": str, "MARGIN": float}


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run. point: the values taken from lists, as text.  config: what will run, resolved.

    overrides: {key: text}, which make the study's file that configuration.  after: the run that it
    begins with, in the same folder; its `start` is left out of both.
    """

    name: str
    arm: str
    point: Mapping[str, str]
    seed: int
    overrides: Mapping[str, str]
    config: Mapping
    after: str | None = None

    @property
    def steps(self) -> int:
        return self.config["steps"]


@dataclasses.dataclass(frozen=True)
class Study:
    """path: as given.  title: first line of the docstring.  overrides: of the command line."""

    name: str
    path: str
    title: str
    rule: Rule
    seeds: tuple[int, ...]
    overrides: Mapping[str, str]
    runs: tuple[Planned, ...]

    @property
    def command(self) -> str:
        changes = (f"--config.{key}={text}" for key, text in self.overrides.items())
        return shlex.join(["uv", "run", "sweep", self.path, *changes])

    def record(self) -> dict:
        """study.json, from which the report is written."""
        kept = ("arm", "point", "seed", "overrides", "after")
        runs = {run.name: {key: getattr(run, key) for key in kept} for run in self.runs}
        own = {"name": self.name, "title": self.title, "command": self.command}
        return own | {"rule": str(self.rule), "seeds": self.seeds, "runs": runs} | vars(self.rule)

    def arguments(self, run: Planned, workdir: pathlib.Path) -> list[str]:
        """Of `train`, for one of its runs."""
        start = {} if run.after is None else {"start": str(workdir / run.after)}
        changes = [f"--config.{key}={text}" for key, text in (run.overrides | start).items()]
        return ["--config", self.path, "--workdir", str(workdir / run.name), *changes]


def read(path: str, overrides: Mapping[str, str]) -> Study:
    """The study in a file with every run's configuration resolved, or UsageError, one sentence."""
    file = find(path)
    load(file)  # Says in a sentence what the file raises.
    said = _constants(file)
    rule = _rule(file, said)
    idle = unused(path, overrides)
    runs: list[Planned] = []
    for setting, shared in (said["SETTINGS"] or {"": {}}).items():
        for arm, own in said["ARMS"].items():
            parent = cell(said["AFTER"].get(arm, ""), setting)
            before = {run.seed: run.name for run in runs if run.arm == parent}
            for values, tried in _points(shared | own):
                grid = cell(arm, setting), values, tried, said["SEEDS"], before
                runs += _planned(path, overrides, shared.keys() - own.keys(), *grid)
    for key, sentence in idle.items():
        if not any(key in run.overrides for run in runs):
            raise UsageError(sentence)
    names = [run.name for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{file}: two runs are called {twice[0]}; make their values differ")
    title = inspect.cleandoc(said["doc"]).partition("\n")[0]
    return Study(file.stem, path, title, rule, said["SEEDS"], overrides, tuple(runs))


def _constants(file: pathlib.Path) -> dict:
    spec = importlib.util.spec_from_file_location(f"study_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    said = {"doc": module.__doc__ or ""}
    said |= {name: getattr(module, name, value) for name, value in OPTIONAL.items()}
    said |= {name: getattr(module, name, {}) for name in MAPPINGS}
    for name, kind in CONSTANTS.items():
        value = getattr(module, name, None)
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind or (kind in (dict, tuple, str) and not value):
            raise UsageError(
                f"{file} is not a study: it needs {name}, a {kind.__name__}; launch/study.py says "
                "what a study holds"
            )
        said[name] = value
    others = {arm: "better" for arm in said["ARMS"] if arm != said["BASELINE"]}
    return said | {"CLAIMS": getattr(module, "CLAIMS", others)}


def _rule(file: pathlib.Path, said: Mapping) -> Rule:
    """What the constants declare, which the docstring has to say in the same words."""
    for sentence in wrong(said):
        raise UsageError(f"{file}: {sentence}")
    chosen = (said[name] for name in ("BASELINE", "METRIC", "MARGIN", "CLAIMS", *OPTIONAL))
    rule = Rule(*chosen, tuple(said["SETTINGS"]))
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", said["doc"]))
    if f"RULE {rule}" not in paragraphs:
        raise UsageError(
            f"{file}: the docstring lacks the rule that will be computed, as a paragraph of its "
            f"own: RULE {rule}"
        )
    return rule


def _points(own: Mapping) -> Iterator[tuple[dict, dict]]:
    """(all values of a point, those of them that come from lists)."""
    lists = {key: values for key, values in own.items() if isinstance(values, list)}
    for values in itertools.product(*lists.values()):
        tried = dict(zip(lists, values, strict=True))
        yield {**own, **tried}, tried


def _planned(
    path: str,
    overrides: Mapping[str, str],
    shared: Set[str],
    arm: str,
    values: Mapping,
    tried: Mapping,
    seeds: tuple,
    before: Mapping[int, str],
) -> Iterator[Planned]:
    """The runs of a point, which is resolved once: nothing else depends on the seed.

    shared: keys that a setting gives to every arm. They and the overrides are left out where an arm
    does not read them.  before: {seed: the run to begin with}.
    """
    point = {key: spell(value) for key, value in tried.items()}
    name = "-".join([arm, *map(_label, point, point.values())])
    if taken := [key for key in overrides if key in (*values, "seed")]:
        raise UsageError(f"--config.{taken[0]} is set by the study; change it in {path}")
    texts = dict(overrides) | {key: spell(value) for key, value in values.items()}
    try:
        config, texts = fitted(path, texts, overrides.keys() | shared)
    except UsageError as error:
        raise UsageError(f"run {name}: {error}") from None
    found = dict(leaves(config))
    if changed := [key for key, x in values.items() if key in texts and found[key] != x]:
        raise UsageError(f"run {name}: {changed[0]} cannot be {values[changed[0]]!r}")
    for seed in seeds:
        own = {"seed": seed}
        full = texts | {"seed": str(seed)}
        of_seed = full, config | own, before.get(seed)
        yield Planned(f"{name}-seed={seed}", arm, point, seed, *of_seed)


def _label(key: str, text: str) -> str:
    """`lr=0.004` of optim.lr, in characters that a folder's name may have."""
    return re.sub(r"[^\w.,=+-]", "_", f"{key.rpartition('.')[2]}={text}")


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Those that match one of the patterns; all without any. Raises UsageError where none does."""
    names = list(names)
    matches = lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    chosen = [name for name in names if matches(name)] if patterns else names
    if not chosen:
        raise UsageError(
            f"--only {','.join(patterns)!r} matches none of the {len(names)} runs; the first is "
            f"called {names[0]}, and * stands for anything"
        )
    return chosen


def finished(study: Study, run: Planned, workdir: pathlib.Path) -> bool:
    """Whether the run has ended in its folder.

    Raises UsageError: the folder holds a run of another configuration, or one without the metric.
    """
    record = read_run(workdir / run.name)
    if record is None:
        return False
    for header in record.headers:
        planned, held = _plain(run.config), header["config"]
        if run.after is not None:  # Folders may have been moved together.
            planned |= {"start": run.after}
            held = held | {"start": pathlib.Path(held["start"] or "").name}
        if planned != held:
            raise UsageError(f"{workdir / run.name} {_another(planned, held)}")
    _refuse_older(run, record, workdir)
    if record.ended and study.rule.metric not in record.last:
        raise UsageError(f"{workdir / run.name} {lacks(record, study.rule.metric)}")
    return record.ended


def _refuse_older(run: Planned, record: Record, workdir: pathlib.Path) -> None:
    """Raises UsageError for a run that began before the run that it goes on from was made anew."""
    if run.after is None or not record.rows:
        return
    parent = read_run(workdir / run.after)
    if parent is None or max(row["time"] for row in parent.rows) > record.rows[0]["time"]:
        raise UsageError(
            f"{workdir / run.name} is older than {run.after}, from which it goes on; delete the "
            "folder, and those of runs that go on from it"
        )


def _another(planned: Mapping, held: Mapping) -> str:
    new, old = dict(leaves(planned)), dict(leaves(held))
    keys = [key for key in new | old if new.get(key, ...) != old.get(key, ...)]
    told = [f"{key} {old.get(key)!r}, now {new.get(key)!r}" for key in keys[:3]]
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return (
        f"holds a run of another configuration ({', '.join(told)}{more}); undo that, delete the "
        "folder, or choose another --workdir"
    )


def _plain(config: Mapping) -> dict:
    """As a header gives it back: tuples have become lists."""
    return json.loads(json.dumps(config))
