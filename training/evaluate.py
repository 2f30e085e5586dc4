"""Loss on the held-out split: always the same rows, in one order, whatever the batch size."""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np

from data.batch import Batch
from parallel.rules import ways
from training.program import Program, batch_sharding


@dataclasses.dataclass(frozen=True)
class Score:
    """nll: nats over `targets` tokens, which stand for `bytes` bytes of text; `right` of them are
    the model's first choice, None in a record of before this was counted.

    domains: nats a target by name, of each domain that has any.  weights: their numbers of targets.
    Both are empty where the corpus has one domain only.
    """

    nll: float
    targets: float
    bytes: int
    domains: dict[str, float] = dataclasses.field(default_factory=dict)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    right: float | None = None

    @property
    def loss(self) -> float:
        """Nats a target."""
        return self.nll / self.targets

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def accuracy(self) -> float | None:
        """Share of the targets that the model thinks likeliest."""
        return None if self.right is None else self.right / self.targets

    @property
    def bits_per_byte(self) -> float | None:
        """None where the targets stand for no text."""
        return self.nll / math.log(2) / self.bytes if self.bytes else None

    def summary(self) -> dict[str, float]:
        """loss, perplexity, accuracy and bits_per_byte, each where it is defined."""
        names = "loss", "perplexity", "accuracy", "bits_per_byte"
        named = {n: getattr(self, n) for n in names}
        return {name: value for name, value in named.items() if value is not None}

    def values(self) -> dict[str, float]:
        """For a log: the summary, and the loss of each domain."""
        return self.summary() | {f"loss/{name}": loss for name, loss in self.domains.items()}


def held_out(
    program: Program,
    params: dict,
    data,
    mesh,
    *,
    rows: int,
    limit: int | None = None,
    progress: Callable = iter,
) -> Score:
    """The score of the first `limit` validation rows (all when None), `rows` at a time.

    Raises ValueError where there is nothing to score, and for rows that do not divide over devices.
    """
    devices = ways(mesh, "batch")
    if rows < 1 or rows % devices:
        raise ValueError(f"{rows} rows at a time do not divide over {devices} devices; change one")
    if limit is not None and limit < 1:
        raise ValueError(f"{limit} held-out rows are none to score; ask for more, or for all")
    totals: dict[str, np.ndarray] = {}
    text = 0
    for batch in progress(data.evaluation(rows, limit)):
        sums = jax.device_get(program.evaluate(params, place(batch, mesh)))
        totals = {name: totals.get(name, 0.0) + np.float64(x) for name, x in sums.items()}
        text += data.tokenizer.count_bytes(batch.targets, batch.weights)
    if not totals.get("weight"):
        raise ValueError("the held-out rows have no target to score; hold out more of the corpus")
    domains, weights = _by_domain(totals, data)
    nll, weight, right = (float(totals[name]) for name in ("nll", "weight", "right"))
    return Score(nll, weight, text, domains, weights, right)


def _by_domain(totals: dict, data) -> tuple[dict[str, float], dict[str, float]]:
    if "domain_nll" not in totals:
        return {}, {}
    weights = dict(zip(data.domains, totals["domain_weight"].tolist(), strict=True))
    nll = dict(zip(data.domains, totals["domain_nll"].tolist(), strict=True))
    weights = {name: weight for name, weight in weights.items() if weight}
    return {name: nll[name] / weight for name, weight in weights.items()}, weights


def place(batch: Batch, mesh) -> Batch:
    """A numpy Batch `[b L]` on the devices of a mesh."""
    put = lambda name, field: jax.make_array_from_callback(
        field.shape, batch_sharding(name, mesh, 0), lambda index: field[index]
    )
    return Batch(*map(put, Batch._fields, batch))
