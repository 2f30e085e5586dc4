"""The command line: what it refuses, how it fills its record, and what it prints."""

import dataclasses
import json
import signal

import pytest

from launch.kernels import __main__ as command
from launch.kernels import child, fields, rows, table, tune
from launch.kernels.targets import TARGETS
from pallas_kernels.flash_attention import specs

OP = "--op=flash_attention"
FIRST = specs.tagged("aot")[0]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def run(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        command.main(argv)
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_help(capsys):
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert all(f"--{flag}" in out for flag in command.FLAGS)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ((OP,), "name what to compile: --op=flash_attention --topology=v5p, or --all"),
        (("--op=flash", "--topology=v5p"), "no op 'flash' in pallas_kernels; there are: flash_"),
        ((OP, "--topology=v9"), "no target 'v9'; there are: v5e"),
        ((OP, "--topology=v5p", "--spec=llama-7b-9k"), "did you mean 'llama-7b-8k'"),
        ((OP, "--topology=v5p", "--spec"), "--spec needs a value"),
        ((OP, "--topology=v5p", "--LL=4"), "--LL is no field; did you mean --L?"),
        ((OP, "--topology=v5p", "--L=many"), "--L takes an integer and got 'many'"),
        ((OP, "--topology=v5p", "--peer=slash"), "no implementation 'slash'"),
        ((OP, "--topology=v5p", "--fresh=perhaps"), "--fresh takes true or false"),
        (("flash_attention", "v5p"), "'flash_attention' is not a flag"),
        ((OP, "--topology=v5p", "--topolgy=v5e"), "did you mean --topology?"),
        ((OP, "--topology=v5p", "--name=x"), "--name is no field"),
        ((OP, "--topology=v5p", f"--spec={FIRST.name}", "--L=-8"), "every size must be 1 or more"),
        ((OP, "--topology=v5p", "--dtype=bf16"), "--dtype takes bfloat16 | float16 | float32"),
        ((OP, "--topology=v5p", "--implementation=specs"), "'specs'; there are: pallas_tpu, "),
        ((OP, "--topology=v5p", "--implementation=pallas_gpu"), "pallas_gpu is for a GPU, and v5p"),
        ((OP, "--topology=h100", "--peer=splash"), "splash is for a TPU, and h100 is a GPU"),
        ((OP, "--topology=v5p", "--record"), "--record keeps what --tune found: give both"),
        ((OP, "--topology=v5p", "--tune", "--pieces"), "--tune chooses the config itself"),
        ((OP, "--topology=v5p", "--picture=/nowhere/x.png"), "--picture /nowhere/x.png: it must"),
        ((OP, "--topology=v5p", "--picture=x.png"), "--picture shows one program for a TPU and"),
        (("--all", "--L=8"), "--all compiles what the record holds and takes no --L"),
        (("--all", "--topology=v9"), "none of the "),
    ],
)
def test_what_is_not_understood_is_one_sentence(capsys, argv, sentence):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1
    assert err.startswith("kernels: ")


@pytest.mark.parametrize("topology", ["v5p", "h200"])
def test_without_a_compiler_it_names_the_extra(capsys, monkeypatch, topology):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(command.UsageError, match="uv sync --extra aot"):
        command.needs(TARGETS[topology].platform)


def test_what_is_stopped_says_nothing(capsys, monkeypatch):
    def stopped(case):
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(rows, "rows", stopped)
    monkeypatch.setattr(command, "needs", lambda platform: None)
    code, out, err = run(capsys, OP, "--topology=v5p", f"--spec={FIRST.name}")
    assert (code, out, err.count("\n")) == (130, "", 1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_runs_no_kernel_is_an_error(monkeypatch):
    empty = {"kernels": {}, "executions": None, "seconds": 1.0, "choices": []}
    monkeypatch.setattr(child, "run", lambda job: empty)
    for name in ("v5p", "h200"):
        found, _ = rows.rows(rows.Case("flash_attention", FIRST, TARGETS[name], "xla"))
        assert "no Pallas kernel" in found[0]["error"]
        assert table.NOTES not in table.markdown(found)


@dataclasses.dataclass(frozen=True)
class Inner:
    T: int = 8


@dataclasses.dataclass(frozen=True)
class Outer:
    C: int
    cap: float | None = None
    sure: bool = False
    inner: Inner = dataclasses.field(default_factory=Inner)

    def __post_init__(self):
        if self.C % self.inner.T:
            raise ValueError(f"T {self.inner.T} must divide C {self.C}.")


def test_fields_from_texts():
    texts = {"C": "32", "cap": "2.5", "sure": "true", "inner.T": "16"}
    assert fields.changed(Outer(8), texts) == Outer(32, 2.5, True, Inner(16))
    assert fields.changed(Outer(8, 1.0), {"cap": "none"}) == Outer(8)


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({"CC": "1"}, "--config.CC is no field; did you mean --config.C"),
        ({"inner.C": "1"}, "--config.inner.C is no field; did you mean --config.inner.T"),
        ({"inner": "1"}, "--config.inner cannot be set"),
        ({"sure": "1"}, "--config.sure takes true or false and got '1'"),
        ({"C": "12"}, "T 8 must divide C 12"),
    ],
)
def test_fields_that_do_not_fit(texts, sentence):
    with pytest.raises(command.UsageError, match=sentence):
        fields.changed(Outer(8), texts, "config.")


def facts(ms):
    row = {"ms": ms, "tflops": 1.0, "share": 0.5, "use": {"MXU": 0.5}, "schedule": ms, "hbm": 0.1}
    row |= {"mxu": ms / 2, "spills": 12345, "vmem": 2**20, "temporaries": 0, "counted": True}
    return {"pass": "forward"} | row


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Replaces compilers by a list of what they were asked for; the third v5p case fails."""
    asked = []

    def answer(case):
        asked.append(case.key)
        base = {"op": case.op, "spec": case.spec.name, "implementation": case.implementation}
        base |= {"target": case.target.name, "source": case.source(), "config": case.config}
        if len(asked) == 3:
            return [base | {"pass": "", "error": "too large"}], {}
        config = case.config or {"T": 0}
        return [base | facts(1.0 + config["T"] / 64)], {
            "choices": [{"implementation": case.implementation, "key": {"L": 8}, "config": config}]
        }

    monkeypatch.setattr(rows, "rows", answer)
    monkeypatch.setattr(command, "needs", lambda platform: None)
    monkeypatch.setattr(command, "RECORD", command.ROOT / tmp_path / "kernels.json")
    return asked


def test_the_record_is_resumed(capsys, compiled, monkeypatch):
    monkeypatch.setattr(command, "ROOT", command.RECORD.parent)
    monkeypatch.setattr(command, "operations", lambda: ["flash_attention"])
    code, _, err = run(capsys, "--all", "--topology=v5p")
    assert code == 1  # the one that failed
    assert err.splitlines()[0].startswith(f"1/{len(compiled)} flash_attention ")
    everything = list(compiled)
    kept = table.load(command.RECORD)
    assert sorted(kept) == sorted(everything)
    text = command.RECORD.with_suffix(".md").read_text()
    assert "too large" in text
    assert "12,345" in text
    code, _, _ = run(capsys, "--all", "--topology=v5p")
    assert (code, compiled[len(everything) :]) == (0, [everything[2]])
    changed = kept[everything[0]][0] | {"source": "another"}
    table.save(command.RECORD, kept | {everything[0]: [changed]})
    run(capsys, "--all", "--topology=v5p", f"--spec={FIRST.name}")
    assert everything[0] in compiled[len(everything) + 1 :]
    count = len(compiled)
    run(capsys, "--all", "--topology=v5p", "--fresh")
    assert len(compiled) == count + len(everything)


def test_tuning_keeps_the_best(compiled, monkeypatch, tmp_path):
    from pallas_kernels import tuning

    @dataclasses.dataclass(frozen=True)
    class Config:
        T: int

    class Module:
        candidates = staticmethod(lambda spec: map(Config, (256, 128, 512, 192)))

    monkeypatch.setattr(child, "module", lambda job: Module)
    monkeypatch.setattr(tuning, "ROOM", tmp_path)
    (tmp_path / "flash_attention").mkdir()
    case = rows.Case("flash_attention", FIRST, TARGETS["v5p"], "pallas_tpu")
    said = []
    found = tune.tune(case, True, said.append)
    assert [row.get("ms") for row in found] == [3.0, 4.0, 5.0, None]
    (path,) = tmp_path.rglob("*.json")
    (entry,) = json.loads(path.read_text())["pallas_tpu"]
    assert (entry["key"], entry["config"]) == ({"L": 8}, {"T": 128})
    assert entry["found"] == {"spec": FIRST.name, "predicted_ms": 3.0}
    with pytest.raises(command.UsageError, match="only TPUs"):
        tune.tune(dataclasses.replace(case, target=TARGETS["h200"]), False, said.append)


def test_a_source_is_what_its_platform_compiles():
    case = rows.Case("flash_attention", FIRST, TARGETS["v5p"], "pallas_tpu")
    other = dataclasses.replace(case, spec=dataclasses.replace(FIRST, B=FIRST.B + 1))
    peer = dataclasses.replace(case, implementation="splash")
    sources = {each.source() for each in (case, other, peer)}
    assert len(sources) == 3
    assert case.source() == dataclasses.replace(case).source()
