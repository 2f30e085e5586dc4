"""Balancing experts over more rows at once: from each row by itself to the global batch.

"Demons in the Detail" (arXiv 2501.11873) balances 64 to 160 experts over 4 to 512 sequences and
finds the loss falling as their number grows (3.4B parameters, 120B tokens: perplexity 8.167 with 4,
8.062 with 32, 8.038 with 512). Here 16 experts of 96, two a token, in 4 layers of width 128, 375
steps of 16 x 128 bytes. A row is of one of four kinds: standard library code, docstrings and
comments, JSON, sums. Arms count over 1, 4 and all 16 rows of a step, each with three weights.

RULE  Claimed: rows_4 and global_batch are better than rows_1. Each arm stands at its grid point
with the best mean of validation/bits_per_byte. Judged are its differences, arm minus rows_1, of
runs with the same seed: their mean and its two-sided 95% t-interval. 'Better' is confirmed if the
interval lies below 0 and the mean is at most -0.005, refuted if all of it lies above -0.005, and
undecided otherwise. There is no verdict where data order, tokens or FLOPs differ.

COMMAND   uv run sweep experiments/moe_balance.py
COST      27 runs of 768,000 tokens, two at a time, one core each: 48 minutes (Intel Xeon, 2 cores,
          jax 0.11.2, which other work shared in part)
FULL      uv run sweep experiments/moe_balance.py --config.data.batch_size=512
          --config.data.length=4096 --config.steps=60000 --config.model.d_model=1024
          --config.model.layers=24 --config.model.mixers.attention.heads=16
          --config.model.ffns.moe.experts=64 --config.model.ffns.moe.top_k=4
          --config.model.ffns.moe.shared=4 --config.model.ffns.moe.width=512
          --config.model.dtype=bfloat16 --workdir runs/moe_balance_full
          (rows_4 with rows=128, and a corpus of 120e9 tokens)
EXPECTED  both undecided, -0.003 bits a byte each with intervals of +-0.015: the best weight of
          every arm is 0.01. With 0.1 rows_1 is 0.033 worse than the others, which moe_rows.py asks
          anew, as in experiments/results/moe_balance.md
"""

from experiments import base

BASELINE = "rows_1"
WEIGHTS = [0.001, 0.01, 0.1]
MICRO = {"balance.name": "micro_batch", "balance.balances.micro_batch.weight": WEIGHTS}
ARMS = {
    "rows_1": MICRO,
    "rows_4": MICRO | {"balance.balances.micro_batch.rows": 4},
    "global_batch": {"balance.balances.global_batch.weight": WEIGHTS},
}
SEEDS = (0, 1, 2)
METRIC = "validation/bits_per_byte"
MARGIN = 0.005


def get_config():
    config = base.get_config()
    config.steps = 375
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
