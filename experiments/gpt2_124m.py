"""GPT-2 small: Language Models are Unsupervised Multitask Learners, Radford et al. 2019 (no arXiv).

124,439,808 parameters: 50257 x 768 token embeddings (tied) + 1024 x 768 positions + 12 layers of
7,087,872 + the final norm's 1,536. The vocabulary is held padded to a multiple of 128, which adds
47 rows of no use.

The recipe is nanoGPT's reproduction (github.com/karpathy/nanoGPT, config/train_gpt2.py), which
leaves dropout out where the paper has 0.1: 40 micro-batches of 12 x 1024 = 491,520 tokens a step,
600,000 steps, 2,000 of warm-up, AdamW 0.9 / 0.95, 6e-4 falling to 6e-5. Its page gives a
loss of about 2.85 on OpenWebText after about 4 days on 8 A100 40GB. Here the corpus is still the
embedded one and text is bytes, so that number is not to be expected until BPE tokenizers and
OpenWebText are there; model.vocab holds the published size meanwhile.

COMMAND   uv run train --config experiments/gpt2_124m.py
COST      not run
EXPECTED  not run
"""

from experiments import base


def get_config():
    config = base.get_config()
    config.steps = 600_000
    config.data.batch_size = 480
    config.data.length = 1024
    config.data.micro_batches = 5
    config.model.d_model = 768
    config.model.layers = 12
    config.model.mixers.attention = dict(heads=12, rope=False, bias=True)
    config.model.ffn = "gelu"
    config.model.ffns.gelu = dict(width=3072, bias=True, approximate="tanh")
    config.model.tied = True
    config.model.vocab = 50257
    config.model.norm = "layernorm"
    config.model.norm_eps = 1e-5
    config.model.positions = "learned"
    config.model.init_std = 0.02
    config.model.scale_residual = True
    config.model.dtype = "bfloat16"
    config.optim.lr = 6e-4
    config.optim.warmup_fraction = 2_000 / 600_000
    config.optim.methods.adamw = dict(b1=0.9, b2=0.95)
    config.optim.schedules.cosine = dict(final_ratio=0.1)
    config.train.log_every = 10
    config.train.eval_every = 1000
    config.train.eval_rows = 2400
    config.train.save_every = 1000
    return config
