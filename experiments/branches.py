"""A converted hybrid's branches, each switched off at evaluation: does it hear the linear one?

LoLCATs' hybrid (arXiv 2410.10254) joins softmax attention over a window with linear attention over
all before it. arXiv 2510.05901 reports that hybrids of this kind may ignore the linear branch and
run on the window alone. Here a teacher, softmax attention as in linear_text.py, takes 750 steps, is
converted with a window (150 steps of the maps, 300 of the whole model), and what results is scored
with both branches, with the window alone and with the linear branch alone, for windows of 8 and of
32 tokens in rows of 128. No arm that leaves one out takes a step. Every stage reads the corpus from
its first row on.

RULE  Claimed of window_8 and window_32, each: window_only and linear_only are no worse than hybrid.
Each arm stands at its grid point with the best mean of validation/bits_per_byte. Judged are its
differences, arm minus hybrid, of runs with the same seed and setting: their mean and its two-sided
95% t-interval. 'No worse' is confirmed if the interval lies below 0.02, refuted if it lies above 0
and the mean is at least 0.02, and undecided otherwise. There is no verdict where data order, tokens
or FLOPs differ, in one setting.

COMMAND   uv run sweep experiments/branches.py
COST      30 runs of at most 768,000 tokens, two at a time, one core each: 11 minutes (Intel Xeon,
          2 cores, jax 0.11.2, which other work shared in part)
FULL      uv run sweep experiments/branches.py --config.data.source=tokens
          --config.data.sources.tokens.path=corpora/wikitext103 --config.data.tokenizer=hf
          --config.data.tokenizers.hf.path=corpora/wikitext103 --config.data.length=1024
          --config.data.batch_size=32 --config.model.d_model=768 --config.model.layers=12
          --config.model.mixers.attention.heads=12 --config.model.mixers.hedgehog.heads=12
          --config.model.ffns.swiglu.width=2048 --config.model.dtype=bfloat16
          --workdir runs/branches_full
          (corpora/wikitext103 as `uv run tokenize` writes it; steps of the arms times 100, and
          kv_heads of the mixers as heads)
EXPECTED  window_only refuted at a window of 8 (0.092 bits a byte worse), confirmed at 32 (0.006),
          linear_only refuted at both (3 bits), as in experiments/results/branches.md: the wider
          the window, the less the linear branch is heard
"""

from experiments import base

BASELINE = "hybrid"
HYBRID = {"model.pattern": ("hedgehog",)}
TAUGHT = {
    "steps": 150,
    "trainable": r".*mixer/((q|k)_map(_bias)?|mix)",
    "loss.name": "attention_transfer",
    "optim.lr": 1e-2,
    "optim.weight_decay": 0.0,
    "optim.warmup_fraction": 0.0,
    "optim.schedule": "cosine",
}
TUNED = {"steps": 300, "optim.lr": 6e-4, "optim.schedule": "cosine"}
WINDOW = {"model.mixers.hedgehog.branches": "window"}
LINEAR = {"model.mixers.hedgehog.branches": "linear"}
ARMS = {
    "teacher": {"model.pattern": ("attention",), "steps": 750},
    "taught": HYBRID | TAUGHT,
    "hybrid": HYBRID | TUNED,
    "window_only": HYBRID | WINDOW | {"steps": 0},
    "linear_only": HYBRID | LINEAR | {"steps": 0},
}
AFTER = {
    "taught": "teacher",
    "hybrid": "taught",
    "window_only": "hybrid",
    "linear_only": "hybrid",
}
SETTINGS = {
    "window_8": {"model.mixers.hedgehog.window": 8},
    "window_32": {"model.mixers.hedgehog.window": 32},
}
CLAIMS = {"window_only": "no worse", "linear_only": "no worse"}
SEEDS = (0, 1, 2)
METRIC = "validation/bits_per_byte"
MARGIN = 0.02


def get_config():
    config = base.get_config()
    config.steps = 750
    config.data.batch_size = 8
    config.data.length = 128
    config.model.d_model = 128
    config.model.layers = 4
    config.model.mixers.attention = dict(heads=4, kv_heads=2)
    config.model.mixers.hedgehog = dict(heads=4, kv_heads=2)
    config.model.ffns.swiglu = dict(width=192)
    config.optim.lr = 1.8e-3
    config.optim.schedule = "wsd"
    config.optim.schedules.wsd = dict(decay_fraction=0.3)
    config.optim.warmup_fraction = 0.05
    config.train.log_every = 25
    config.train.eval_every = 75
    config.train.eval_rows = 256
    config.train.sample_tokens = 1
    return config
