"""A small repository with methods and experiments of its own, for tests of launch."""

import pytest

from launch.files import ROOT

MIXER = '''
class Mixer:
    """Not imported: the annotations below name nothing that exists."""

    def __init__(self, dims, *, rngs: nnx.Rngs, {own}):
        pass
'''
METHODS = {
    "models/mixers/attention.py": MIXER.format(
        own="heads: int = 4, kv_heads: int | None = None, head_dim: int | None = None, "
        "rope: bool = True, base: float = 1e4, scaling: str = 'none', window: int | None = None"
    ),
    "models/mixers/slow.py": MIXER.format(own="rate: float = 0.5, kind: Literal['a', 'b'] = 'a'"),
    "models/mixers/helper.py": "def shared(*, x: int = 1): ...\n",
    "models/ffns/swiglu.py": "class FFN:\n    def __init__(self, *, width: int | None = None): ...",
    "models/ffns/gelu.py": "class FFN:\n    def __init__(self, dims, *, bias: bool = False): ...",
    "models/heads/linear.py": "class Head: ...",
    "training/losses/cross_entropy.py": "def make(apply, *, z: float = 0.0): ...",
    "training/balances/global_batch.py": "def make(loss, paths, *, weight: float = 0.01): ...",
    "optim/methods/adamw.py": "def make(table, *, weight_decay, b1: float = 0.9): ...",
    "optim/methods/sgd.py": "def make(table, *, weight_decay, momentum: float = 0.9): ...",
    "optim/schedules.py": "def cosine(n, *, total, final: float = 0.1): ...\ndef _part(n): ...",
    "data/sources/stdlib.py": (
        "class Source:\n    def __init__(self, *, root: str | None = None): ..."
    ),
    "data/sources/text.py": (
        "class Source:\n    def __init__(\n        self,\n        *,\n"
        "        path: str = '',  # a file, a folder or a glob\n"
        "        field: str | None = None,\n        share: float | None = 0.5,\n"
        "        order: Literal['name', 'size'] | None = 'name',\n    ): ..."
    ),
    "data/mixings/fixed.py": "class Mixing: ...",
    "data/mixings/bandit.py": (
        "class Mixing:\n"
        "    def __init__(self, *, rate: float = 0.1, floor: float | None = None): ..."
    ),
    "data/tokenizers/bytes.py": "class Tokenizer: ...",
    "data/transforms/pack.py": "class Packer:\n    def __init__(self, documents, length): ...",
    "data/transforms/masked_lm.py": (
        "class Transform:\n    def __init__(self, *, rate: float = 0.15): ..."
    ),
}
EXPERIMENT = """
from experiments import base


def get_config():
    config = base.get_config()
    {line}
    return config
"""


class Repository:
    """A folder that stands for the repository."""

    def __init__(self, path):
        self.path = path
        for name, source in METHODS.items():
            self.write(name, source)
        self.write("experiments/base.py", (ROOT / "experiments" / "base.py").read_text())

    def write(self, name, source):
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)

    def experiment(self, *lines):
        """The path of a configuration that runs these lines over the base."""
        self.write("experiments/x.py", EXPERIMENT.format(line="\n    ".join(lines)))
        return str(self.path / "experiments" / "x.py")


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)
