"""Attention to Hedgehog from end to end, on one device."""

import io
import itertools
import json
import shutil
import struct
import sys
import types

import jax
import numpy as np
import pytest

from launch import convert, convert_pictures, converting, report, weights
from launch.conversion import FLAGS
from parallel import mesh as meshes
from tests import tiny
from training import events, loop, metrics, resume, start
from training.checkpoint import Checkpoints


@pytest.fixture(autouse=True, scope="module")
def machine():
    """One device, and no sample of text, which would take longer than the runs."""
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(None):
        make = meshes.make
        patch.setattr(meshes, "make", lambda *_, **sizes: make(jax.devices()[:1], **sizes))
        patch.setattr(report, "sampler", lambda built: None)
        yield


def call(*argv):
    """(exit status, stdout, stderr) of the command in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            convert.main(list(map(str, argv)))
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    root, folder = (
        tiny.corpus(tmp_path_factory.mktemp("corpus")),
        tmp_path_factory.mktemp("teacher"),
    )
    own = dict(model__layers=2, model__mixers__attention__heads=2, optim__lr=0.01, ema=0.5)
    built = tiny.setup(root, **own)
    with jax.set_mesh(built.mesh):
        loop.run(tiny.run(built, folder, steps=20))
    return folder


STEPS = 20
SIZES = (f"--transfer_steps={STEPS}", f"--steps={STEPS}")


@pytest.fixture(scope="module")
def converted(teacher, tmp_path_factory):
    """(--out, what was said) of a conversion that is killed before its second run, and goes on."""
    out, run = tmp_path_factory.mktemp("student"), loop.run
    argv = ("--workdir", teacher, "--out", out, *SIZES)
    begun = []

    def killed(job):
        begun.append(job.workdir.name)
        if begun == ["transfer", "tuned"]:
            raise KeyboardInterrupt
        return run(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run", killed)
        assert call(*argv)[0] == 130
        status, said, err = call(*argv)
    assert (status, begun) == (0, ["transfer", "tuned", "tuned"]), err
    return out, argv, said


def losses(folder, name="loss"):
    _, rows = metrics.read(folder / "metrics.jsonl")
    return [row[name] for row in rows if name in row]


def test_only_maps_change_in_the_first_run(teacher, converted):
    with Checkpoints(teacher) as source, Checkpoints(converted[0] / "transfer") as checkpoints:
        effective, _ = source.restore_params(aux="ema")
        frozen, _ = checkpoints.restore_params(aux="frozen")
        maps, _ = checkpoints.restore_params()
    assert set(frozen) == set(effective)
    for path, value in effective.items():
        np.testing.assert_array_equal(frozen[path], value, path)
    assert set(maps) == {f"blocks/0/mixer/{name}_map" for name in "qk"}
    for value in maps.values():
        assert np.all(np.any(value != np.eye(16)[None, None], (1, 2, 3)))  # of every layer


def test_every_layer_comes_nearer_to_attention(converted):
    """A mean of three steps at either end, above the teacher's own entropy."""
    for layer in range(2):
        of = lambda name, layer=layer: np.array(
            losses(converted[0] / "transfer", f"blocks/0/mixer/{name}/{layer}")
        )
        over = of("attention_transfer") - of("teacher_entropy")
        assert len(over) == STEPS
        assert np.mean(over[-3:]) < 0.9 * np.mean(over[:3])
        assert np.min(over) > 0


def test_what_it_says_and_writes(teacher, converted):
    out, argv, said = converted
    told = json.loads((out / "conversion.json").read_text())
    assert (told["teacher"], told["layers"]) == (str(teacher), [0, 1])
    assert list(told["losses"]) == ["teacher", "student", "transfer", "tuned"]
    loss = {name: score["loss"] for name, score in told["losses"].items()}
    assert loss["teacher"] == loop.final(teacher, 20).loss
    assert loss["tuned"] == loop.final(out / "tuned", STEPS).loss
    assert len({score["targets"] for score in told["losses"].values()}) == 1
    assert loss["tuned"] < loss["transfer"] < loss["student"]
    for name, value in zip(converting.NAMES.values(), loss.values(), strict=True):
        assert any(line.startswith(name) and f"{value:.4f}" in line for line in said.splitlines())
    status, again, err = call(*argv)  # nothing is left to do
    assert (status, again, err) == (0, said, "")


def test_curves_and_pictures_reach_tensorboard(converted):
    found = {}
    for path in converted[0].rglob("*tfevents*"):
        for _, event in events._records(path.read_bytes()):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value))
    for layer in range(2):
        curve = found[f"blocks/0/mixer/attention_transfer/{layer}"]
        assert [step for step, _ in curve] == list(range(1, STEPS + 1))
        images = found[f"attention/layer_0{layer}"]
        assert [step for step, _ in images] == [0, STEPS]
        for _, value in images:
            png = value.image.encoded_image_string
            assert png[:4] == b"\x89PNG"
            assert struct.unpack(">II", png[16:24]) == (value.image.width, value.image.height)
        assert (converted[0] / "pictures" / f"layer_0{layer}.png").stat().st_size > 1000


def test_half_of_the_layers_with_lora(teacher, tmp_path, monkeypatch):
    """The second run begins with attention as it was, and trains factors and maps alone."""
    run, begun = loop.run, []

    def until_tuned(job):
        if job.workdir.name == "transfer":
            return run(job)
        begun.append(jax.device_get(start.first(job)[0]))
        return types.SimpleNamespace(step=0)

    monkeypatch.setattr(loop, "run", until_tuned)
    monkeypatch.setattr(converting, "_before", lambda job, book: None)
    monkeypatch.setattr(convert_pictures, "draw", lambda *_: None)
    own = ("--layers=1", "--lora=1", "--match=outputs", "--window=4", "--form=fla")
    argv = ("--workdir", teacher, "--out", tmp_path, *own, "--transfer_steps=2", "--steps=2")
    status, out, err = call(*argv)
    assert status == 0, err
    assert out.startswith("stopped at step 0 of 2 of tuned, saved; to go on: uv run convert --work")
    assert "(blocks/1/mixer/k_map, blocks/1/mixer/k_map_bias, blocks/1/mixer/mix and others)" in err
    with Checkpoints(teacher) as source, Checkpoints(tmp_path / "transfer") as checkpoints:
        before, _ = source.restore_params(aux="ema")
        taught, meta = checkpoints.restore_params()
    model = meta["header"]["config"]["model"]
    expected = [], ["attention", "hedgehog"], []
    assert tuple(model[key] for key in ("prefix", "pattern", "suffix")) == expected
    trained, frozen = begun[0].params, begun[0].aux["frozen"]
    for layer, name in itertools.product(range(2), ("mixer/q", "mixer/out", "ffn/up")):
        value = frozen[f"blocks/{layer}/{name}"]
        np.testing.assert_array_equal(value[0], before[f"blocks/0/{name}"][layer])
    factors = {path for path in trained if "/lora_" in path}
    assert len(factors) == 12
    assert set(trained) - factors == set(taught)
    for path, value in taught.items():
        np.testing.assert_array_equal(trained[path], value, path)
        assert np.any(value != (np.eye(16)[None, None] if path.endswith("map") else 0)), path


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "give --workdir FOLDER, the folder of the teacher's run"),
        (("--workdir=x",), "give --out FOLDER"),
        (("--workdir=x", "--out=x"), "--out x is the teacher's own folder"),
        (("--workdir=x", "--out=y"), "no finished checkpoint in"),
        (("--config=base", "--workdir=x", "--out=y"), "--config is the teacher's own"),
        (("--config.optim.lr=1", "--workdir=x", "--out=y"), "give --transfer_lr and --lr"),
        (("--form=relu",), "--form takes paper | lolcats | fla"),
        (("--workdir=TEACHER", "--out=OUT", "--steps=0"), "--steps is 0 and must be at least 1"),
        (
            ("--workdir=TEACHER", "--out=OUT", "--config.data.size=1"),
            "transfer: --config.data.size",
        ),
        (("--workdir=TEACHER", "--out=DONE", *SIZES, "--lora=2"), "tuned holds a run of another"),
        (("--workdir=TEACHER", "--out=DONE", "--transfer_steps=30"), "began with step 20 of"),
    ],
)
def test_refusals_change_nothing(argv, said, teacher, converted, tmp_path):
    folders = {"TEACHER": teacher, "DONE": converted[0], "OUT": tmp_path / "out"}
    for name, folder in folders.items():
        argv = [text.replace(name, str(folder)) for text in argv]
    kept = lambda: {p: p.stat().st_mtime_ns for p in converted[0].rglob("*")}
    before = kept()
    status, out, err = call(*argv)
    assert (status, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert kept() == before
    assert not (tmp_path / "out").exists()


def test_stopped_in_the_middle_says_how_to_go_on(teacher, tmp_path, monkeypatch):
    stopped = lambda job: types.SimpleNamespace(step=3)
    monkeypatch.setattr(loop, "run", stopped)
    monkeypatch.setattr(converting, "_before", lambda job, book: None)
    status, out, _ = call("--workdir", teacher, "--out", tmp_path, *SIZES)
    assert status == 0
    assert out.startswith(
        f"stopped at step 3 of {STEPS} of transfer, saved; to go on: uv run convert"
    )


def test_commands_that_do_the_same(teacher, tmp_path):
    status, out, _ = call("--workdir", teacher, "--out", tmp_path, "--print")
    assert status == 0
    assert out.splitlines() == [
        f"uv run train --config {tmp_path}/{name}.txt --workdir {tmp_path}/{name}"
        for name in ("transfer", "tuned")
    ]


def test_two_at_once_are_refused(teacher, tmp_path):
    with resume.lock(tmp_path):
        status, said, err = call("--workdir", teacher, "--out", tmp_path, *SIZES)
    assert (status, said) == (2, "")
    assert f"another conversion is at work in {tmp_path}; wait for it" in err
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_the_flags_are_explained():
    status, out, _ = call("--help")
    assert status == 0
    assert all(f"  --{name}" in out for name in FLAGS)


def test_weights_of_a_study_s_runs_are_compared_with_softmax(teacher, converted, tmp_path, capsys):
    folder = tmp_path / "study"
    names = {"taught-seed=0": converted[0] / "transfer", "tuned-seed=1": converted[0] / "tuned"}
    for name, run in (names | {"teacher-seed=0": teacher}).items():
        shutil.copytree(run, folder / name)
    told = {n: {"arm": n.partition("-")[0], "seed": int(n[-1])} for n in [*names, "teacher-seed=0"]}
    told["tuned-seed=1"]["point"] = {"optim.lr": "0.1"}
    (folder / "study.json").write_text(json.dumps({"runs": told}))
    weights.main([str(folder), "--rows=2", "--tokens=24", f"--out={tmp_path / 'out'}"])
    assert f"report: {tmp_path / 'out' / 'weights.md'}" in capsys.readouterr().out
    held = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert {arm: list(seeds) for arm, seeds in held["arms"].items()} == {
        "taught": ["0"], "tuned lr=0.1": ["1"],
    }  # fmt: skip
    taught = held["arms"]["taught"]["0"]
    assert [x["layer"] for x in taught["heads"]] == [0] * 2 + [1] * 2
    means = taught["means"]
    assert 0 < means["teacher_entropy"] <= means["entropy"] <= np.log(24)
    assert means["divergence"] > 0
    assert means["monotonicity"] > 0.5  # its maps have learned to follow the scores
    assert (tmp_path / "out" / "weights.png").is_file()


def test_weights_of_runs_that_have_not_ended_are_refused(converted, tmp_path, capsys):
    shutil.copytree(converted[0] / "tuned", tmp_path / "a")
    (tmp_path / "a" / "final.json").unlink()
    for text, said in (
        ("[", f"{tmp_path / 'study.json'} is damaged"),
        ('{"runs": {"a": {"arm": "x", "seed": 0}}}', "1 of 1 runs have not ended, a for one"),
    ):
        (tmp_path / "study.json").write_text(text)
        with pytest.raises(SystemExit):
            weights.main([str(tmp_path)])
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere"], "nowhere holds neither a study nor a run"),
        (["nowhere", "--rows=0"], "--rows is 0 and must be at least 1"),
        (["--rows=2"], "name the folder of a study or of a run first"),
        (["TEACHER"], "has linear attention whose weights could be compared"),
    ],
)
def test_weights_that_cannot_be_compared_are_a_sentence(argv, said, teacher, capsys):
    with pytest.raises(SystemExit) as stopped:
        weights.main([str(teacher) if x == "TEACHER" else x for x in argv])
    assert stopped.value.code == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("weights: ")
    assert said in err
