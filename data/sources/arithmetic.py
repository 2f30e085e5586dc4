"""Sums, products and comparisons with their right answers, a line each."""

import operator

from data.composed import Composed, Dice

_ORDERS = {"<": operator.lt, ">": operator.gt, "==": operator.eq}


class Source(Composed):
    """Documents of S = `lines` lines `expression = value`, such as `17 * 204 = 3468`.

    Each line is, with equal chances, a sum, a difference, a product, a comparison
    (`17 < 204 = True`; a quarter of them of a number with itself) or a chain of three or four
    numbers, whose products come before sums and differences. Both sides mean in Python what they
    mean here. Values may be negative; numbers in expressions are not.

    digits: most digits of a number in an expression; each number of digits is as likely as any.

    A held-out row is drawn by a key of its own, so no such row is trained on, but single lines of
    few digits recur in both: there are no more than 100 products of two numbers of one digit.
    """

    domain = "arithmetic"

    def __init__(
        self,
        *,
        digits: int = 3,  # most digits of a number in an expression
        lines: int = 16,  # lines of a document
        holdout_rows: int = 256,  # rows for validation
    ):
        super().__init__(holdout_rows)
        if not 1 <= digits <= 18:
            raise ValueError(f"data.sources.arithmetic.digits must be from 1 to 18, got {digits}.")
        if lines < 1:
            raise ValueError(f"data.sources.arithmetic.lines must be at least 1, got {lines}.")
        self.digits, self.lines = digits, lines

    def text(self, dice: Dice) -> str:
        """One document; every line ends in a line feed."""
        return "".join(f"{self._line(dice)}\n" for _ in range(self.lines))

    def _line(self, dice: Dice) -> str:
        kind = dice.pick(("+", "-", "*", "order", "chain"))
        if kind == "order":
            return self._comparison(dice)
        if kind == "chain":
            return self._chain(dice, "".join(dice.pick("+-*") for _ in range(dice.between(2, 3))))
        return self._chain(dice, kind)

    def _number(self, dice: Dice) -> int:
        digits = dice.between(1, self.digits)
        return dice.between(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)

    def _comparison(self, dice: Dice) -> str:
        sign, one = dice.pick(tuple(_ORDERS)), self._number(dice)
        other = self._number(dice) if dice.below(4) else one
        return f"{one} {sign} {other} = {_ORDERS[sign](one, other)}"

    def _chain(self, dice: Dice, signs: str) -> str:
        """One more number than there are signs."""
        first = self._number(dice)
        expression, total, term = str(first), 0, first
        for sign in signs:
            number = self._number(dice)
            expression += f" {sign} {number}"
            if sign == "*":
                term *= number
            else:
                total, term = total + term, number if sign == "+" else -number
        return f"{expression} = {total + term}"
