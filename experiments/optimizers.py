"""AdamW and LAMB under the power and the cosine schedule, against the quickstart's recipe.

The quickstart's model and corpus at half its steps: 750 steps of 8 x 128 bytes. The baseline is its
recipe, AdamW with warm-up, stable, decay (wsd, arXiv 2404.06395). LAMB is arXiv 1904.00962. Every
arm has three values of its one rate: the peak or, of power, the factor a of its law, min(cap,
batch / 4096 * a * n^-0.51) after n tokens (arXiv 2408.13359, eq. 7), whose cap of 0.1 never binds.
All schedules warm up over 5% of the tokens and end at zero, wsd and power by a decay over the last
30%. The values lie a factor of 1.5 apart around the minimum of a parabola through three trials, a
factor of 2 apart, with seed 100, which the study does not use.

RULE  Claimed: adamw_cosine, adamw_power, lamb_cosine and lamb_power are better than adamw_wsd. Each
arm stands at its grid point with the best mean of validation/bits_per_byte. Judged are its
differences, arm minus adamw_wsd, of runs with the same seed: their mean and its two-sided 95%
t-interval. 'Better' is confirmed if the interval lies below 0 and the mean is at most -0.005,
refuted if all of it lies above -0.005, and undecided otherwise. There is no verdict where data
order, tokens or FLOPs differ.

COMMAND   uv run sweep experiments/optimizers.py
COST      45 runs of 768,000 tokens, two at a time, one core each: about 25 minutes (Intel Xeon,
          2 cores, jax 0.11.2; measured over the first 30 runs of the committed report, whose last
          15 shared the machine with other work, as their seconds show)
FULL      uv run sweep experiments/optimizers.py --config.data.source=tokens
          --config.data.sources.tokens.path=corpora/web --config.data.tokenizer=hf
          --config.data.tokenizers.hf.path=corpora/web --config.data.length=1024
          --config.data.batch_size=480 --config.steps=20000 --config.model.d_model=768
          --config.model.layers=12 --config.model.mixers.attention.heads=12
          --config.model.mixers.attention.kv_heads=4 --config.model.ffns.swiglu.width=2048
          --config.model.dtype=bfloat16 --workdir runs/optimizers_full
          (corpora/web as `uv run tokenize` writes it; 10^10 tokens a run, where the rates of AdamW
          and LAMB want trials again, and power's law should hold as it is)
EXPECTED  all four claims refuted, as in experiments/results/optimizers.md
"""

from experiments import base

BASELINE = "adamw_wsd"
POWER = {"optim.schedule": "power", "optim.lr": 0.1}
ARMS = {
    "adamw_wsd": {"optim.lr": [0.0012, 0.0018, 0.0027]},
    "adamw_cosine": {"optim.schedule": "cosine", "optim.lr": [0.0015, 0.0023, 0.0035]},
    "adamw_power": {**POWER, "optim.schedules.power.a": [2.2, 3.3, 5.0]},
    "lamb_cosine": {
        "optim.name": "lamb",
        "optim.schedule": "cosine",
        "optim.lr": [0.0045, 0.0068, 0.01],
    },
    "lamb_power": {
        "optim.name": "lamb",
        **POWER,
        "optim.schedules.power.a": [6.0, 9.0, 13.5],
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
    config.train.eval_every = 75
    config.train.eval_rows = 256
    config.train.sample_tokens = 1
    return config
