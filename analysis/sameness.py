"""What should be equal between the runs of a study, and where and on what they ran."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping

from analysis.records import Record
from analysis.studies import Study

# How batches are built and split, on which no row depends.
LAYOUT = ("prefetch", "workers", "micro_batches")


def tokens(record: Record) -> int:
    """Seen by the last step; of a run that diverged, planned."""
    data = record.config["data"]
    planned = record.config["steps"] * data["batch_size"] * data["length"]
    return record.last["tokens"] if record.ended else planned


def flops_per_token(record: Record) -> float | None:
    """Of the model's matrix products, forward and backward, without what a mask hides."""
    return record.headers[0]["flops_per_token"].get("visible")


def _data(record: Record) -> dict:
    return {key: x for key, x in record.config["data"].items() if key not in LAYOUT}


# For runs of one seed these decide which rows they read, and in which order; a run that goes on
# from another begins with the first row again.
EQUAL = {
    "corpora": lambda record: sorted({head["fingerprint"] for head in record.headers}),
    "tokenizers": lambda record: record.headers[0]["tokenizer"],
    "keys of data": _data,
}


def differences(study: Study) -> list[str]:
    """A sentence on each thing that must be equal for a verdict, and is not or is unknown."""
    return [told for names in study.compared() for told in _differences(study, names)]


def _differences(study: Study, compared: list[str]) -> Iterator[str]:
    along = lambda of: lambda name: [of(record) for record in reversed(study.chain(name))]
    text = lambda x: json.dumps(x, sort_keys=True)
    facts = {what: lambda name, of=of: text(_short(along(of)(name))) for what, of in EQUAL.items()}
    steps = lambda name: [str(n) for n in along(tokens)(name) if n]  # a stage may only be scored
    facts["tokens"] = lambda name: ", then ".join(steps(name)) or "none"
    for what, of in facts.items():
        groups = groups_of(compared, of)
        if len(groups) > 1:
            told = "; ".join(f"{text} in {_some(names)}" for text, names in groups.items())
            yield f"{what} differ: {told}"
    each = {name: _flops_along(study, name) for name in compared}
    yield from _work(each, study.rule.flops)
    if unknown := [name for name, flops in each.items() if flops is None]:
        yield f"FLOPs are unknown of {_some(unknown)}"


def _short(values: list) -> object:
    """What each run of a chain has, once where it is the same."""
    return values[0] if all(value == values[0] for value in values) else values


def _flops_along(study: Study, name: str) -> float | None:
    """FLOPs a token over all runs of a chain."""
    each = [(tokens(record), flops_per_token(record)) for record in study.chain(name)]
    total = sum(n for n, _ in each)
    if None in (flops for _, flops in each):
        return None
    return sum(n * flops for n, flops in each) / total if total else each[0][1]


def _work(each: Mapping[str, float | None], share: float) -> Iterator[str]:
    """FLOPs a token that lie further apart than the rule allows."""
    known = {name: flops for name, flops in each.items() if flops}
    if known:
        least, most = min(known, key=known.get), max(known, key=known.get)
        if known[most] > known[least] * (1 + share):
            told = f"{known[least]:,.0f} in {least}; {known[most]:,.0f} in {most}"
            yield f"FLOPs a token differ: {told}"


def ran(study: Study) -> dict[str, dict[str, list[str]]]:
    """{what: {fact: runs of which it holds}}."""
    head = lambda key: lambda name: _text([x.get(key) for x in study.records[name].headers])
    flops = lambda record: tokens(record) * (flops_per_token(record) or 0)
    total = lambda of: lambda name: sum(map(of, study.chain(name)))
    facts = {
        "commit": head("commit"),
        "device": head("device"),
        "processor": head("processor"),
        "versions": head("versions"),
        "corpus": head("fingerprint"),
        "parameters": head("parameters"),
        "tokens": lambda name: f"{total(tokens)(name):,}",
        "FLOPs": lambda name: f"{total(flops)(name):.4g}",
    }
    return {what: groups_of(study.records, of) for what, of in facts.items()}


def groups_of(names: Iterable[str], of: Callable[[str], str]) -> dict[str, list[str]]:
    """{fact: names of the runs that have it}."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(of(name), []).append(name)
    return groups


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _text(values: list) -> str:
    """What the headers of one run say, each thing once."""

    def plain(value: object) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{key} {x}" for key, x in value.items())
        return "unknown" if value is None else str(value)

    return ", then ".join(dict.fromkeys(map(plain, values)))
