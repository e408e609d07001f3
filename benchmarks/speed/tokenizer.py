"""A tokenizer of any vocabulary: the phantom's own, filled up with pseudo-words."""

from __future__ import annotations

import functools
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from benchmarks.phantom.tokenizer import train_tokenizer
from lite.errors import LiteError


def make_tokenizer(vocab_size: int) -> bytes:
    """Make a SentencePiece model of exactly `vocab_size` pieces, set up as Llama's is.

    The phantom's tokenizer, which knows the prompt and the findings grammar (about 1.2 tokens a word) and spells out
    other English, is filled up with pseudo-words. Its first pieces are Llama's: unk, bos, eos and the 256 bytes.

    Raises:
        LiteError: `vocab_size` is smaller than the phantom's vocabulary.
    """
    messages: Any = sentencepiece_model_pb2  # whose classes are made when it is imported
    model = messages.ModelProto.FromString(_learnt_tokenizer())
    pieces, count = model.pieces, len(model.pieces)
    if vocab_size < count:
        msg = f"got a vocabulary of {vocab_size} · expected at least the {count} learnt pieces · choose a larger one"
        raise LiteError(msg)
    # Below all learnt scores: no pseudo-word is preferred to a learnt piece.
    score = min(piece.score for piece in pieces)
    for index in range(1, vocab_size - count + 1):
        pieces.add(piece=f"▁w{index}", score=score - index)
    model.trainer_spec.vocab_size = vocab_size
    written: bytes = model.SerializeToString()
    return written


@functools.cache
def _learnt_tokenizer() -> bytes:
    # One for every seed, so that a text has the same length on all checkpoints. A thousand studies hold every word.
    return train_tokenizer(seed=0, sentence_count=1000)
