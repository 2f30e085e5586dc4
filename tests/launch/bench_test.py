"""The benchmark runs where only jax, numpy, flax, jaxtyping and optax are installed."""

import json
import os
import subprocess
import sys

import jax
import pytest

from launch.bench import __main__ as command
from launch.bench import host, length, measure, pair, standin
from launch.config import resolve
from launch.files import ROOT

TINY = """
from experiments import quickstart


def get_config():
    config = quickstart.get_config()
    config.steps = 20
    config.data.batch_size = 2
    config.data.length = 32
    config.data.sources.stdlib = dict(max_bytes=100_000)
    config.model.d_model = 32
    config.model.layers = 2
    config.model.vocab = 384  # which needs no padding, and so no third program
    config.model.ffns.swiglu = dict(width=32)
    {more}
    return config
"""
BLOCKED = (
    *("grain", "matplotlib", "ml_collections", "orbax", "pyarrow", "tensorboard", "tensorboardX"),
    *("tokenizers", "tqdm"),
)
WITHOUT = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
from launch.bench.__main__ import main
main()
"""


def without(name, *flags, blocked=BLOCKED):
    """Runs a benchmark where these packages cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(blocked=blocked), name, *flags],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def tiny(folder, more="pass"):
    path = folder / "tiny.py"
    path.write_text(TINY.format(more=more))
    return str(path)


def test_spine_runs_without_the_packages_of_training(tmp_path):
    path, out = tiny(tmp_path), tmp_path / "spine.json"
    flags = ("--config", path, "--seconds=0.001", "--repetitions=2", "--out", str(out))
    # That Meshwork and its peer compute the same losses is asserted by the benchmark itself.
    without("spine", *flags)
    found = json.loads(out.read_text())
    assert set(measure.PACKAGES) < set(found["versions"])
    assert found["device"]["platform"] == "cpu"
    rows = {row["what"].strip(): row for row in found["rows"]}
    assert rows["step"]["ratio"]["median"] > 0
    assert len(rows["step"]["ours"]) == len(rows["step"]["peer"]) == 2
    assert "peer without padded vocabulary" not in rows
    assert [note.split(":")[0] for note in found["notes"]] == [
        "the loop around the step was not measured",
        "the start of train was not measured",
    ]
    # The stand-in for ml_collections reads configurations as the package does.
    resolved = resolve(path) | {"mesh": dict.fromkeys(resolve(path)["mesh"], 1)}
    assert found["config"] == json.loads(json.dumps(resolved))


def test_the_loop_is_timed_with_a_step_that_does_nothing(tmp_path):
    both = pair.build(pair.resolve(tiny(tmp_path)))
    (row,) = host.loop(both, 1, lambda text: None, warm_up=0)
    assert row.ours[0] > 0
    assert row.peer[0] > 0


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("config.model.mixers.attention.window = 8", "attention.window"),
        ("config.model.norm_position = 'post'", "model.norm_position"),
        ("config.optim.name = 'sgd'", "optim.name"),
        ("config.data.micro_batches = 2", "micro-batches"),
    ],
)
def test_a_configuration_that_the_peer_cannot_do_is_refused(line, named, tmp_path):
    with pytest.raises(pair.UsageError, match=named):
        pair.resolve(tiny(tmp_path, line))


def test_turns_alternate_and_the_warm_up_is_not_kept():
    taken = []

    def way(name):
        return lambda: taken.append(name) or float(len(taken))

    samples = measure.interleaved({"a": way("a"), "b": way("b")}, 2)
    assert "".join(taken) in ("baabba", "abbaab")
    assert sorted(samples["a"] + samples["b"]) == [3.0, 4.0, 5.0, 6.0]
    assert [abs(a - b) for a, b in zip(samples["a"], samples["b"], strict=True)] == [1.0, 1.0]


def test_ratios_are_of_samples_taken_together():
    row = measure.Row("step", "tokens/s", [1.0, 20.0, 300.0], [2.0, 20.0, 200.0], 0.97)
    assert row.ratios == [0.5, 1.0, 1.5]
    assert measure.spread(row.ratios) == {"median": 1.0, "min": 0.5, "max": 1.5}
    text = measure.table(measure.Report("title", [row], ["left out"]))
    assert "as wanted, 0.97" in text
    assert "0.500 .. 1.500" in text
    assert text.endswith("note: left out")


def test_until_return_waits_for_the_device_outside_of_the_time():
    f = jax.jit(lambda x: x @ x)
    x = jax.numpy.ones((64, 64))
    assert 0 < measure.until_return(lambda: f(x)) < 60
    assert measure.count_for(1.0, 0.3) == 4
    assert measure.count_for(0.0, 0.3) == 1


def test_the_stand_in_reads_placeholders_as_none():
    config = standin.ConfigDict({"a": {"b": 1}})
    config.a.c = standin.placeholder(float)
    assert config.a.c is None
    assert config.a.get_type("c") is float
    assert config["a"].get_type("b") is int
    assert dict(config.a.items()) == {"b": 1, "c": None}
    with pytest.raises(AttributeError, match="'d'"):
        _ = config.a.d


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["spin"], "there is no benchmark 'spin'; did you mean 'spine'?"),
        (["spine", "--second=1"], "'--second=1' is not a flag; did you mean --seconds?"),
        (["spine", "--seconds=long"], "--seconds takes a number and got 'long'"),
        (["spine", "--seconds"], "--seconds needs a value: --seconds=VALUE"),
        (["spine", "--out=/nowhere/x.json"], "there is no folder /nowhere"),
    ],
)
def test_what_is_not_understood_is_one_sentence(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_exponent_is_the_slope_of_each_repetition():
    lengths, scale = [100, 200, 400], [1e-3, 2.0]
    times = [[scale[0] * L, scale[1] * L**2] for L in lengths]
    assert length._exponents(lengths, times) == pytest.approx([1.0, 2.0])


def test_lengths_beyond_the_peers_are_ours_alone():
    report = length.bench(lengths="16,32,64", peer_most=32, heads=1, size=8, repetitions=2)
    found = {row.what: (len(row.ours), len(row.peer)) for row in report.rows}
    assert found["forward, 32 tokens"] == found["both, time over length"] == (2, 2)
    assert found["both, 64 tokens"] == (2, 0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(lengths="1024"), "--lengths 1024 are not two or more different numbers"),
        (dict(lengths="8,x"), "--lengths 8,x are not two or more different numbers"),
        (dict(dtype="f8"), "there is no 'f8'"),
        (dict(heads=0), "must be at least 1"),
    ],
)
def test_lengths_that_cannot_be_timed_are_a_sentence(given, said):
    with pytest.raises(pair.UsageError, match=said):
        length.bench(**given)


def test_help_lists_benchmarks_with_their_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "spine: What Meshwork costs over bare JAX" in text
    assert "--repetitions=INT" in text
    assert "--out=STR" in text
    assert "measure:" not in text
