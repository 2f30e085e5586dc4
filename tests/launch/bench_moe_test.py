"""`bench moe` times every method on the same rows and parameters."""

import pytest

from launch.bench import moe
from launch.schema import UsageError

TINY = """
from experiments import quickstart


def get_config():
    config = quickstart.get_config()
    config.data.batch_size = 16
    config.data.length = 16
    config.data.sources.stdlib = dict(max_bytes=100_000)
    config.model.d_model = 32
    config.model.layers = 2
    config.model.ffn = "moe"
    config.model.ffns.moe = dict(experts=4, width=16, {own})
    {more}
    return config
"""


def tiny(folder, own="", more="pass"):
    path = folder / "tiny.py"
    path.write_text(TINY.format(own=own, more=more))
    return str(path)


def test_a_row_a_method_and_split(tmp_path):
    own = dict(methods="global_batch", micro_batches="1,2", seconds=0.001, repetitions=2)
    report = moe.bench(config=tiny(tmp_path), **own)
    assert [row.what for row in report.rows] == [
        "global_batch, one micro-batch",
        "global_batch, 2 micro-batches",
    ]
    for row in report.rows:
        assert len(row.ours) == len(row.peer) == 2
        assert min(row.ours + row.peer) > 0
    assert "16 x 16 tokens a step" in report.title


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (dict(micro_batches="1,x"), "--micro_batches takes numbers"),
        (dict(micro_batches="0"), "micro_batches"),
        (dict(micro_batches="3"), "batch_size 16 does not divide into 3 micro-batches"),
        (dict(micro_batches="4"), "16 rows in 4 micro-batches leave 4 a micro-batch"),
        (dict(methods="globl_batch"), "globl_batch"),
    ],
)
def test_what_cannot_be_timed_is_a_sentence(own, said, tmp_path):
    with pytest.raises(UsageError, match=said) as error:
        moe.bench(config=tiny(tmp_path), **own)
    assert "\n" not in str(error.value)


def test_a_configuration_in_which_no_layer_routes_is_refused(tmp_path):
    path = tiny(tmp_path, more='config.model.ffn = "swiglu"')
    with pytest.raises(UsageError, match=r"no layer of .* routes; set model\.ffn=moe"):
        moe.bench(config=path)
