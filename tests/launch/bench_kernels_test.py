"""The kernels' benchmark on a CPU: who takes part, who is wrong, what is said of targets."""

import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.bench import __main__ as command
from launch.bench import kernels, measure, race, target
from launch.bench.contender import PASSES, Case, Declined, Jax
from launch.bench.peers import flash_attention as peers
from launch.bench.target import Target
from launch.files import ROOT
from pallas_kernels.flash_attention.specs import tagged
from tests.launch.bench_test import BLOCKED, WITHOUT, without
from tests.pallas_kernels.attention_oracle import mask, oracle

CI = {spec.name: spec for spec in tagged("ci")}
QUICK = ("--seconds=0.0001", "--repetitions=2")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "kernels.json"
    flags = ("--spec=plain,gemma2", "--passes=forward,backward,both", *QUICK, f"--out={out}")
    without("kernels", *flags, blocked=(*BLOCKED, "torch", "tokamax", "triton"))
    return json.loads(out.read_text())


def test_it_runs_with_jax_alone_and_peers_that_are_there(report):
    rows = {}
    for row in report["rows"]:
        title = row["what"] if not row["what"].startswith(" ") else title
        rows[title, row["what"].strip(), row["unit"]] = row
    for kind in PASSES:
        title = f"plain, {kind}: xla"
        assert len(rows[title, title, "ms"]["ours"]) == 2
        peer = rows[title, "jax.nn xla", "TFLOP/s"]
        assert len(peer["peer"]) == 2
        assert peer["ratio"]["median"] > 0
        assert rows[title, "beside the arguments: jax.nn xla", "MB"]["ours"][0] > 0
        title = f"gemma2, {kind}: xla"
        assert (title, "speed", "TFLOP/s") in rows  # alone, since the cap is not jax.nn's


def test_speeds_are_flops_over_the_samples_times(report):
    rows = report["rows"]
    for i, row in enumerate(rows):
        if row["what"] == "plain, backward: xla":
            speeds = rows[i + 1]["ours"]
            flops = [s * t * 1e9 for s, t in zip(speeds, row["ours"], strict=True)]
            assert flops == pytest.approx([CI["plain"].backward_flops] * 2)
            return
    raise AssertionError("no such row")


def test_every_absence_has_a_reason_and_every_target_a_verdict(report):
    said = report["notes"]
    assert "tokamax mosaic declines: tokamax is not installed (plain, gemma2)" in said
    assert "torch FlexAttention declines: torch is not installed (plain, gemma2)" in said
    assert "cuDNN (jax.nn) declines: it runs on a GPU (plain, gemma2)" in said
    assert "jax.nn xla declines: it takes no segments (gemma2)" in said
    verdicts = [note for note in said if note.startswith("target ")]
    assert len(verdicts) == len(peers.TARGETS)
    assert all("not measured (no kernel is for a cpu)" in verdict for verdict in verdicts)


def raced(monkeypatch, spec, ways, targets=(), kernels=("xla",), kinds=("forward",)):
    """The race of one spec against these peers, xla taken for the platform's own kernel."""
    rivals = types.SimpleNamespace(peers=lambda: ways, TARGETS=targets, NOT_OURS=("reference",))
    monkeypatch.setattr(race, "_rivals", lambda op: rivals)
    monkeypatch.setattr(race.Race, "_kernels", list(kernels))
    found = race.Race("flash_attention", "float32", kinds, None, 1e-4, 2)
    found.run(spec)
    return found


def test_who_is_wrong_declines_or_fails_is_told_and_not_timed(monkeypatch):
    spec = CI["plain"]
    right = spec.call("reference")

    def way(change):
        return lambda case: Jax(lambda **arrays: change(right(**arrays)[0]), case)

    def declines(case):
        raise Declined("it is Sunday")

    def fails(case):
        raise RuntimeError("out of memory\nand much more")

    ways = {
        "right": way(lambda o: o),
        "wrong": way(lambda o: 1.01 * o),
        "not finite": way(lambda o: o / 0),
        "shifted": way(lambda o: jnp.roll(o, 1, 1)),
        "late": lambda case: Jax(lambda **arrays: {}["o"], case),
        "declines": declines,
        "fails": fails,
    }
    found = raced(monkeypatch, spec, ways)
    timed = {row.what.strip() for row in found.rows if row.unit == "TFLOP/s"}
    assert timed == {"right"}
    said = found.notes()
    for name in ("wrong", "not finite", "shifted"):
        assert any(f"{name} is WRONG and not timed" in note for note in said)
    assert any(note.startswith("late FAILED: ") for note in said)
    assert "declines declines: it is Sunday (plain)" in said
    assert "fails FAILED: RuntimeError: out of memory (plain)" in said


def test_wrong_gradients_are_found_in_each_pass_that_has_them(monkeypatch):
    @jax.custom_vjp
    def attend(q, k, v):
        return CI["plain"].call("reference")(q=q, k=k, v=v)[0]

    def backward(kept, do):
        dq, dk, dv = jax.vjp(
            lambda *x: CI["plain"].call("reference")(q=x[0], k=x[1], v=x[2])[0], *kept
        )[1](do)
        return dq, dv, dk

    attend.defvjp(lambda *x: (attend(*x), x), backward)
    ways = {"swapped": lambda case: Jax(lambda q, k, v: attend(q, k, v), case)}
    found = raced(monkeypatch, CI["plain"], ways, kinds=PASSES)
    (note,) = (note for note in found.notes() if "both" in note)
    assert "swapped is WRONG" in note
    assert any("swapped is WRONG" in note and "backward" in note for note in found.notes())
    first = [row.what.strip() for row in found.rows if row.unit == "TFLOP/s"]
    assert first == ["swapped", "speed", "speed"]


def test_targets_are_judged_by_rows_of_the_platforms_kernel(monkeypatch):
    same = lambda case: Jax(lambda **arrays: case.spec.call("reference")(**arrays)[0], case)
    low = Target("forward", "forward", "peer", 1e-6, lambda spec: True)
    high = Target("segments", "forward", "peer", 1e6, lambda spec: spec.documents > 0)
    ways = {"peer": same}
    found = raced(monkeypatch, CI["packed"], ways, (low, high))
    (row,) = (row for row in found.rows if row.unit == "TFLOP/s")
    assert row.least is None
    assert all("not measured (on this cpu it would be" in said for said in found.verdicts())
    monkeypatch.setattr(target, "DEVICE", "cpu")
    found = raced(monkeypatch, CI["packed"], ways, (low, high))
    met, missed = found.verdicts()
    assert met.startswith("target forward at least 1e-06x peer on an cpu: met, ")
    assert "target segments, forward at least 1e+06x peer on an cpu: missed by 100 %" in missed
    (row,) = (row for row in found.rows if row.unit == "TFLOP/s")
    assert row.least == 1e6
    found = raced(monkeypatch, CI["packed"], ways, (low,), kernels=("pallas_gpu",))
    assert found.verdicts()[0].endswith("not measured (no spec that it covers was run)")


def judged(ratios, least=1.25, reasons=(), device="NVIDIA H200"):
    wanted = Target("backward", "backward", "tokamax", least, lambda spec: True)
    rows = {name: measure.Row("", "TFLOP/s", [r, r, 9.0], [1.0] * 3) for name, r in ratios.items()}
    return wanted.verdict(list(rows.items()), reasons, device).partition(": ")[2]


def test_a_verdict_is_of_the_worst_spec_and_names_what_is_missing():
    assert judged({"a": 1.5, "b": 1.25}) == "met, 1.25x at b, the least of 2 specs"
    assert judged({"a": 1.5}) == "met, 1.50x at a"
    assert (
        judged({"a": 1.5, "b": 1.0}) == "missed by 20 %, 1.00x at b, the least of 2 specs; met at 1"
    )
    assert judged({}, reasons=["x fails", "x fails"]) == "not measured (x fails)"
    assert judged({"a": 2.0}, reasons=["y"]) == "met, 2.00x at a; not measured everywhere: y"
    other = judged({"a": 2.0}, device="NVIDIA H100 80GB HBM3")
    assert other.startswith("not measured (on this NVIDIA H100 80GB HBM3 it would be met, 2.00x")


@pytest.mark.parametrize("name", ["sinks", "gemma2", "mqa"])
def test_results_come_in_the_order_of_the_names(name):
    spec = CI[name]
    case = Case.of(spec, "float32")
    true = oracle(spec, spec.inputs(), case.cotangent, np.zeros(case.cotangent.shape[:3]))
    way = Jax(lambda **arrays: spec.call("xla")(**arrays)[0], case)
    wanted = [true["o"], *(true[n] for n in spec.differentiable)]
    for kind, expected in zip(PASSES, (wanted[:1], wanted[1:], wanted), strict=True):
        # Rounding in float32 is 1e-7 of a value; a wrong order is of the size of the values.
        assert case.error(kind, way.results(kind), expected) < 1e-5


@pytest.mark.parametrize("kind", PASSES)
def test_every_call_of_a_chain_is_in_its_loop(kind):
    case = Case.of(CI["plain"], "float32")
    way = Jax(lambda q, k, v: jnp.tanh(jnp.einsum("BLHK,BSHK,BSHV->BLHV", q, k, v)), case)
    text = way._loop(kind, 7).as_text()
    body, _, entry = text.rpartition("ENTRY ")
    assert "while(" in entry
    assert " dot(" in body
    assert " dot(" not in entry
    assert '"known_trip_count":{"n":"7"}' in text
    assert way.seconds(kind, 7) > 0
    assert way.roughly(kind) > 0


def test_flex_attention_is_asked_for_the_same_pairs():
    for spec in CI.values():
        if spec.first and spec.documents:
            continue
        arrays = spec.segments()
        L, S = spec.shapes["q"][1], spec.shapes["k"][1]
        seen = peers._mask(spec, S, arrays.get("q_segments"), arrays.get("kv_segments"))
        b, i, j = np.ogrid[: spec.B, :L, :S]
        found = np.broadcast_to(seen(b, 0, i, j), (spec.B, L, S))
        np.testing.assert_array_equal(found, mask(spec, *arrays.values()), err_msg=spec.name)


@pytest.mark.parametrize("name", ["plain", "both_sides"])
def test_windows_of_jax_nn_are_ours(name):
    case = Case.of(CI[name], "float32")
    ours = Jax(lambda **arrays: CI[name].call("xla")(**arrays)[0], case)
    theirs = peers.peers()["jax.nn xla"](case)
    for kind in PASSES:
        assert case.error(kind, theirs.results(kind), ours.results(kind)) < case.allowed[kind] / 10


def test_padding_is_not_compared():
    case = Case.of(CI["packed"], "float32")
    o = np.ones(case.cotangent.shape, np.float32)
    blind = ~case.rows[:, :, 0, 0]
    assert blind.any()
    other = np.array(o)
    other[blind] = 7.0
    assert case.error("forward", [other], [o]) == 0
    assert not case.cotangent[blind].any()
    other[~blind] = 1.5
    assert case.error("forward", [other], [o]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--op=slow_attention"], "there is no kernel pallas_kernels/slow_attention"),
        (["--spec=plain,huge"], "--spec: there is no 'huge'; there are: plain, "),
        (["--passes=sideways"], "--passes: there is no 'sideways'; there are: forward, backward"),
        (["--dtype=bf16,f16"], "--dtype: there is no 'bf16,f16'; there are: bf16, f16, f32"),
        (["--against=cudnn"], "--against: no peer is called 'cudnn'; there are: jax.nn xla, "),
        (["--repetitions=0"], "--repetitions must be at least 1"),
    ],
)
def test_what_is_not_understood_is_one_sentence(flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["kernels", *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_on_a_cpu_only_small_specs_run_unless_they_are_named():
    found = race.Race("flash_attention", "bfloat16", ("forward",), None, 0.1, 1)
    small, notes = found.specs(None)
    assert [spec.name for spec in small] == ["quickstart"]
    assert "llama-7b" in notes[0]
    assert [spec.name for spec in found.specs("llama-7b, plain")[0]] == ["llama-7b", "plain"]


def test_the_floor_is_the_chips():
    case = types.SimpleNamespace(
        spec=next(s for s in tagged("bench") if s.name == "full-8k"), dtype="bfloat16"
    )
    # 4 x 2 x 16 x 8192^2 x 128 FLOPs at 989.3 TFLOP/s.
    assert race.floor_ms("NVIDIA H200", case, "forward") == pytest.approx(1.1114, rel=1e-3)
    assert race.floor_ms("NVIDIA H200", case, "backward") == pytest.approx(2.7785, rel=1e-3)
    both = race.floor_ms("NVIDIA H100 80GB HBM3", case, "both")
    assert both == pytest.approx(3.5 * 1.1114, rel=1e-3)
    assert race.floor_ms("cpu", case, "forward") is None
    assert kernels.DTYPES.keys() == {"bf16", "f16", "f32"}


def test_tests_on_a_gpu_need_jax_alone():
    blocked = (*BLOCKED, "beartype", "hypothesis", "torch", "tokamax")
    script = WITHOUT.format(blocked=blocked).partition("from launch")[0]
    script += "import pytest\nraise SystemExit(pytest.main(sys.argv[1:]))"
    flags = ("--noconftest", "-m", "gpu", "-rs", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-c", script, *flags, "tests/pallas_kernels/gpu_test.py"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there is no GPU" in done.stdout
    assert "passed" not in done.stdout
