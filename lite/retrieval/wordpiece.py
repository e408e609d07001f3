"""Texts to the ids of BERT's WordPiece, by the `tokenizers` library, from a `vocab.txt` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lite.errors import ArtifactError, BackendUnavailable, PromptError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

PAD_ID: Final = 0
"""What the graph leaves out of attention; the first line of every BERT's vocabulary."""
_SPECIAL: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


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
        try:
            from tokenizers import BertWordPieceTokenizer
        except ImportError as error:
            msg = f"got no tokenizers ({error}) · expected it for retrieval by text"
            raise BackendUnavailable(f'{msg} · pip install "llava-rad-lite[retrieval]"') from error
        try:
            pieces = [line.rstrip("\r") for line in file.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(
                f"{file}: got {error} · expected a vocab.txt, a piece a line · fetch it again"
            ) from error
        by_piece = {piece: number for number, piece in enumerate(pieces)}
        missing = [piece for piece in _SPECIAL if piece not in by_piece]
        for got, wrong, expected in (
            (f"{len(pieces)} pieces", len(pieces) != vocab_size, f"{vocab_size}, a row of the embeddings each"),
            (f"{len(pieces) - len(by_piece)} pieces twice", len(by_piece) < len(pieces), "each once"),
            (f"no {', '.join(missing)}", missing, "all special pieces of a BERT"),
            (f"{pieces[PAD_ID]!r} in the first line", pieces[PAD_ID] != _SPECIAL[0], _SPECIAL[0]),
        ):
            if wrong:
                msg = f"{file}: got {got} · expected {expected} · take vocab.txt of the BERT that the tower began as"
                raise ArtifactError(msg)
        self.max_tokens = max_tokens
        self._tokenizer = BertWordPieceTokenizer(by_piece, lowercase=True)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, `[CLS]` and `[SEP]` around them, however many they are.

        Raises:
            PromptError: one is no text, or cannot be written as UTF-8.
        """
        given: Iterable[object] = texts
        for number, text in enumerate(given):
            if not isinstance(text, str) or any("\ud800" <= char <= "\udfff" for char in text):
                msg = f"text {number}: got {str(text)[:40]!r} of type {type(text).__name__} · expected Unicode text"
                raise PromptError(f"{msg}, without halves of surrogate pairs · convert it")
        return [list(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]

    def cut(self, ids: list[int]) -> list[int]:
        """Return at most `max_tokens` of a text's ids; the last one stays `[SEP]`."""
        return ids if len(ids) <= self.max_tokens else [*ids[: self.max_tokens - 1], ids[-1]]
