"""Experts balanced over the global batch from the start, or only from half way on.

"Demons in the Detail" (arXiv 2501.11873, section 4.4) switches a run from micro-batches to the
global batch after 10%, 30% and 50% of its steps and never comes back to what it reaches from the
start (perplexity 7.283, 7.297, 7.322 beside 7.199). Here the model and corpus of moe_balance.py
with one weight: each arm takes 188 steps at a constant rate, balanced within rows or over the
batch, and 188 more from the parameters that these leave, with a rate that falls to 0. Every stage
reads the corpus from its first row on, and begins with new moments.

RULE  Claimed: batch_throughout is better than switched. Each arm stands at its grid point with the
best mean of validation/bits_per_byte. Judged are its differences, arm minus switched, of runs with
the same seed: their mean and its two-sided 95% t-interval. 'Better' is confirmed if the interval
lies below 0 and the mean is at most -0.005, refuted if all of it lies above -0.005, and undecided
otherwise. There is no verdict where data order, tokens or FLOPs differ.

COMMAND   uv run sweep experiments/moe_switch.py
COST      15 runs of 385,024 tokens, two at a time, one core each: 15 minutes (Intel Xeon, 2 cores,
          jax 0.11.2, which other work shared)
FULL      uv run sweep experiments/moe_switch.py --config.data.batch_size=512
          --config.data.length=4096 --config.steps=60000 --config.model.d_model=1024
          --config.model.layers=24 --config.model.mixers.attention.heads=16
          --config.model.ffns.moe.experts=64 --config.model.ffns.moe.top_k=4
          --config.model.ffns.moe.shared=4 --config.model.ffns.moe.width=512
          --config.model.dtype=bfloat16 --workdir runs/moe_switch_full
          (steps are of each stage, weights 0.008, and a corpus of 400e9 tokens)
EXPECTED  confirmed, -0.030 bits a byte (-0.045 to -0.014): a switch half way ends 0.002 better than
          rows throughout, as in experiments/results/moe_switch.md
"""

from experiments import base

BASELINE = "switched"
ROWS = {"balance.name": "micro_batch", "balance.balances.micro_batch.weight": 0.1}
BATCH = {"balance.balances.global_batch.weight": 0.1}
FIRST = {"optim.schedule": "constant"}
SECOND = {"optim.warmup_fraction": 0.0, "optim.schedules.wsd.decay_fraction": 0.6}
ARMS = {
    "first_rows": ROWS | FIRST,
    "first_batch": BATCH | FIRST,
    "switched": BATCH | SECOND,
    "rows_throughout": ROWS | SECOND,
    "batch_throughout": BATCH | SECOND,
}
AFTER = {
    "switched": "first_rows",
    "rows_throughout": "first_rows",
    "batch_throughout": "first_batch",
}
CLAIMS = {"batch_throughout": "better"}
SEEDS = (0, 1, 2)
METRIC = "validation/bits_per_byte"
MARGIN = 0.005


def get_config():
    config = base.get_config()
    config.steps = 188
    config.data.batch_size = 16
    config.data.length = 128
    config.data.mixture = ("stdlib", "prose", "records", "arithmetic")
    config.model.d_model = 128
    config.model.layers = 4
    config.model.mixers.attention = dict(heads=4, kv_heads=2)
    config.model.ffn = "moe"
    config.model.ffns.moe = dict(experts=16, top_k=2, width=96, router="softmax")
    config.optim.lr = 1.8e-3
    config.optim.schedule = "wsd"
    config.optim.schedules.wsd = dict(decay_fraction=0.3)
    config.optim.warmup_fraction = 0.05
    config.train.log_every = 25
    config.train.eval_every = 75
    config.train.eval_rows = 256
    config.train.sample_tokens = 1
    return config
