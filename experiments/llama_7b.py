"""Llama 2 7B: Open Foundation and Fine-Tuned Chat Models, Touvron et al. 2023, arXiv 2307.09288.

6,738,415,616 parameters: 32000 x 4096 token embeddings and as many in the head + 32 layers of
202,383,360 + the final norm's 4,096.

The paper's recipe (section 2.2): AdamW 0.9 / 0.95, 3e-4 falling to a tenth by a cosine after 2,000
steps of warm-up, eps 1e-5, weight decay 0.1, clipping at 1.0, 4e6 tokens a step of 4,096-token
rows, 2e12 tokens. Here 1,024 rows = 4,194,304 tokens and 476,838 steps. The paper gives 184,320
hours of A100 80GB. Corpus and tokenizer are the embedded ones until others are there; model.vocab
holds the published size.

COMMAND   uv run train --config experiments/llama_7b.py --config.mesh.fsdp=64
COST      not run
EXPECTED  not run
"""

from experiments import base


def get_config():
    config = base.get_config()
    config.steps = 476_838
    config.data.batch_size = 1024
    config.data.length = 4096
    config.data.micro_batches = 16
    config.model.d_model = 4096
    config.model.layers = 32
    config.model.mixers.attention = dict(heads=32)
    config.model.ffn = "swiglu"
    config.model.ffns.swiglu = dict(width=11008)
    config.model.tied = False
    config.model.vocab = 32_000
    config.model.norm_eps = 1e-5
    config.model.init_std = 0.02
    config.model.remat = "full"
    config.model.dtype = "bfloat16"
    config.optim.lr = 3e-4
    config.optim.warmup_fraction = 2_000 / 476_838
    config.optim.methods.adamw = dict(b1=0.9, b2=0.95, eps=1e-5)
    config.optim.schedules.cosine = dict(final_ratio=0.1)
    config.train.log_every = 10
    config.train.eval_every = 1000
    config.train.eval_rows = 1024
    config.train.save_every = 1000
    return config
