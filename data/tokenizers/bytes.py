"""Bytes as tokens: nothing to learn, nothing lost, and bits per byte compare with anyone's."""

import numpy as np

from data.documents import Documents


class Tokenizer:
    """Ids 0..255 are bytes, 256 is `<eos>`, 257 is `<mask>`.

    `<eos>` stands between documents: it ends one and begins the next, so it also starts a prompt.

    regular: ids below it are ordinary tokens, the others are special.
    byte_lengths: int32 [W], how many bytes of text each token stands for (0 for special ones).
    """

    name = "bytes"
    vocab_size = 258
    regular = 256
    eos = 256
    mask = 257
    specials = ("<eos>", "<mask>")

    def __init__(self):
        self.byte_lengths = np.ones(self.vocab_size, np.int32)
        self.byte_lengths[self.regular :] = 0

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids int32 [T], without any special token; a str is read as UTF-8."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def encode_prompt(self, text: str | bytes) -> np.ndarray:
        """Ids of the beginning of a document: `<eos>`, then the text."""
        return np.concatenate([np.array([self.eos], np.int32), self.encode(text)])

    def decode(self, ids) -> str:
        """Text of ids; bytes that are not UTF-8 become the replacement character.

        Special tokens are written by name, as is an id outside the vocabulary (a model's padding).
        """
        parts = (self._piece(i) for i in np.asarray(ids).reshape(-1).tolist())
        return b"".join(parts).decode(errors="replace")

    def _piece(self, i: int) -> bytes:
        if 0 <= i < self.regular:
            return bytes([i])
        known = self.regular <= i < self.vocab_size
        return (self.specials[i - self.regular] if known else f"<{i}>").encode()

    def encode_documents(self, documents: Documents) -> Documents:
        """Ids of uint8 documents; the dtype has room for special tokens."""
        tokens = documents.tokens.astype(np.uint16)
        return Documents(tokens, documents.offsets, documents.names)

    def count_bytes(self, ids, weights) -> int:
        """Bytes of text among the ids [..] whose weight [..] is above 0.

        The denominator of bits per byte: `<eos>` costs bits and counts no byte.
        """
        return int(self.byte_lengths[np.asarray(ids)][np.asarray(weights) > 0].sum())
