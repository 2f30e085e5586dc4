"""From a corpus to batches: row i is a pure function of (seed, i), a batch is a range of rows."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from data import keyed, methods, prefetch
from data.batch import TOKEN_FIELDS, Batch, abstract, to_words
from data.documents import Documents

_EMPTY: Mapping = MappingProxyType({})


def build(
    *,
    seed: int,
    batch_size: int,
    length: int,
    micro_batches: int = 1,
    source: str = "stdlib",
    sources: Mapping = _EMPTY,
    tokenizer: str = "bytes",
    tokenizers: Mapping = _EMPTY,
    packing: str = "pack",
    packings: Mapping = _EMPTY,
    transforms: Sequence[str] = (),
    transform: Mapping = _EMPTY,
    prefetch: int = 2,
    workers: int = 0,
) -> "Data":
    """Reads the corpus and returns its rows.

    seed: keys document order, row order and transforms of training; evaluation does not depend on
        it, so that runs with different seeds are scored on the same rows.
    batch_size: B, rows in a global batch; micro_batches: A, which must divide it.
    length: L, tokens a row.
    source, tokenizer, packing: names of files in data/sources, data/tokenizers and data/transforms;
        `sources`, `tokenizers` and `packings` map such a name to its own arguments.
    transforms: names of files in data/transforms, applied in order; `transform` maps a name to its
        own arguments.
    prefetch: batches built ahead of the consumer (0: none).
    workers: Grain processes that build batches; 0 builds them in a thread of this process.

    Raises ValueError, in one sentence, for a bad size, an unknown name or an empty corpus.
    """
    _check("data.batch_size", batch_size)
    _check("data.length", length)
    _check("data.micro_batches", micro_batches)
    _check("data.prefetch", prefetch, least=0)
    _check("data.workers", workers, least=0)
    if batch_size % micro_batches:
        raise ValueError(
            f"data.batch_size {batch_size} is not divisible by data.micro_batches {micro_batches}."
        )
    if isinstance(transforms, str):
        raise ValueError(f"data.transforms is a tuple of names, got the string {transforms!r}.")
    return Data(
        source=methods.make("sources", "Source", source, sources.get(source, {})),
        tokenizer=methods.make("tokenizers", "Tokenizer", tokenizer, tokenizers.get(tokenizer, {})),
        packer=functools.partial(_pack, packing, packings.get(packing, {}), length),
        transforms=[
            (name, methods.make("transforms", "Transform", name, transform.get(name, {})))
            for name in transforms
        ],
        seed=seed,
        batch_size=batch_size,
        length=length,
        micro_batches=micro_batches,
        depth=prefetch,
        workers=workers,
    )


class Data:
    """Rows of a corpus. Built by `build`; every method is a pure function of its arguments.

    vocab_size: W as the tokenizer has it. tokenizer, source: the objects.
    fingerprint: hash of the corpus, its splits and the tokenizer; equal on every host of a run.
    domains: names, indexed by `Batch.domain`.
    """

    def __init__(
        self,
        *,
        source,
        tokenizer,
        packer: Callable,
        transforms: list[tuple[str, Callable]],
        seed: int,
        batch_size: int,
        length: int,
        micro_batches: int,
        depth: int,
        workers: int,
    ):
        self.source, self.tokenizer, self.seed = source, tokenizer, int(seed)
        self.batch_size, self.length, self.micro_batches = batch_size, length, micro_batches
        self.vocab_size = tokenizer.vocab_size
        self.domains = (source.domain,)
        identity = repr((source.fingerprint(), tokenizer.name, tokenizer.vocab_size)).encode()
        self.fingerprint = hashlib.blake2b(identity, digest_size=16).hexdigest()
        self._transforms, self._depth, self._workers = transforms, depth, workers
        self._packer = packer
        self._train = packer(_with_separators(source.documents("train"), tokenizer))
        self._layouts: dict = {}

    @functools.cached_property
    def _validation(self):
        # On demand: a corpus without held-out files can still be trained on.
        return self._packer(_with_separators(self.source.documents("validation"), self.tokenizer))

    def rows(self, split: str = "train") -> int:
        """Rows of an epoch of 'train', or of the whole of 'validation'."""
        return self._split(split).rows

    def holds_out(self) -> bool:
        """Whether any document is held out for validation."""
        return self.source.count("validation") > 0

    def tokens(self, split: str = "train") -> int:
        """Targets with weight 1 before any transform in an epoch (`rows` * L less the padding)."""
        return self._split(split).total

    def row(self, number: int) -> Batch:
        """Training row `number`, 0 <= number < 2**64; fields [L], sample [2], domain []."""
        return Batch(*(field[0] for field in self.local(number, 0, 1)))

    def names(self, first: int, last: int) -> list[str]:
        """Names of the documents that training rows first .. last - 1 hold tokens of."""
        numbers = np.uint64(first) + np.arange(last - first, dtype=np.uint64)
        epochs = numbers // np.uint64(self._train.rows)
        met = []
        for epoch in map(int, np.unique(epochs)):
            chunks = self._chunks(epoch, numbers[epochs == epoch])
            met += self._train.names(self._layout(epoch), self._order(epoch), chunks)
        return list(dict.fromkeys(met))

    def local(self, position: int, lo: int, hi: int) -> Batch:
        """Training rows position + lo .. position + hi - 1 as `[hi - lo, L]`."""
        first, last = int(position) + int(lo), int(position) + int(hi)
        _check_rows(first, last)
        return self._numbered(np.uint64(first) + np.arange(last - first, dtype=np.uint64))

    def batch(self, position: int, rows: int | None = None) -> Batch:
        """The global batch that starts at row `position`, `[A b L]`; A * b = rows or batch_size."""
        rows = self.batch_size if rows is None else rows
        _check("rows", rows)
        if rows % self.micro_batches:
            raise ValueError(f"{rows} rows do not divide into {self.micro_batches} micro-batches.")
        flat = self.local(position, 0, rows)
        lead = (self.micro_batches, rows // self.micro_batches)
        return Batch(*(field.reshape(*lead, *field.shape[1:]) for field in flat))

    def iterate(self, position: int, indices: Sequence[tuple] | None = None) -> Iterator:
        """Successive batches from row `position` on, without end, built ahead of the consumer.

        Yields `batch(..)`, or with `indices` a list of parts of it, one for each index, for which
        only their own rows are built. An index is up to three slices over A, b, L as a sharding's
        `addressable_devices_indices_map` gives them; the third applies to the fields that have a
        dimension L. Close the generator to end its thread.
        """
        make = functools.partial(_step, self, int(position), indices)
        if self._workers:
            return prefetch.in_processes(make, self._depth, self._workers)
        return prefetch.in_thread(make, self._depth)

    def evaluation(self, rows_per_batch: int, limit: int | None = None) -> Iterator[Batch]:
        """Validation rows in batches `[b L]`, the same at every call and for every seed.

        Every held-out token is a target once; `limit` keeps that many rows, spread over the split
        (the beginning of the same order). The last batch is filled with rows of padding.
        """
        _check("rows_per_batch", rows_per_batch)
        count = self.rows("validation")
        if limit is not None:
            _check("limit", limit)
            count = min(limit, count)
        for first in range(0, count, rows_per_batch):
            numbers = np.arange(first, min(first + rows_per_batch, count), dtype=np.uint64)
            yield _padded(self._validation_rows(numbers), rows_per_batch, self.tokenizer.eos)

    def _split(self, split: str):
        if split not in ("train", "validation"):
            raise ValueError(f"There is no split {split!r}; the splits are 'train', 'validation'.")
        return self._train if split == "train" else self._validation

    def _cut(self, position: int, index: tuple, blocks: dict) -> Batch:
        micro, row, token = (*index, *[slice(None)] * (3 - len(index)))
        micro = range(self.micro_batches)[micro]
        row = range(self.batch_size // self.micro_batches)[row]
        if (micro, row) not in blocks:
            blocks[micro, row] = self._block(position, micro, row)
        block = blocks[micro, row]
        return block._replace(**{name: getattr(block, name)[..., token] for name in TOKEN_FIELDS})

    def _block(self, position: int, micro: range, row: range) -> Batch:
        width = self.batch_size // self.micro_batches
        offsets = np.add.outer(np.asarray(micro) * width, np.asarray(row)).astype(np.uint64)
        _check_rows(int(position), int(position) + self.batch_size)
        flat = self._numbered((np.uint64(position) + offsets).reshape(-1))
        return Batch(*(field.reshape(*offsets.shape, *field.shape[1:]) for field in flat))

    def _numbered(self, numbers: np.ndarray) -> Batch:
        """Training rows of the given numbers, uint64 [R], in their order."""
        epochs = numbers // np.uint64(self._train.rows)
        distinct = np.unique(epochs)
        if len(distinct) == 1:  # Nearly always; spares a copy.
            rows = self._epoch_rows(int(distinct[0]), numbers)
        else:
            rows = abstract(numbers.shape, self.length, np.zeros)
            for epoch in distinct:
                here = epochs == epoch
                part = self._epoch_rows(int(epoch), numbers[here])
                for whole, piece in zip(rows, part, strict=True):
                    whole[here] = piece
        return self._finish(rows, numbers, self.seed)

    def _epoch_rows(self, epoch: int, numbers: np.ndarray) -> Batch:
        return self._train.build(self._layout(epoch), self._chunks(epoch, numbers))

    def _chunks(self, epoch: int, numbers: np.ndarray) -> np.ndarray:
        rows = self._train.rows
        places = numbers - np.uint64(epoch * rows)
        return keyed.permute(places, rows, keyed.key("rows", self.seed, epoch))

    def _layout(self, epoch: int):
        layouts = self._layouts  # Read once: another thread may replace it.
        if (layout := layouts.get(epoch)) is None:
            layout = self._train.layout(self._order(epoch))
            self._layouts = {**dict(list(layouts.items())[-7:]), epoch: layout}
        return layout

    def _order(self, epoch: int) -> np.ndarray:
        count = len(self._train.documents)
        return keyed.shuffled(count, keyed.key("documents", self.seed, epoch))

    def _validation_rows(self, numbers: np.ndarray) -> Batch:
        packer = self._validation
        chunks = keyed.permute(numbers, packer.rows, keyed.key("rows", "validation"))
        rows = packer.build(packer.layout(np.arange(len(packer.documents))), chunks)
        return self._finish(rows, numbers, "validation")

    def _finish(self, rows: Batch, numbers: np.ndarray, seed: int | str) -> Batch:
        for place, (name, transform) in enumerate(self._transforms):
            keys = keyed.row_keys(keyed.key("transform", seed, place, name), numbers)
            rows = transform(rows, keys, self.tokenizer)
        return rows._replace(sample=to_words(numbers))


def _step(data: Data, position: int, indices: Sequence[tuple] | None, step: int):
    at = position + step * data.batch_size
    if indices is None:
        return data.batch(at)
    blocks: dict = {}
    return [data._cut(at, index, blocks) for index in indices]


def _pack(packing: str, own: Mapping, length: int, documents: Documents):
    return methods.make("transforms", "Packer", packing, own, documents, length)


def _with_separators(documents: Documents, tokenizer) -> Documents:
    """Each document begins with its `<eos>`, and one more follows the last."""
    encoded = tokenizer.encode_documents(documents)
    tokens = np.insert(encoded.tokens, encoded.offsets, tokenizer.eos)
    return Documents(tokens, encoded.offsets + np.arange(len(encoded) + 1), encoded.names)


def _padded(rows: Batch, count: int, eos: int) -> Batch:
    missing = count - len(rows.domain)
    fill = {"inputs": eos, "targets": eos}

    def pad(name: str, field: np.ndarray) -> np.ndarray:
        widths = [(0, missing)] + [(0, 0)] * (field.ndim - 1)
        return np.pad(field, widths, constant_values=fill.get(name, 0))

    return Batch(*map(pad, Batch._fields, rows)) if missing else rows


def _check_rows(first: int, last: int) -> None:
    if not 0 <= first < last <= 2**64:
        raise ValueError(f"Rows {first} up to {last} are not a range within 0 .. 2**64.")


def _check(name: str, size: int, least: int = 1) -> None:
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {size!r}.")
