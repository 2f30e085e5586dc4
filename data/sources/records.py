"""JSON objects of several schemas, whose fields follow from one another."""

import datetime
import itertools
import json

from data.composed import Composed, Dice

_FIRST = (
    "Ada", "Amir", "Aylin", "Björn", "Chen", "Clara", "Diego", "Elena", "Farid", "Greta", "Hana",
    "Ivan", "Jamal", "João", "Kofi", "Lena", "Mara", "Nadia", "Omar", "Priya", "Rosa", "Sven",
    "Tariq", "Uma", "Vera", "Wanda", "Yusuf", "Zoë",
)  # fmt: skip
_LAST = (
    "Abbott", "Bauer", "Costa", "Dlamini", "Eriksen", "Fontaine", "García", "Haddad", "Ito",
    "Jensen", "Kaya", "Lindqvist", "Mbeki", "Nowak", "Okafor", "Petrov", "Quinn", "Rossi", "Silva",
    "Tanaka", "Ueda", "Virtanen", "Weber", "Xu", "Yılmaz", "Zhang",
)  # fmt: skip
_CITIES = (
    "Accra", "Bergen", "Cairo", "Dakar", "Essen", "Fukuoka", "Ghent", "Hanoi", "Izmir", "Jaipur",
    "Kyiv", "Lima", "Málaga", "Nairobi", "Oslo", "Porto", "Quito", "Riga", "Seoul", "Turin",
    "Utrecht", "Vilnius", "Warsaw", "Yerevan", "Zürich",
)  # fmt: skip
_GOODS = (
    "anvil", "basket", "candle", "drill", "easel", "funnel", "goblet", "hammer", "inkwell",
    "jacket", "kettle", "ladder", "mirror", "needle", "oven", "pillow", "quilt", "ruler", "saddle",
    "tripod", "umbrella", "vase", "wrench", "yarn", "zipper",
)  # fmt: skip
_TEAMS = (
    "Badgers", "Comets", "Dragons", "Eagles", "Foxes", "Giants", "Hornets", "Jaguars", "Kites",
    "Lynxes", "Meteors", "Otters", "Pumas", "Ravens", "Sharks", "Tigers", "Vipers", "Wolves",
)  # fmt: skip


class Source(Composed):
    """Documents of one JSON object each, on a line, of a schema that its `type` names.

    order: a line's amount is quantity times price, total their sum.  trip: each leg begins where
    the one before ended, distance is their sum, returns is `days` after departs.  readings: count,
    low, high and sum are those of the values.  team: ages are those of the year, size and oldest
    those of the members.  account: a balance is the one before and the change, closing the last;
    dates ascend.  match: score sums the periods, winner is who has more or null.

    A held-out row is drawn by a key of its own, so no such row is trained on.
    """

    domain = "records"

    def __init__(
        self,
        *,
        holdout_rows: int = 256,  # rows for validation
    ):
        super().__init__(holdout_rows)

    def text(self, dice: Dice) -> str:
        """One object, and a line feed."""
        schema = dice.pick((_order, _trip, _readings, _team, _account, _match))
        record = {"type": schema.__name__.removeprefix("_"), **schema(dice)}
        return json.dumps(record, ensure_ascii=False) + "\n"


def _order(dice: Dice) -> dict:
    items = [_item(dice, name) for name in dice.sample(_GOODS, dice.between(1, 4))]
    return {
        "id": f"{dice.pick('ABCDEFGH')}-{dice.between(10000, 99999)}",
        "date": _date(dice).isoformat(),
        "customer": {"name": _name(dice), "city": dice.pick(_CITIES)},
        "items": items,
        "total": sum(item["amount"] for item in items),
    }


def _item(dice: Dice, name: str) -> dict:
    quantity, price = dice.between(1, 9), dice.between(1, 150)
    return {"name": name, "quantity": quantity, "price": price, "amount": quantity * price}


def _trip(dice: Dice) -> dict:
    stops = dice.sample(_CITIES, dice.between(2, 5))
    legs = [
        {"from": one, "to": other, "km": dice.between(40, 900)}
        for one, other in itertools.pairwise(stops)
    ]
    departs, days = _date(dice), dice.between(1, 28)
    return {
        "traveller": _name(dice),
        "legs": legs,
        "distance": sum(leg["km"] for leg in legs),
        "departs": departs.isoformat(),
        "days": days,
        "returns": (departs + datetime.timedelta(days)).isoformat(),
    }


def _readings(dice: Dice) -> dict:
    values = [dice.between(-20, 40) for _ in range(dice.between(3, 10))]
    return {
        "station": dice.pick(_CITIES),
        "date": _date(dice).isoformat(),
        "values": values,
        "count": len(values),
        "low": min(values),
        "high": max(values),
        "sum": sum(values),
    }


def _team(dice: Dice) -> dict:
    year = dice.between(1990, 2029)
    born = [year - dice.between(16, 60) for _ in range(dice.between(2, 4))]
    return {
        "name": dice.pick(_TEAMS),
        "year": year,
        "members": [{"name": _name(dice), "born": one, "age": year - one} for one in born],
        "size": len(born),
        "oldest": year - min(born),
    }


def _account(dice: Dice) -> dict:
    opening, date = dice.between(0, 2000), _date(dice)
    entries, balance = [], opening
    for _ in range(dice.between(2, 4)):
        date += datetime.timedelta(dice.between(1, 20))
        change = dice.between(-400, 600)
        balance += change
        entries.append({"date": date.isoformat(), "change": change, "balance": balance})
    return {"owner": _name(dice), "opening": opening, "entries": entries, "closing": balance}


def _match(dice: Dice) -> dict:
    sides = dice.sample(_TEAMS, 2)
    periods = [[dice.below(4), dice.below(4)] for _ in range(dice.between(2, 4))]
    score = [sum(column) for column in zip(*periods, strict=True)]
    winner = None if score[0] == score[1] else sides[score[1] > score[0]]
    return {
        "date": _date(dice).isoformat(),
        "sides": sides,
        "periods": periods,
        "score": score,
        "winner": winner,
    }


def _name(dice: Dice) -> str:
    return f"{dice.pick(_FIRST)} {dice.pick(_LAST)}"


def _date(dice: Dice) -> datetime.date:
    """A day of 1990 .. 2029."""
    first = datetime.date(1990, 1, 1)
    return first + datetime.timedelta(dice.below((datetime.date(2030, 1, 1) - first).days))
