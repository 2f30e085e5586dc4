"""What a study's constants may not say, in sentences; launch/study.py tells what they may."""

import re
from collections.abc import Iterator, Mapping

from analysis.compare import KINDS

NAMED = re.compile(r"\w[\w.]*")


def wrong(said: Mapping) -> Iterator[str]:
    """What the constants break, in sentences."""
    arms, base, claims = said["ARMS"], said["BASELINE"], said["CLAIMS"]
    for arm, own in arms.items():
        if type(arm) is not str or not NAMED.fullmatch(arm):
            yield f"arm {arm!r} needs a name of letters, digits, _ and ."
        elif type(own) is not dict:
            yield f"arm {arm} is {own!r}, not a dict of keys"
        elif "seed" in own:
            yield f"arm {arm} sets seed, which SEEDS does"
        elif empty := [key for key, values in own.items() if values == []]:
            yield f"arm {arm} has no value to try for {empty[0]}"
    if base not in arms:
        yield f"BASELINE {base!r} is none of the arms {', '.join(map(str, arms))}"
    if said["TOWARD"] is not None and said["TOWARD"] not in arms:
        yield f"TOWARD {said['TOWARD']!r} is none of the arms {', '.join(map(str, arms))}"
    if any(type(x) is not int for x in said["SEEDS"]) or len(set(said["SEEDS"])) < len(
        said["SEEDS"]
    ):
        yield f"SEEDS {said['SEEDS']} are not different integers"
    yield from _wrong_mappings(said)
    if said["MARGIN"] < 0:
        yield f"MARGIN {said['MARGIN']:g} is below 0"
    if type(claims) is not dict or not claims:
        yield "there is no claim; CLAIMS is {arm: 'better'} or 'no worse', of arms but the baseline"
        return
    for arm, kind in claims.items():
        if arm not in arms or arm == base:
            yield f"CLAIMS names {arm!r}, which is no arm beside the baseline"
        elif kind not in KINDS:
            yield f"CLAIMS says {kind!r} of {arm}; it may say {' or '.join(map(repr, KINDS))}"


def _wrong_mappings(said: Mapping) -> Iterator[str]:
    """What SETTINGS and AFTER break, in sentences."""
    arms, settings, after = said["ARMS"], said["SETTINGS"], said["AFTER"]
    for name, held in (("SETTINGS", settings), ("AFTER", after)):
        if type(held) is not dict:
            yield f"{name} is {held!r}, not a dict"
            return
    for setting, shared in settings.items():
        if type(setting) is not str or not NAMED.fullmatch(setting):
            yield f"setting {setting!r} needs a name of letters, digits, _ and ."
        elif type(shared) is not dict or "seed" in shared:
            yield f"setting {setting} is {shared!r}, not a dict of keys other than seed"
        elif lists := [key for key, value in shared.items() if isinstance(value, list)]:
            yield f"setting {setting} lists values of {lists[0]}, which only arms may"
    names = list(arms)
    for arm, parent in after.items():
        if not {arm, parent} <= set(arms) or names.index(parent) >= names.index(arm):
            yield f"AFTER lets {arm} go on from {parent}, which has to be an arm that stands before"
        elif any(isinstance(value, list) for value in arms[parent].values()):
            yield f"{arm} goes on from {parent}, which has to have one value of each key"
        elif "start" in arms[arm]:
            yield f"arm {arm} sets start, which AFTER does"
