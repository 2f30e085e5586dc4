"""Arms of a study against its baseline: spreads, paired differences, and the rule of the verdict.

The rule is a sentence that follows from what the study declares. The study's docstring has to hold
it before the first run, and `judge` computes what it says.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

CONFIDENCE = 0.95
KINDS = ("better", "no worse")
VERDICTS = ("confirmed", "refuted", "undecided")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a study declares of its verdict.

    metric: of the last step.  margin: the least difference that counts, in its units.
    claims: {arm: one of KINDS}, against the arm `baseline`.  higher: whether more is better.
    flops: share by which FLOPs a token may differ, none by default.  toward: an arm whose distance
    to the baseline the report measures the others' by; it enters no verdict.  settings: names of
    those that every arm runs in and is judged in; then an arm's runs are of `arm@setting`.
    """

    baseline: str
    metric: str
    margin: float
    claims: Mapping[str, str]
    higher: bool = False
    flops: float = 0.0
    toward: str | None = None
    settings: tuple[str, ...] = ()

    @property
    def judged(self) -> dict[str, str]:
        """The claims of every setting."""
        settings, claims = self.settings or ("",), self.claims.items()
        return {cell(arm, setting): kind for setting in settings for arm, kind in claims}

    def base(self, arm: str) -> str:
        """The baseline of an arm, in its setting."""
        return cell(self.baseline, parts(arm)[1])

    def __str__(self) -> str:
        claimed = "; ".join(
            f"{_listed([arm for arm, said in self.claims.items() if said == kind])} "
            f"{'is' if list(self.claims.values()).count(kind) == 1 else 'are'} {kind} "
            f"than {self.baseline}"
            for kind in KINDS
            if kind in self.claims.values()
        )
        order = f"{self.baseline} minus arm" if self.higher else f"arm minus {self.baseline}"
        margin = f"{self.margin:g}"
        words = {
            "better": f"'Better' is confirmed if the interval lies below 0 and the mean is at most "
            f"-{margin}, refuted if all of it lies above -{margin}, and undecided otherwise.",
            "no worse": f"'No worse' is confirmed if the interval lies below {margin}, refuted if "
            f"it lies above 0 and the mean is at least {margin}, and undecided otherwise.",
        }
        equal = "order, tokens or FLOPs differ"
        if self.flops:
            equal = f"order or tokens differ, or FLOPs a token by more than {self.flops:.0%}"
        of_all, within = "", ""
        if self.settings:
            of_all, within = f" of {_listed(self.settings)}, each", ", in one setting"
        judged = [words[kind] for kind in KINDS if kind in self.claims.values()]
        return " ".join(
            [
                f"Claimed{of_all}: {claimed}.",
                f"Each arm stands at its grid point with the best mean of {self.metric}. Judged "
                f"are its differences, {order}, of runs with the same {paired_by(self.settings)}: "
                f"their mean and its two-sided {CONFIDENCE:.0%} t-interval.",
                *judged,
                f"There is no verdict where data {equal}{within}.",
            ]
        )

    def judge(self, kind: str, differences: Sequence[float]) -> str:
        """One of VERDICTS on a claim.  differences: arm minus baseline, a seed each."""
        if len(differences) < 2:
            return "undecided"  # One difference has no interval.
        signed = [-d for d in differences] if self.higher else differences
        found = spread(signed)
        low, high = interval(signed)
        if kind == "better":
            confirmed = high < 0 and found["mean"] <= -self.margin
            refuted = low > -self.margin
        else:
            confirmed = high < self.margin
            refuted = low > 0 and found["mean"] >= self.margin
        return "confirmed" if confirmed else "refuted" if refuted else "undecided"

    def best(self, means: Mapping[str, float]) -> str | None:
        """The name with the best mean, the first of equals; None of none."""
        pick = max if self.higher else min
        return pick(means, key=means.__getitem__, default=None)


def cell(arm: str, setting: str) -> str:
    """How the runs of an arm in a setting are called; the setting is '' where there is none."""
    return f"{arm}@{setting}" if setting else arm


def parts(name: str) -> tuple[str, str]:
    """The arm and the setting of a cell."""
    arm, _, setting = name.partition("@")
    return arm, setting


def paired_by(settings: Sequence[str]) -> str:
    """What two runs of a pair have in common."""
    return "seed and setting" if settings else "seed"


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Number, mean, sample standard deviation (None of one value), least and greatest."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    mean = math.fsum(values) / len(values)
    return {"n": len(values), "mean": mean, "sd": sd, "min": min(values), "max": max(values)}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The two-sided t-interval of the mean, mean -+ t(n - 1) s / sqrt(n), at CONFIDENCE.

    Of paired differences it is that of the paired t-test. Raises ValueError below two values.
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, got {len(values)}")
    from scipy.special import stdtrit  # Imported late: `sweep` reads rules before it starts a run.

    found, n = spread(values), len(values)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * found["sd"] / math.sqrt(n)
    return found["mean"] - half, found["mean"] + half
