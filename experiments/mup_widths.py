"""Does the learning rate that is best at width 64 serve at width 256?

"Tensor Programs V" (arXiv 2203.03466) tunes a narrow model and trains a wide one with what it
found: under muP the best learning rate stays, under the standard parametrization it falls with the
width. Here decoders of two layers on the standard library, 192 steps of 16 x 128 bytes. At width
64, where both are one model, 0.008 was the best of five rates a factor of two apart (seed 10, once:
3.14, 2.95, 2.89, 3.12 and 3.54 bits a byte from 0.002 to 0.032). Arms of width 256 take that rate,
or the best of three others for themselves.

RULE  Claimed: mup_carried is no worse than mup_others. Each arm stands at its grid point with the
best mean of validation/bits_per_byte. Judged are its differences, arm minus mup_others, of runs
with the same seed: their mean and its two-sided 95% t-interval. 'No worse' is confirmed if the
interval lies below 0.01, refuted if it lies above 0 and the mean is at least 0.01, and undecided
otherwise. There is no verdict where data order, tokens or FLOPs differ.

COMMAND   uv run sweep experiments/mup_widths.py
COST      not run
FULL      uv run sweep experiments/mup_widths.py --config.data.batch_size=256
          --config.data.length=1024 --config.steps=20000 --config.model.layers=24
          --config.model.dtype=bfloat16 --workdir runs/mup_widths_full
          (widths 256 and 2048, and a corpus of 5e9 tokens)
EXPECTED  not run
"""

from experiments import base

BASELINE = "mup_others"
RATE = 0.008
OTHERS = [RATE / 4, RATE / 2, 2 * RATE]
MUP = {"model.base_d_model": 64}
ARMS = {
    "mup_others": MUP | {"optim.lr": OTHERS},
    "mup_carried": MUP,
    "standard_others": {"optim.lr": OTHERS},
    "standard_carried": {"optim.lr": RATE},
}
CLAIMS = {"mup_carried": "no worse"}
SEEDS = (0, 1, 2)
METRIC = "validation/bits_per_byte"
MARGIN = 0.01


def get_config():
    config = base.get_config()
    config.steps = 192
    config.data.batch_size = 16
    config.data.length = 128
    config.model.d_model = 256
    config.model.layers = 2
    config.model.mixers.attention = dict(heads=4)
    config.optim.lr = RATE
    config.optim.schedule = "wsd"
    config.optim.schedules.wsd = dict(decay_fraction=0.3)
    config.optim.warmup_fraction = 0.05
    config.train.log_every = 24
    config.train.eval_every = 48
    config.train.eval_rows = 256
    config.train.sample_tokens = 1
    return config
