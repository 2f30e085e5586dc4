"""The weights of every shipped model: what they are called, how they are laid out, how many.

`UPDATE_GOLDEN=1 uv run pytest tests/golden_test.py` writes the files anew. No array is made.
"""

import os
import pathlib

import jax
import pytest

from data.tokenizers.bytes import Tokenizer
from launch.config import resolve
from launch.setup import parameter_counts, parameter_table
from models.lm import padded
from parallel import mesh as meshes
from training import program

FOLDER = pathlib.Path(__file__).parent / "golden"
NAMES = ("base", "quickstart", "gpt2_124m", "llama_1b", "llama_7b", "bert_base")
NAMES += ("mixtral_8x7b", "deepseek_moe_16b")
PUBLISHED = {
    "gpt2_124m": 124_439_808,
    "llama_1b": 1_235_814_400,
    "llama_7b": 6_738_415_616,
    "bert_base": 109_514_298,
    "mixtral_8x7b": 46_702_792_704,
    "deepseek_moe_16b": 16_375_728_128,
}


@pytest.fixture(scope="module")
def declared():
    """{name: (table, vocabulary)}."""
    found = {}
    for name in NAMES:
        config = resolve(name)
        mesh = meshes.make(jax.devices()[:1], **config["mesh"])
        vocab = config["model"]["vocab"] or Tokenizer().vocab_size
        found[name] = program.build(config, mesh, vocab).table, vocab
    return found


@pytest.mark.parametrize("name", NAMES)
def test_table(declared, name):
    text, path = parameter_table(*declared[name]), FOLDER / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size(declared, name):
    assert parameter_counts(*declared[name])["total"] == PUBLISHED[name]


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_that_of_the_vocabulary(declared, name):
    table, vocab = declared[name]
    counts = parameter_counts(table, vocab)
    unused = padded(vocab) - vocab
    width = sum(
        entry.shape[1 - entry.axes.index("vocab")] if len(entry.shape) > 1 else 1
        for entry in table.values()
        if "vocab" in entry.axes
    )
    assert counts["padded"] - counts["total"] == unused * width


def test_every_file_belongs_to_a_model():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(NAMES)
