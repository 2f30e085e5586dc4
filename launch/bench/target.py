"""What is wanted of a kernel against a peer, and what became of it."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence

from launch.bench.measure import Row

DEVICE = "H200"  # for which targets are stated
NOT_RUN = "no spec that it covers was run"


@dataclasses.dataclass(frozen=True)
class Target:
    """At least `least` times as fast as `peer` in one pass, at every spec that it covers."""

    name: str
    kind: str
    peer: str
    least: float
    covers: Callable[[object], bool]

    def verdict(self, measured: Sequence[tuple[str, Row]], reasons: Sequence, device: str) -> str:
        """One sentence: met, missed by how much, or not measured.

        measured: (spec, row of speeds) of every spec that it covers where both took part.
        reasons: why others were not measured.
        """
        name = self.name if self.name == self.kind else f"{self.name}, {self.kind}"
        said = f"target {name} at least {self.least:g}x {self.peer} on an {DEVICE}"
        why = "; ".join(dict.fromkeys(reasons))
        if not measured:
            return f"{said}: not measured ({why or NOT_RUN})"
        medians = {spec: statistics.median(row.ratios) for spec, row in measured}
        worst = min(medians, key=medians.get)
        figure = f"{medians[worst]:.2f}x at {worst}"
        among = "" if len(medians) == 1 else f", the least of {len(medians)} specs"
        met = sum(ratio >= self.least for ratio in medians.values())
        if met == len(medians):
            found = f"met, {figure}{among}"
        else:
            lacking = 100 * (1 - medians[worst] / self.least)
            found = f"missed by {lacking:.0f} %, {figure}{among}"
            found += f"; met at {met}" if len(medians) > 1 else ""
        found += f"; not measured everywhere: {why}" if why else ""
        if DEVICE in device:
            return f"{said}: {found}"
        return f"{said}: not measured (on this {device} it would be {found})"
