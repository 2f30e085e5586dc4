"""Multi-query associative recall at matched state size: softmax, Hedgehog, Taylor, 1+ELU.

RULE  Claimed of 32_tokens_1k, 32_tokens_2k, 64_tokens_1k and 64_tokens_2k, each: softmax, hedgehog,
hedgehog_paper and taylor are better than elu. Each arm stands at its grid point with the best mean
of validation/accuracy. Judged are its differences, elu minus arm, of runs with the same seed and
setting: their mean and its two-sided 95% t-interval. 'Better' is confirmed if the interval lies
below 0 and the mean is at most -0.02, refuted if all of it lies above -0.02, and undecided
otherwise. There is no verdict where data order or tokens differ, or FLOPs a token by more than 10%,
in one setting.

COMMAND   uv run sweep experiments/recall.py
"""

from experiments import base

BASELINE = "elu"
ARMS = {
    "elu": {"model.suffix": ("linear_attention",)},
    "softmax": {"model.suffix": ("attention",)},
    "hedgehog": {"model.suffix": ("hedgehog",)},
    "hedgehog_paper": {"model.suffix": ("hedgehog",), "model.mixers.hedgehog.form": "paper"},
    "taylor": {"model.suffix": ("based",)},
}
SHORT = {"data.length": 32, "data.batch_size": 64, "data.sources.recall.pairs": 4}
LONG = {"data.length": 64, "data.batch_size": 32, "data.sources.recall.pairs": 8}
# Numbers in the state: 64 (64 / heads + 1); 8 width 17; 4 (1 + f + f^2) 17.
SMALL = {
    "model.mixers.linear_attention.heads": 4,
    "model.mixers.hedgehog.width": 8,
    "model.mixers.based.feature_dim": 3,
}
LARGE = {
    "model.mixers.linear_attention.heads": 2,
    "model.mixers.hedgehog.width": 16,
    "model.mixers.based.feature_dim": 5,
}
SETTINGS = {
    "32_tokens_1k": SHORT | SMALL,
    "32_tokens_2k": SHORT | LARGE,
    "64_tokens_1k": LONG | SMALL,
    "64_tokens_2k": LONG | LARGE,
}
SEEDS = (0, 1, 2)
METRIC = "validation/accuracy"
MARGIN = 0.02
HIGHER = True
FLOPS = 0.1


def get_config():
    config = base.get_config()
    config.steps = 1200
    config.data.batch_size = 64
    config.data.length = 32
    config.data.source = "recall"
    config.data.sources.recall = dict(vocab=128, pairs=4)
    config.model.d_model = 64
    config.model.layers = 2
    config.model.prefix = ("near",)
    config.model.pattern = ("near",)
    config.model.blocks.near = dict(mixer="attention", heads=4, window=3)
    config.model.mixers.attention = dict(heads=4)
    config.model.mixers.hedgehog = dict(heads=4, width=16)
    config.model.mixers.linear_attention = dict(heads=2)
    config.model.mixers.based = dict(heads=4, feature_dim=5)
    config.model.ffns.swiglu = dict(width=64)
    config.model.tied = False
    config.optim.lr = 3e-3
    config.optim.schedule = "cosine"
    config.train.log_every = 50
    config.train.eval_every = 200
    config.train.eval_rows = 256
    config.train.sample_tokens = 1
    return config
