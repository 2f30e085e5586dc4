"""A mixture of experts beside a dense model of the same FLOPs a token.

The model, corpus and steps of moe_balance.py. dense has one SwiGLU of 198, coarse 16 experts of 96
of which a token takes 2, fine 32 of 47 of which it takes 4 (fine-grained experts, arXiv
2401.06066). FLOPs a token agree to 1%, the router's included; the mixtures hold 4.9 times the
parameters. Experts are balanced over the global batch.

RULE  Claimed: coarse and fine are better than dense. Each arm stands at its grid point with the
best mean of validation/bits_per_byte. Judged are its differences, arm minus dense, of runs with the
same seed: their mean and its two-sided 95% t-interval. 'Better' is confirmed if the interval lies
below 0 and the mean is at most -0.005, refuted if all of it lies above -0.005, and undecided
otherwise. There is no verdict where data order or tokens differ, or FLOPs a token by more than 1%.

COMMAND   uv run sweep experiments/moe_dense.py
COST      18 runs of 768,000 tokens, two at a time, one core each: 43 minutes (Intel Xeon, 2 cores,
          jax 0.11.2, which other work shared)
FULL      uv run sweep experiments/moe_dense.py --config.data.batch_size=512
          --config.data.length=4096 --config.steps=60000 --config.model.d_model=1024
          --config.model.layers=24 --config.model.mixers.attention.heads=16
          --config.model.dtype=bfloat16 --workdir runs/moe_dense_full
          (experts and widths of the arms times 8, and a corpus of 120e9 tokens)
EXPECTED  fine confirmed, -0.040 bits a byte (-0.074 to -0.005); coarse undecided, -0.051 (-0.109
          to +0.008), though better with each seed; every arm stands at the edge of the two rates,
          as in experiments/results/moe_dense.md
"""

from experiments import base

BASELINE = "dense"
RATES = [0.0018, 0.0027]
EXPERTS = {"balance.balances.global_batch.weight": 0.01, "optim.lr": RATES}
ARMS = {
    "dense": {"model.ffn": "swiglu", "model.ffns.swiglu.width": 198, "optim.lr": RATES},
    "coarse": EXPERTS,
    "fine": EXPERTS
    | {
        "model.ffns.moe.experts": 32,
        "model.ffns.moe.top_k": 4,
        "model.ffns.moe.width": 47,
    },
}
SEEDS = (0, 1, 2)
METRIC = "validation/bits_per_byte"
MARGIN = 0.005
FLOPS = 0.01


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
