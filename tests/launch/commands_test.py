"""The three commands from their command lines to what they print."""

import functools
import io
import json
import shutil
import sys

import jax
import pytest

from launch import evaluate, generate, train
from launch.config import resolve
from launch.files import read
from launch.setup import build, header
from parallel import mesh as meshes
from tests import tiny
from training.checkpoint import Checkpoints
from training.metrics import read as read_metrics

COMMANDS = {"train": train.main, "evaluate": evaluate.main, "generate": generate.main}


@pytest.fixture(autouse=True, scope="module")
def machine():
    """A machine with one device. Commands set the mesh of their process; it is taken back here."""
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(None):
        patch.setattr(meshes, "make", functools.partial(meshes.make, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def call():
    """call(command, *argv, stdin): (exit status, stdout, stderr) of main() in this process."""

    def run(command, *argv, stdin=""):
        out, err, status = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [command, *map(str, argv)])
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            try:
                COMMANDS[command]()
            except SystemExit as stop:
                status = stop.code
        return status, out.getvalue(), err.getvalue()

    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def trained(call, root, tmp_path_factory):
    """(workdir, stdout, stderr) of a short run."""
    workdir = tmp_path_factory.mktemp("runs") / "first"
    argv = tiny.flags(root, steps=3, train__eval_every=2)
    status, out, err = call("train", "--config", "base", "--workdir", workdir, *argv)
    assert status == 0, err
    return workdir, out, err


def sentence(result, *parts):
    """Exit status 2, and one line on stderr that holds the parts."""
    status, out, err = result
    assert status == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert str(part) in err, err


def test_train_says_what_it_runs_what_came_out_and_what_is_next(trained):
    workdir, out, err = trained
    _, rows = read_metrics(workdir / "metrics.jsonl")
    counts = read_metrics(workdir / "metrics.jsonl")[0]["parameters"]
    assert err.startswith(f"{counts['total']:,} parameters ({counts['without_embeddings']:,} ")
    assert "3 steps of 4 x 32 = 128 tokens" in err
    assert f"step      2  held-out loss {rows[2]['validation/loss']:.4f}" in err
    assert f"loss {rows[-1]['validation/loss']:.4f} nats a token" in out
    assert f"{rows[-1]['validation/bits_per_byte']:.3f}" in out
    for words in ("sample\ndef ", "--config.steps=6", f"uv run evaluate --workdir {workdir}"):
        assert words in out, out
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]


def test_train_again_says_that_the_run_is_finished(call, root, trained):
    workdir, out, _ = trained
    before = (workdir / "metrics.jsonl").read_bytes()
    argv = tiny.flags(root, steps=3, train__eval_every=2)
    status, again, _ = call("train", "--config", "base", "--workdir", workdir, *argv)
    assert status == 0
    assert " --config.train.eval_every=2" in again  # the next commands keep what was chosen
    first, rest = again.split("\n", 1)
    assert first == f"this run is finished: {workdir} holds step 3 of 3"
    assert rest == out
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_header_says_what_the_run_was(root, trained):
    workdir, _, _ = trained
    found, _ = read_metrics(workdir / "metrics.jsonl")
    overrides = tiny.overrides(root, steps=3, train__eval_every=2)
    assert found["config"] == json.loads(json.dumps(resolve("base", overrides)))
    assert found["device"] == {"kind": "cpu", "count": 1}
    assert found["versions"]["jax"] == jax.__version__
    assert found["flops_per_token"]["visible"] > 6 * found["parameters"]["without_embeddings"]
    assert {"fingerprint", "seed", "hosts", "parameters"} <= set(found)


def test_evaluate_repeats_the_score_that_train_gave(call, trained):
    workdir, _, _ = trained
    final = json.loads((workdir / "final.json").read_text())
    status, out, err = call("evaluate", "--workdir", workdir)
    assert status == 0, err
    lines = dict(line.rsplit(maxsplit=1) for line in out.splitlines())
    assert lines["step"] == "3"
    assert lines["targets"] == f"{final['targets']:,.0f}"
    assert lines["loss"] == f"{final['nll'] / final['targets']:.4f}"
    assert lines["accuracy"] == f"{final['right'] / final['targets']:.4f}"
    names = "step", "targets", "loss", "perplexity", "accuracy", "bits per byte"
    assert set(lines) == set(names)
    status, out, _ = call("evaluate", "--workdir", workdir, "--rows=4", "--batch=4")
    assert status == 0
    assert int(out.splitlines()[1].split()[1]) < final["targets"]


def test_generate_continues_a_prompt_and_every_line_of_stdin(call, trained):
    workdir, _, _ = trained
    argv = ("generate", "--workdir", workdir, "--tokens=6", "--temperature=0")
    status, out, err = call(*argv, "--prompt", "def function")
    assert status == 0, err
    assert out.startswith("def function")
    assert len(out) > len("def function\n")
    status, both, _ = call(*argv, stdin="def function\nreturn\n")
    assert status == 0
    assert both.startswith(out)
    assert both.removeprefix(out).startswith("return")


def test_an_encoder_does_not_continue_text(call, root, tmp_path):
    workdir = tmp_path / "encoder"
    built = build(resolve("base", tiny.overrides(root, model__causal="false")))
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(built.program.init(), {"header": header(built)})
    sentence(call("generate", "--workdir", workdir, "--prompt=x"), workdir, "holds an encoder")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_flags_and_keys(call, command):
    status, out, err = call(command, "--help")
    assert (status, err) == (0, "")
    assert f"uv run {command}" in out
    assert "--workdir=STR" in out
    for words in ("data.batch_size = 8", "model.mixers.attention.heads = 4"):
        assert (words in out) == (command == "train")


def test_help_has_the_flags_of_the_command(call):
    assert "--rows=INT" in call("evaluate", "--help")[1]
    assert "--top_p=FLOAT" in call("generate", "--help")[1]


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_workdir_without_a_run(call, command, tmp_path):
    given = ("--prompt=x",) if command == "generate" else ()
    sentence(call(command, *given), f"{command}: give --workdir FOLDER")
    sentence(call(command, "--workdir", tmp_path / "no", *given), "no finished checkpoint in")
    sentence(call(command, "--workdir", tmp_path, *given), tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    sentence(call(command, "--workdir", file, *given), file)


def test_a_workdir_that_cannot_be_one(call, root, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    argv = tiny.flags(root, steps=1)
    status, out, err = call("train", "--config", "base", "--workdir", file, *argv)
    assert (status, out) == (2, "")
    assert err == f"train: --workdir {file} is a file; give a folder\n"


def test_a_damaged_checkpoint(call, trained, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(trained[0], workdir)
    for path in (workdir / "checkpoints" / "3" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    sentence(call("evaluate", "--workdir", workdir), workdir, "no step in", "is sound (step 3: ")


def test_another_corpus_is_refused_by_train_and_told_by_evaluate(call, root, trained, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(trained[0], workdir)
    argv = ["--config", "base", "--workdir", workdir]
    argv += tiny.flags(root, steps=4, data__sources__stdlib__max_bytes=3000)
    status, out, err = call("train", *argv)
    assert (status, out) == (2, "")
    assert "the corpus is not the one" in err
    meta = workdir / "checkpoints" / "3" / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    status, _, err = call("evaluate", "--workdir", workdir, "--rows=4", "--trust")
    assert status == 0
    assert "note: the corpus has fingerprint" in err


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["train: give --config FILE"]),
        (["--config", "nothing.py"], ["there is no configuration 'nothing.py'"]),
        (["--config", "base", "--config.stepz=3"], ["did you mean steps?"]),
        (["--config", "base", "--config.model.dmodel=3"], ["did you mean model.d_model?"]),
        (["--config", "base", "--stepz=3"], ["there is no flag --stepz"]),
        (["--config", "base", "--config.steps=many"], ["takes an integer and got 'many'"]),
        (["--config", "base", "--config.mesh.data=3"], ["needs 3 devices and there are 1"]),
        (["--config", "base", "--config.data.micro_batches=3"], ["8 does not divide into 3"]),
        (["--config", "base", "--config.data.sources.stdlib.root=/none"], ["no non-empty *.py"]),
        (["--config", "base", "--config.trainable=no/such"], ["matches no parameter"]),
        (["--config", "base", "--config.model.vocab=100"], ["the tokenizer has 258 ids"]),
    ],
)
def test_mistakes_are_one_sentence(call, argv, parts):
    sentence(call("train", *argv), *parts)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--tokens=0"], "tokens is 0"),
        (["--top_k=0"], "top_k must be at least 1"),
        (["--temperature=-1"], "temperature must be"),
        (["--top_p=2"], "top_p must lie in"),
    ],
)
def test_generate_refuses_options_that_mean_nothing(call, trained, argv, part):
    sentence(call("generate", "--workdir", trained[0], "--prompt=x", *argv), part)


def test_generate_without_any_prompt(call, trained):
    sentence(call("generate", "--workdir", trained[0]), "there is no prompt; give --prompt TEXT")


@pytest.mark.parametrize("option", ["--rows=0", "--batch=0"])
def test_evaluate_refuses_rows_that_do_not_fit(call, trained, option):
    sentence(call("evaluate", "--workdir", trained[0], option), f"{option[-1]} ")


def test_a_printed_configuration_is_what_runs(call, root, tmp_path):
    argv = tiny.flags(root)
    status, text, err = call("train", "--config", "base", *argv, "--print_config")
    assert (status, err) == (0, "")
    assert read(text) == resolve("base", tiny.overrides(root))
    path = tmp_path / "printed.txt"
    path.write_text(text)
    assert call("train", "--config", path, "--print_config") == (0, text, "")


def test_print_params_prints_the_table_with_totals(call, root):
    argv = tiny.flags(root)
    status, out, err = call("train", "--config", "base", *argv, "--print_params")
    assert (status, err) == (0, "")
    head, *rows, total, padded = out.splitlines()
    assert head.split() == ["path", "shape", "axes", "start", "group", "decay", "parameters"]
    sizes = {row.split()[0]: int(row.split()[-1].replace(",", "")) for row in rows}
    assert {"tokens", "final_norm/scale", "blocks/0/mixer/q"} <= set(sizes)
    held = sum(sizes.values())
    assert padded == f"{held:,} with the vocabulary of 258 padded"
    assert total.startswith(f"{held - (384 - 258) * 32:,} parameters, ")
