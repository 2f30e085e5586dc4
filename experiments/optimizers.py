"""AdamW and LAMB under the power and the cosine schedule, against the quickstart's recipe.

The quickstart's model and corpus at half its steps: 750 steps of 8 x 128 bytes. The baseline is its
recipe, AdamW with warm-up, stable, decay (wsd). Every arm has three values of its one rate: the
peak, or of power the factor a of its law (arXiv 2408.13359, eq. 7: a n^b of the tokens n, times the
batch), whose cap is set so high that it never binds. All schedules end at zero; power decays over
the same last 30% as wsd. The values were laid around the best of trials with seed 100, which the
study does not use.

RULE  Claimed: adamw_cosine, adamw_power, lamb_cosine and lamb_power are better than adamw_wsd. Each
arm stands at its grid point with the best mean of validation/bits_per_byte. Judged are its
differences, arm minus adamw_wsd, of runs with the same seed: their mean and its two-sided 95%
t-interval. 'Better' is confirmed if the interval lies below 0 and the mean is at most -0.005,
refuted if all of it lies above -0.005, and undecided otherwise. There is no verdict where data
order, tokens or FLOPs differ.

COMMAND   uv run sweep experiments/optimizers.py
COST      not yet run
FULL      uv run sweep experiments/optimizers.py --config.steps=1500 --workdir runs/optimizers_1500
EXPECTED  experiments/results/optimizers.md
"""

from experiments import base

BASELINE = "adamw_wsd"
ADAMW, LAMB = [0.0015, 0.0025, 0.004], [0.005, 0.008, 0.0125]
ARMS = {
    "adamw_wsd": {"optim.lr": ADAMW},
    "adamw_cosine": {"optim.schedule": "cosine", "optim.lr": ADAMW},
    "adamw_power": {
        "optim.schedule": "power",
        "optim.lr": 0.1,
        "optim.schedules.power.a": [1.0, 2.0, 4.0],
    },
    "lamb_cosine": {"optim.name": "lamb", "optim.schedule": "cosine", "optim.lr": LAMB},
    "lamb_power": {
        "optim.name": "lamb",
        "optim.schedule": "power",
        "optim.lr": 0.1,
        "optim.schedules.power.a": [4.0, 8.0, 16.0],
    },
}
SEEDS = (0, 1, 2)
METRIC = "validation/bits_per_byte"
MARGIN = 0.005


def get_config():
    config = base.get_config()
    config.steps = 750
    config.data.batch_size = 8
    config.data.length = 128
    config.model.d_model = 128
    config.model.layers = 4
    config.model.mixers.attention = dict(heads=4, kv_heads=2)
    config.model.ffns.swiglu = dict(width=192)
    config.optim.lr = 4e-3
    config.optim.schedule = "wsd"
    config.optim.schedules.wsd = dict(decay_fraction=0.3)
    config.optim.schedules.cosine = dict(final_ratio=0.0)
    config.optim.schedules.power = dict(decay_fraction=0.3)
    config.optim.warmup_fraction = 0.05
    config.train.log_every = 25
    config.train.eval_every = 125
    config.train.eval_rows = 256
    config.train.sample_tokens = 1
    return config
