import datetime
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from data import bpe, keyed
from data.composed import Dice
from data.sources.records import Source
from data.tokenizers.bytes import Tokenizer as Bytes
from data.tokenizers.hf import Tokenizer as Learnt

DAY = datetime.date.fromisoformat


def documents(count):
    source, keys = Source(), keyed.row_keys(keyed.key("records"), np.arange(count))
    return [source.text(Dice(keys[k : k + 1])) for k in range(count)]


def order(record):
    assert [item["amount"] for item in record["items"]] == [
        item["quantity"] * item["price"] for item in record["items"]
    ]
    assert record["total"] == sum(item["amount"] for item in record["items"])
    names = [item["name"] for item in record["items"]]
    assert len(set(names)) == len(names) > 0
    assert set(record["customer"]) == {"name", "city"}
    assert DAY(record["date"])


def trip(record):
    for one, other in itertools.pairwise(record["legs"]):
        assert one["to"] == other["from"]
    assert record["distance"] == sum(leg["km"] for leg in record["legs"])
    stops = [record["legs"][0]["from"], *(leg["to"] for leg in record["legs"])]
    assert len(set(stops)) == len(stops)
    assert (DAY(record["returns"]) - DAY(record["departs"])).days == record["days"] > 0


def readings(record):
    values = record["values"]
    derived = [record[name] for name in ("count", "low", "high", "sum")]
    assert derived == [len(values), sorted(values)[0], sorted(values)[-1], sum(values)]


def team(record):
    assert record["size"] == len(record["members"])
    assert all(member["born"] + member["age"] == record["year"] for member in record["members"])
    assert record["oldest"] == max(member["age"] for member in record["members"])


def account(record):
    balance, dates = record["opening"], [entry["date"] for entry in record["entries"]]
    for entry in record["entries"]:
        balance += entry["change"]
        assert entry["balance"] == balance
    assert record["closing"] == balance
    assert all(DAY(one) < DAY(other) for one, other in itertools.pairwise(dates))


def match(record):
    home, away = (sum(period[k] for period in record["periods"]) for k in range(2))
    assert record["score"] == [home, away]
    ahead = {True: record["sides"][0], False: record["sides"][1]}
    assert record["winner"] == (None if home == away else ahead[home > away])
    assert len(set(record["sides"])) == 2


SCHEMAS = {check.__name__: check for check in (order, trip, readings, team, account, match)}


def holds(text):
    assert text.endswith("\n")
    assert text.count("\n") == 1
    record = json.loads(text)
    SCHEMAS[record["type"]](record)
    assert json.dumps(record, ensure_ascii=False) + "\n" == text
    return record


@given(key=st.integers(0, 2**64 - 1))
def test_every_record_holds_what_its_schema_says(key):
    holds(Source().text(Dice(np.array([key], np.uint64))))


def test_many_records():
    texts = documents(1500)
    records = [holds(text) for text in texts]
    assert len(set(texts)) == 1500
    counts = [sum(record["type"] == name for record in records) for name in SCHEMAS]
    assert stats.chisquare(counts).pvalue > 0.01
    winners = [r["winner"] in r["sides"] for r in records if r["type"] == "match"]
    assert set(winners) == {True, False}
    assert texts == documents(1500)


def test_nothing_is_told_by_another_record():
    """Fields that are drawn differ between records: an order's number, dates, names."""
    records = [json.loads(text) for text in documents(1500)]
    orders = [record["id"] for record in records if record["type"] == "order"]
    assert len(set(orders)) > 0.99 * len(orders)
    days = [DAY(record["date"]) for record in records if "date" in record]
    assert (min(days).year, max(days).year) == (1990, 2029)
    assert {day.month for day in days} == set(range(1, 13))


@pytest.mark.parametrize("learnt", [False, True])
def test_rows_read_as_the_records(learnt, tmp_path):
    tokenizer = Bytes()
    if learnt:
        path = tmp_path / "tokenizer.json"
        path.write_text(bpe.train([text.encode() for text in documents(200)], 500))
        tokenizer = Learnt(path=str(path))
    keys = keyed.row_keys(keyed.key("rows"), np.arange(20))
    rows = Source().draw(keys, 1200, tokenizer)
    for inputs, segments in zip(rows.inputs, rows.segment_ids, strict=True):
        for segment in range(2, segments.max()):  # The first and the last are cut.
            eos, *ids = inputs[segments == segment].tolist()
            assert eos == tokenizer.eos
            holds(tokenizer.decode(ids))
        assert segments.max() > 3


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"records\.holdout_rows must be at least 0, got -1\."):
        Source(holdout_rows=-1)
