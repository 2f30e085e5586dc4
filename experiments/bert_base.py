"""BERT base: Pre-training of Deep Bidirectional Transformers, Devlin et al. 2018, arXiv 1810.04805.

109,514,298 parameters: 30522 x 768 token embeddings (tied) + 512 x 768 positions + 2 x 768 token
types + the embeddings' norm 1,536 + 12 layers of 7,087,872 + the masked-LM head's 590,592 dense,
1,536 norm and 30,522 bias. Deviations: no next-sentence prediction and therefore no pooler
(RoBERTa, arXiv 1907.11692, found it of no use), and rows are packed from several documents.

The paper's recipe (appendix A.2): 256 rows of 512 = 131,072 tokens a step, 1,000,000 steps, Adam
0.9 / 0.999 with weight decay 0.01, 1e-4 after 10,000 steps of warm-up falling linearly to 0,
dropout 0.1 (also on attention weights, which this attention has not); the first 90% of the steps
use rows of 128. Appendix A.2 gives 4 days on 4 Cloud TPUs (16 chips). Corpus and tokenizer are the
embedded ones until others are there; model.vocab holds the published size.

COMMAND   uv run train --config experiments/bert_base.py
COST      not run
EXPECTED  not run
"""

from experiments import base


def get_config():
    config = base.get_config()
    config.steps = 1_000_000
    config.data.batch_size = 256
    config.data.length = 512
    config.data.transforms = ("masked_lm",)
    config.data.transform.masked_lm = dict(rate=0.15, mask=0.8, random=0.1)
    config.model.d_model = 768
    config.model.layers = 12
    config.model.mixers.attention = dict(heads=12, rope=False, bias=True)
    config.model.ffn = "gelu"
    config.model.ffns.gelu = dict(width=3072, bias=True, approximate="none")
    config.model.head = "mlm"
    config.model.tied = True
    config.model.vocab = 30522
    config.model.norm = "layernorm"
    config.model.norm_position = "post"
    config.model.norm_eps = 1e-12
    config.model.dropout = 0.1
    config.model.positions = "learned"
    config.model.token_types = 2
    config.model.embed_norm = True
    config.model.causal = False
    config.model.init_std = 0.02
    config.model.scale_residual = False
    config.model.dtype = "bfloat16"
    config.optim.lr = 1e-4
    config.optim.schedule = "linear"
    config.optim.warmup_fraction = 0.01
    config.optim.clip = 1.0
    config.optim.weight_decay = 0.01
    config.optim.methods.adamw = dict(b1=0.9, b2=0.999, eps=1e-6)
    config.train.log_every = 10
    config.train.eval_every = 1000
    config.train.eval_rows = 1024
    config.train.save_every = 10_000
    return config
