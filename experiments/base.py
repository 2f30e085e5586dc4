"""Every shared key once, with its meaning and a value that runs on a laptop in seconds.

Other files in this folder change what they need. A method's own keys are the keyword arguments of
its constructor: `config.model.mixers.attention = dict(heads=8)` sets one for the file
models/mixers/attention.py. `--config FILE --help` lists them with their values.

A key is `config.<key> = value  # meaning`; launch reads the comment for --help, takes the type from
the value, and accepts `none` for placeholders and for the keys in OPTIONAL.

COMMAND  uv run train --config experiments/base.py
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# Keys that have a value and may also be none.
OPTIONAL = (
    "optim.clip",
    "train.eval_every",
    "train.eval_rows",
    "train.keep",
)

# Keys that take one of a few words.
CHOICES = {
    "zero": ("none", "zero1", "zero2"),
    "model.norm": ("rmsnorm", "layernorm"),
    "model.norm_position": ("pre", "post", "sandwich"),
    "model.positions": ("none", "learned"),
    "model.remat": ("none", "full", "dots", "named"),
    "model.dtype": ("float32", "bfloat16"),
}


def get_config():
    config = ConfigDict()
    config.steps = 20  # optimizer steps of the run; 0 scores what it begins with
    config.seed = 0  # of parameters, data order and dropout
    # Parameters that the run of `start` lacks begin as usual; layers are matched by their number.
    config.start = placeholder(str)  # folder of a run whose parameters this one begins with
    # What an adapter adds is always trained; of the model's own parameters, beside one, only those
    # that a pattern given here names. Without an adapter no pattern means all of them.
    config.trainable = placeholder(str)  # regular expression of the model's own paths to train
    config.ema = placeholder(float)  # decay a step of averaged parameters; none keeps none
    config.zero = "none"  # split over mesh.data: optimizer state (zero1), gradients too (zero2)

    config.data = ConfigDict()  # keyword arguments of data.pipeline.build
    config.data.batch_size = 8  # rows a step, over all devices and micro-batches
    config.data.length = 128  # tokens a row
    config.data.micro_batches = 1  # parts of a batch whose gradients are summed one after another
    config.data.source = "stdlib"  # a file of data/sources, read where there is no mixture
    config.data.sources = ConfigDict()  # own arguments of sources, by name
    config.data.mixture = ()  # files of data/sources, entries of data.domains; () is data.source
    config.data.domains = ConfigDict()  # <name>.{source, weight, schedule, epochs, own arguments}
    config.data.mixing = "fixed"  # a file of data/mixings: how weights of the mixture come about
    config.data.mixings = ConfigDict()  # own arguments of mixings, by name
    config.data.tokenizer = "bytes"  # a file of data/tokenizers
    config.data.tokenizers = ConfigDict()  # own arguments of tokenizers, by name
    config.data.packing = "pack"  # a file of data/transforms with a Packer: documents to rows
    config.data.packings = ConfigDict()  # own arguments of packings, by name
    config.data.transforms = ()  # files of data/transforms in order: select, edit text, change rows
    config.data.transform = ConfigDict()  # own arguments of transforms, by name
    config.data.prefetch = 2  # batches built ahead of the step
    config.data.workers = 0  # processes that build batches; 0 uses a thread of this one

    config.model = ConfigDict()  # keyword arguments of models.lm.LM, and causal and dtype
    config.model.d_model = 64  # width of the residual stream, D
    config.model.layers = 2  # all layers: prefix + whole patterns + suffix
    config.model.pattern = ("attention",)  # the repeated layers: mixers or entries of model.blocks
    config.model.prefix = ()  # layers before the repeated ones
    config.model.suffix = ()  # layers after them
    config.model.blocks = ConfigDict()  # entries <name>.{mixer, ffn, the mixer's own arguments}
    config.model.mixers = ConfigDict()  # own arguments of mixers, by name
    config.model.ffn = "swiglu"  # a file of models/ffns, for entries that name none
    config.model.ffns = ConfigDict()  # own arguments of feed-forward networks, by name
    config.model.head = "linear"  # a file of models/heads
    config.model.heads = ConfigDict()  # own arguments of heads, by name
    config.model.tied = True  # the head multiplies by the token embedding
    config.model.vocab = placeholder(int)  # tokens embedded; none is the tokenizer's number
    config.model.norm = "rmsnorm"  # of every norm outside of mixers
    config.model.norm_position = "pre"  # x + f(norm(x)), norm(x + f(x)) or x + norm(f(norm(x)))
    config.model.norm_eps = 1e-6  # added to the variance
    config.model.dropout = 0.0  # share dropped of embeddings and of each sublayer's output
    config.model.positions = "none"  # added to embeddings; rotary ones belong to mixers
    config.model.token_types = 0  # rows of a token type embedding (BERT has 2); data gives type 0
    config.model.embed_norm = False  # a norm after the embeddings
    config.model.embed_scale = 1.0  # factor on token embeddings
    config.model.softcap = placeholder(float)  # cap * tanh(logits / cap) on the logits
    config.model.causal = True  # tokens do not see later ones
    config.model.base_d_model = placeholder(int)  # width that learning rates are tuned at; muP
    config.model.init_std = placeholder(float)  # of matrices at the start; none is 1 / sqrt(fan-in)
    config.model.scale_residual = True  # starts of residual writers divided by sqrt(2 layers)
    config.model.remat = "none"  # what the backward pass recomputes; see models/lm.py
    config.model.unroll = 1  # periods of the pattern in one turn of the scan
    config.model.taps = ()  # sums that layers also report, such as residual (mean square of x)
    config.model.dtype = "float32"  # of the computation; parameters are always float32

    config.adapter = ConfigDict()  # <name>.{own arguments} of adapters
    config.adapter.name = placeholder(str)  # a file of training/adapters: parameters beside these

    config.loss = ConfigDict()  # what is minimised
    config.loss.name = "cross_entropy"  # a file of training/losses
    config.loss.losses = ConfigDict()  # own arguments of losses, by name

    config.balance = ConfigDict()  # how experts are kept busy, where a layer routes
    config.balance.name = "global_batch"  # a file of training/balances
    config.balance.balances = ConfigDict()  # own arguments of balances, by name

    config.optim = ConfigDict()  # keyword arguments of optim.build.build
    config.optim.name = "adamw"  # a file of optim/methods
    config.optim.lr = 3e-3  # peak learning rate
    config.optim.schedule = "cosine"  # a function of optim/schedules.py
    config.optim.warmup_tokens = placeholder(int)  # length of the warm-up; none takes the fraction
    config.optim.warmup_fraction = 0.1  # the same as a share of the run's tokens
    config.optim.clip = 1.0  # largest global norm of the gradient; none does not clip
    config.optim.weight_decay = 0.1  # decoupled, a step: lr * weight_decay of each decayed weight
    config.optim.methods = ConfigDict()  # own arguments of optimizers, by name
    config.optim.schedules = ConfigDict()  # own arguments of schedules, by name

    config.mesh = ConfigDict()  # devices along each axis; one axis may be -1 and takes the rest
    config.mesh.replica = 1  # copies of the parameters over slow links
    config.mesh.data = -1  # rows of the batch; parameters are copied
    config.mesh.fsdp = 1  # rows of the batch; parameters are sharded
    config.mesh.stage = 1  # layers, as a pipeline
    config.mesh.context = 1  # tokens of a row
    config.mesh.expert = 1  # experts
    config.mesh.tensor = 1  # heads and widths of layers

    config.train = ConfigDict()  # the loop; periods are in steps, and none is never
    config.train.log_every = 1  # a row of metrics
    config.train.eval_every = 10  # loss on the validation split
    config.train.eval_rows = 16  # rows of that split an evaluation reads; none reads all
    config.train.sample_every = placeholder(int)  # text written by the model
    config.train.sample_prompt = "def "  # what that text begins with
    config.train.sample_tokens = 128  # how many tokens the model adds
    config.train.ngrams = False  # set n-gram counts of the corpus beside the final score
    config.train.save_every = placeholder(int)  # a checkpoint; the last step is saved in any case
    config.train.keep = 3  # newest checkpoints kept; none keeps all
    config.train.keep_every = placeholder(int)  # checkpoints at its multiples are kept for good
    config.train.profile_start = placeholder(int)  # first step of a profiler trace
    config.train.profile_steps = 3  # steps in it
    return config
