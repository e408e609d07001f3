"""Texts to the ids of BERT's WordPiece, by the `tokenizers` library, from a `vocab.txt` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lite.errors import ArtifactError, BackendUnavailable, PromptError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PAD, UNKNOWN, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
PAD_ID: Final = 0
"""What the graph leaves out of attention; the first line of every BERT's vocabulary."""
_MAX_BYTES: Final = 1 << 24


class WordPiece:
    """An uncased BERT's tokenizer."""

    def __init__(self, file: Path, *, vocab_size: int, max_tokens: int) -> None:
        """Read the vocabulary.

        Args:
            file: a piece in each line; its number from 0 is its id.
            vocab_size: how many there have to be: the rows of the text tower's embeddings.
            max_tokens: what a text is cut to, `[CLS]` and `[SEP]` included.

        Raises:
            ArtifactError: it is not such a file, or one of another size.
            BackendUnavailable: the `tokenizers` library is not installed.
        """
        pieces = _read_pieces(file)
        if len(pieces) != vocab_size:
            msg = f"{file}: got {len(pieces)} pieces · expected {vocab_size}, a row of the text tower's embeddings each"
            raise ArtifactError(f"{msg} · take vocab.txt of the model that the tower was trained with")
        self.vocab_size, self.max_tokens = vocab_size, max_tokens
        self._tokenizer = _tokenizer({piece: number for number, piece in enumerate(pieces)})

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, `[CLS]` and `[SEP]` around them, however many they are.

        Raises:
            PromptError: one is no text, or cannot be written as UTF-8.
        """
        for number, text in enumerate(texts):
            _check_text(number, text)
        return [list(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]

    def cut(self, ids: list[int]) -> list[int]:
        """Return at most `max_tokens` of a text's ids; the last one stays `[SEP]`."""
        return ids if len(ids) <= self.max_tokens else [*ids[: self.max_tokens - 1], ids[-1]]


def _check_text(number: int, text: object) -> None:
    if not isinstance(text, str):
        raise PromptError(f"text {number}: got a value of type {type(text).__name__} · expected a str · convert it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        msg = f"text {number}: got half a surrogate pair ({error.reason}) · expected Unicode text"
        raise PromptError(f"{msg} · decode it with errors='replace'") from error


def _read_pieces(file: Path) -> list[str]:
    expected = "expected the vocab.txt of an uncased BERT, a piece in each line · fetch it again"
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ArtifactError(f"{file}: got {file.stat().st_size:,} bytes · {expected}")
        pieces = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file}: got {error} · {expected}") from error
    pieces = [piece.removesuffix("\r") for piece in (pieces[:-1] if pieces[-1] == "" else pieces)]
    if len(set(pieces)) != len(pieces):
        twice = next(piece for number, piece in enumerate(pieces) if piece in pieces[:number])
        raise ArtifactError(f"{file}: got the piece {twice!r} twice · {expected}")
    if missing := [piece for piece in (PAD, UNKNOWN, CLS, SEP, MASK) if piece not in pieces]:
        raise ArtifactError(f"{file}: got no {missing[0]} · {expected}")
    if pieces[PAD_ID] != PAD:
        raise ArtifactError(f"{file}: got {pieces[PAD_ID]!r} in the first line, not {PAD} · {expected}")
    return pieces


def _tokenizer(vocabulary: dict[str, int]) -> Any:  # noqa: ANN401 - of a library without types
    try:
        from tokenizers import BertWordPieceTokenizer
    except ImportError as error:
        msg = f"got no tokenizers ({error}) · expected it for retrieval by text"
        raise BackendUnavailable(f'{msg} · pip install "llava-rad-lite[retrieval]"') from error
    return BertWordPieceTokenizer(vocabulary, lowercase=True)
