"""The report of runs whose values are known: verdicts, choices, refusals, and the same bytes."""

import itertools
import json
import sys

import numpy as np
import pytest

from analysis import picture, report
from analysis.studies import load
from analysis.summary import POINTS, at_edge, summarise, thinned
from tests.analysis import written
from tests.analysis.written import NEW, OLD, VALUES


def test_points_means_and_differences(summary):
    found = summary()
    old, new = found["arms"]["old"], found["arms"]["new"]
    assert (old["chosen"], new["chosen"]) == ("optim.lr=0.1", "optim.lr=0.1")
    assert new["spread"]["mean"] == pytest.approx(np.mean(NEW["0.1"]))
    differences = np.subtract(NEW["0.1"], OLD["0.1"])
    paired = new["paired"]
    np.testing.assert_allclose(list(paired["by_seed"].values()), differences, atol=1e-12)
    # t(0.975; 2) = 4.30265 of the tables.
    half = 4.30265 * np.std(differences, ddof=1) / 3**0.5
    assert paired["high"] - paired["mean"] == pytest.approx(half, rel=1e-5)
    assert [claim["verdict"] for claim in found["claims"]] == ["undecided"]
    assert {label: point["spread"]["n"] for label, point in new["grid"].items()} == {
        "optim.lr=0.1": 3, "optim.lr=0.2": 3, "optim.lr=0.4": 3,
    }  # fmt: skip
    assert old["seconds"] == 5 + 39 * 2 + 3
    assert (old["at_edge"], new["at_edge"]) == (["optim.lr"], ["optim.lr"])


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.9, 2.0, 2.101], "confirmed"),
        ([1.9995, 2.0996, 2.1994], "refuted"),
        ([2.1, 2.2, 2.3], "refuted"),
        ([1.9, 2.2, 2.0], "undecided"),
    ],
)
def test_verdict(summary, values, verdict):
    found = summary({"old": {"0.1": OLD["0.1"]}, "new": {"0.1": values}})
    assert found["claims"] == [{"arm": "new", "said": "new is better than old", "verdict": verdict}]
    assert f"| **{verdict}** |" in report.markdown(found)


def test_higher_may_be_better(summary):
    found = summary(higher=True)
    assert found["arms"]["new"]["chosen"] == "optim.lr=0.4"
    assert found["arms"]["old"]["chosen"] == "optim.lr=0.2"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(config={"data": written.CONFIG["data"] | {"length": 16}}), "tokens differ: 1280 in"),
        (dict(config={"data": written.CONFIG["data"] | {"source": "x"}}), "keys of data differ"),
        (dict(config={"steps": 20}), "tokens differ"),
        (dict(fingerprint="another"), "corpora differ"),
        (dict(tokenizer="another"), "tokenizers differ"),
        (dict(flops_per_token={"visible": 601.0}), "FLOPs a token differ: 600 in"),
        (dict(flops_per_token={"unknown": "why"}), "FLOPs are unknown of new-lr=0.1-seed=2"),
    ],
)
def test_what_cannot_be_compared_gets_no_verdict(summary, tmp_path, changes, told):
    summary()
    written.rerun(tmp_path, "new-lr=0.1-seed=2", **changes)
    found = summarise(load(tmp_path))
    assert any(told in sentence for sentence in found["differing"]), found["differing"]
    assert [claim["verdict"] for claim in found["claims"]] == [None]
    text = report.markdown(found)
    assert f"There is no verdict: {found['differing'][0]}." in text
    assert "new-lr=0.1-seed=2" in text
    assert not any(word in text for word in ("confirmed", "refuted", "undecided"))


def test_the_share_of_the_way_to_an_arm_is_told(summary):
    near, far = {"0.1": [2.0, 2.0, 2.0]}, {"0.1": [1.0, 1.0, 1.0]}
    arms = {"old": near, "half": {"0.1": [1.4, 1.5, 1.3]}, "new": far}
    text = report.markdown(summary(arms, toward="new"))
    assert "Of the way from old to new, by the means: half 60.0%." in text
    assert "Of the way" not in report.markdown(summary(arms))


def test_flops_may_differ_as_far_as_the_rule_says(summary, tmp_path):
    summary(flops=0.01)
    written.rerun(tmp_path, "new-lr=0.1-seed=2", flops_per_token={"visible": 605.0})
    assert summarise(load(tmp_path))["differing"] == []
    written.rerun(tmp_path, "new-lr=0.1-seed=2", flops_per_token={"visible": 607.0})
    assert summarise(load(tmp_path))["differing"] == [
        "FLOPs a token differ: 600 in old-lr=0.1-seed=0; 607 in new-lr=0.1-seed=2"
    ]


def test_how_batches_are_built_is_no_difference(summary, tmp_path):
    summary()
    data = written.CONFIG["data"] | {"micro_batches": 2, "prefetch": 0}
    written.rerun(tmp_path, "new-lr=0.1-seed=2", config={"data": data})
    assert summarise(load(tmp_path))["differing"] == []


def test_runs_of_several_commits_are_named(summary, tmp_path):
    assert "| commit | abc |" in report.markdown(summary())
    written.rerun(tmp_path, "new-lr=0.1-seed=2", commit="def+changes")
    text = report.markdown(summarise(load(tmp_path)))
    assert "def+changes: new-lr=0.1-seed=2" in text
    assert "abc: old-lr=0.1-seed=0, " in text
    assert "files differed from the commit" in text


def test_a_point_with_a_run_that_diverged_is_not_chosen(summary, tmp_path):
    summary()
    folder = tmp_path / "new-lr=0.1-seed=1"
    (folder / "final.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:8]
    last = json.loads(lines[-1]) | {"loss": "NaN"}
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    found = summarise(load(tmp_path))
    assert found["arms"]["new"]["chosen"] == "optim.lr=0.2"
    assert found["differing"] == []
    assert json.loads(report.render(found))["runs"][folder.name]["diverged"] == 7
    text = report.markdown(found)
    assert "Not finite any more: new-lr=0.1-seed=1 at step 7." in text
    assert "| new | optim.lr=0.1 | 1.9900 | not finite | 2.0100 |  |  |" in text


def test_an_arm_without_any_finite_point_is_undecided(summary, tmp_path):
    summary({"old": {"0.1": [2.0, 2.1]}, "new": {"0.1": [2.0, 2.0]}})
    for seed in (0, 1):
        folder = tmp_path / f"new-lr=0.1-seed={seed}"
        (folder / "final.json").unlink()
        row = written.rows(written.CONFIG, 2.0)[0] | {"loss": "Infinity"}
        head = written.header(config={"seed": seed, "optim": {"name": "new", "lr": 0.1}})
        written.write(folder, [{"header": head}, row])
    found = report.write(tmp_path, tmp_path / "out")
    assert [claim["verdict"] for claim in found["claims"]] == ["undecided"]
    assert "| new | none is finite | 0 |" in report.markdown(found)


def test_curves_hold_scores_of_the_same_rows(summary, tmp_path):
    """The last score is of all held-out rows; those before it are of the first 16."""
    found = summary({"old": {"0.1": [2.0, 3.0]}, "new": {"0.1": [2.0, 2.0]}})
    band = found["arms"]["old"]["curve"]
    assert band["tokens"] == [320, 640, 960]
    assert band["mean"] == [2.5 + 0.5**k for k in (1, 2, 3)]
    assert band["low"] == [2.0 + 0.5**k for k in (1, 2, 3)]
    assert band["high"] == [3.0 + 0.5**k for k in (1, 2, 3)]
    assert found["runs"]["old-lr=0.1-seed=0"]["value"] == 2.0
    train = {"train": {"eval_rows": None}}
    for name in found["runs"]:
        written.rerun(tmp_path, name, config=train)
    assert summarise(load(tmp_path))["arms"]["old"]["curve"]["tokens"][-1] == 1280


def test_the_same_runs_give_the_same_bytes(tmp_path):
    written.study(tmp_path, VALUES, earlier_rules=["Claimed: something else."])
    report.write(tmp_path, tmp_path / "a")
    report.write(tmp_path, tmp_path / "b")
    for name in ("fake.json", "fake.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "fake.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "a" / "fake.md").read_text()
    assert "> Claimed: something.\n" in text
    assert "It was changed after runs had begun, from:\n\n> Claimed: something else." in text
    assert "chosen by the best mean of the same metric over the same seeds" in text
    assert "![validation/bits_per_byte of every arm](fake.png)" in text
    held = json.loads((tmp_path / "a" / "fake.json").read_text())
    run = held["runs"]["new-lr=0.2-seed=1"]
    assert run["config"] == {"seed": 1, "optim.name": "new", "optim.lr": 0.2}
    assert run["final"][written.METRIC] == run["value"] == NEW["0.2"][1]
    assert run["score"]["nll"] == 1.0
    assert run["commits"] == ["abc"]
    assert "config" not in run["header"]
    assert held["config"]["steps"] == 40


def test_the_picture_tells_arms_apart():
    arms = {f"arm{k}": None for k in range(20)}
    styles = picture.style(list(arms), "arm3")
    looks = [(look["color"], look["ls"]) for look in styles.values()]
    assert len(set(looks)) == len(arms)
    assert styles["arm3"] == {"color": picture.INK, "ls": "-"}
    assert sum(color == picture.INK for color, _ in looks) == 1


def test_without_matplotlib_there_is_a_sentence_and_the_rest(tmp_path, monkeypatch):
    written.study(tmp_path, VALUES)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib is not installed, so .*fake\.png was not"):
        report.write(tmp_path, tmp_path)
    assert (tmp_path / "fake.md").is_file()
    assert (tmp_path / "fake.json").is_file()


@pytest.mark.parametrize(
    ("values", "changes", "sentence"),
    [
        (None, {}, "there is no .*study.json; `uv run sweep` writes it"),
        ({"old": {"0.1": [2.0, None]}, "new": {"0.1": [2.0, 2.0]}}, {},
         "1 of 4 runs in .* have not ended, old-lr=0.1-seed=1 for one"),
        (VALUES, {"metric": "validation/accuracy"},
         "has no validation/accuracy at its last step; METRIC may be one of .*validation/loss"),
    ],
)  # fmt: skip
def test_no_report_is_one_sentence(tmp_path, monkeypatch, capsys, values, changes, sentence):
    if values:
        written.study(tmp_path, values, **changes)
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path), "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        report.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("report: ")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_main_writes_and_tells_the_verdict(tmp_path, monkeypatch, capsys):
    written.study(tmp_path, VALUES)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path), "-o", str(out)])
    report.main()
    assert capsys.readouterr().out == f"new is better than old: undecided\nreport: {out}/fake.md\n"
    assert sorted(path.name for path in out.iterdir()) == ["fake.json", "fake.md", "fake.png"]


def test_edges_are_of_numbers_that_were_varied():
    grid = {
        f"{name} {lr}": {"point": {"optim.schedule": name, "optim.lr": lr, "steps": "7"}}
        for name in ("a", "b")
        for lr in ("1e-3", "0.002", "4e-3")
    }
    assert at_edge("a 1e-3", grid) == ["optim.lr"]
    assert at_edge("b 4e-3", grid) == ["optim.lr"]
    assert at_edge("b 0.002", grid) == []


@pytest.mark.parametrize("n", [0, 1, POINTS - 1, POINTS, POINTS + 1, 3 * POINTS + 7])
def test_thinned(n):
    points = thinned(list(range(n)))
    assert len(points) <= POINTS
    assert points[-1:] == list(range(n))[-1:]
    assert len({b - a for a, b in itertools.pairwise(points)}) <= 1
    if n <= POINTS:
        assert points == list(range(n))
