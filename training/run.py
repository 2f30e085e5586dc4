"""What a run is made of."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from training.hosts import Alone, Hosts
from training.program import Program


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a run is made of.

    header: first line of metrics.jsonl, kept in checkpoints too; its `fingerprint` is the corpus's.
    flops: floating-point operations of matrix products a token, forward and backward, or None.
    sample(params) -> text of the model, or None.
    draw(name, values) -> a PNG of a step's metric that is a picture, `[N rows columns]` of N layers
    or `[rows columns]`, or None where nothing can draw it; without `draw` there are no pictures.
    accept_corpus: go on where the corpus, or the keys of `data` that choose its rows, have changed.
    accept_config: go on where keys have changed that decide what is computed from a row.
    trust: go on from the newest checkpoint without verifying it.
    hosts: the processes of the run, of which this is one.
    """

    config: Mapping
    program: Program
    data: Any
    mesh: jax.sharding.Mesh
    workdir: pathlib.Path
    header: Mapping
    flops: float | None
    sample: Callable[[dict], str] | None = None
    draw: Callable[[str, np.ndarray], bytes | None] | None = None
    accept_corpus: bool = False
    accept_config: bool = False
    trust: bool = False
    hosts: Alone | Hosts = dataclasses.field(default_factory=Alone)
