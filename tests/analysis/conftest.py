"""Summaries of studies that nobody ran."""

import pytest

from analysis.studies import load
from analysis.summary import summarise
from tests.analysis import written


@pytest.fixture
def summary(tmp_path):
    """summary(values, **changes of study.json)."""

    def make(values=written.VALUES, **changes):
        written.study(tmp_path, values, **changes)
        return summarise(load(tmp_path))

    return make
