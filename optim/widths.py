"""How learning rates follow the width of a model: one multiplier a weight, from the table.

"Tensor Programs V" (arXiv 2203.03466), table 3 with the output multiplier of its table 8: logits
are divided by the width of the model over that of the base (models/lm.py), so that an embedding and
a head keep their start and need one rule, tied or not. With i and o how many times larger fan-in
and fan-out are than at the base width, learning rates are multiplied by

|                  | embedding, head, vector | matrix             | matrix to a few (router) |
|------------------|-------------------------|--------------------|--------------------------|
| Adam, Lion, ...  | 1                       | 1 / i              | 1 / i                    |
| SGD              | the one that is wider   | o / i              | 1 / i                    |
| trust ratio      | 1                       | 1 / sqrt(i)        | 1                        |

The last row is not of the paper: with a ratio a step's norm is that of the weight, which grows as
sqrt(o) and lies in few directions, where sqrt(o / i) is what a layer bears. Matrices to a few start
at 1 / i of the base, whose norm falls as fast as the step must.
"""

import math

from parallel.weight import Entry

# To a vector each width adds elements, and so it does to an embedding, a token at a time.
VECTORS = ("embed", "head", "norm", "bias")


def elementwise(entry: Entry) -> float:
    """Of methods whose steps have a size of their own for every element (Adam, Lion)."""
    return 1.0 if _vector(entry) else 1.0 / entry.wider[0]


def proportional(entry: Entry) -> float:
    """Of methods whose steps are proportional to the gradient (SGD)."""
    fan_in, fan_out = entry.wider
    return max(fan_in, fan_out) if _vector(entry) else fan_out / fan_in


def relative(entry: Entry) -> float:
    """Of methods whose steps are proportional to the weight's own norm (LAMB, LARS)."""
    few = entry.weight.group == "router" and entry.wider[1] == 1
    return 1.0 if few or _vector(entry) else 1.0 / math.sqrt(entry.wider[0])


def _vector(entry: Entry) -> bool:
    return entry.weight.group in VECTORS or not entry.is_matrix
