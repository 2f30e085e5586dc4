"""Balancing experts over more rows, at one strong weight and with seeds of its own.

moe_balance.py lets every arm choose its weight: with a tenth of the largest, rows of one kind bend
their experts so little that three seeds tell no arm from another. "Demons in the Detail" (arXiv
2501.11873) compares at one weight. So does this: the model, corpus and steps of moe_balance.py, the
largest of its weights, 0.1, where its seeds 0 to 2 gave the question, and six other seeds.

RULE  Claimed: rows_4 and global_batch are better than rows_1. Each arm stands at its grid point
with the best mean of validation/bits_per_byte. Judged are its differences, arm minus rows_1, of
runs with the same seed: their mean and its two-sided 95% t-interval. 'Better' is confirmed if the
interval lies below 0 and the mean is at most -0.005, refuted if all of it lies above -0.005, and
undecided otherwise. There is no verdict where data order, tokens or FLOPs differ.

COMMAND   uv run sweep experiments/moe_rows.py
COST      18 runs of 768,000 tokens, one at a time on one core: 37 minutes (Intel Xeon, 2 cores,
          jax 0.11.2, which other work shared)
FULL      uv run sweep experiments/moe_rows.py --config.data.batch_size=512
          --config.data.length=4096 --config.steps=60000 --config.model.d_model=1024
          --config.model.layers=24 --config.model.mixers.attention.heads=16
          --config.model.ffns.moe.experts=64 --config.model.ffns.moe.top_k=4
          --config.model.ffns.moe.shared=4 --config.model.ffns.moe.width=512
          --config.model.dtype=bfloat16 --workdir runs/moe_rows_full
          (rows_4 with rows=128, weights 0.008, and a corpus of 120e9 tokens)
EXPECTED  both confirmed, -0.035 (-0.059 to -0.011) and -0.038 bits a byte (-0.060 to -0.017), with
          every seed, as in experiments/results/moe_rows.md
"""

from experiments import base

BASELINE = "rows_1"
MICRO = {"balance.name": "micro_batch", "balance.balances.micro_batch.weight": 0.1}
ARMS = {
    "rows_1": MICRO,
    "rows_4": MICRO | {"balance.balances.micro_batch.rows": 4},
    "global_batch": {"balance.balances.global_batch.weight": 0.1},
}
SEEDS = (3, 4, 5, 6, 7, 8)
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
