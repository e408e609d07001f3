r"""The prompt: from a reason for the exam to input_ids, and from token ids back to text.

    … polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:
    └──────────────── chunk 0 ────────────────────┘└ image ┘└────── chunk 1 ──────┘
    [BOS, chunk 0 …, IMAGE_TOKEN_ID, chunk 1 …]

The text is split at `<image>` and each chunk is tokenised by itself, as the model was trained. SentencePiece puts a
space before every text it is given, so chunk 1 begins with an extra "▁" piece before its newline: that is wanted. The
ids are those of the original ("slow") Llama tokenizer, which gives each chunk a BOS and of which one is kept; the
`sentencepiece` package alone reproduces it, because a prompt holds no special token but these.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, Final

import sentencepiece

from lite.config import IMAGE_TOKEN, IMAGE_TOKEN_ID
from lite.errors import ArtifactError, ContextLengthError, PromptError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from lite.config import DecodingDefaults, PromptTemplate

_QUESTION: Final = "{question}"
_REASON: Final = "{reason}"
_INCOMPLETE: Final = "\N{REPLACEMENT CHARACTER}"  # what SentencePiece decodes bytes to that are not yet a character


class Tokenizer:
    """A SentencePiece model with Llama's special tokens."""

    def __init__(self, file: Path, decoding: DecodingDefaults) -> None:
        """Read `tokenizer.model`.

        Raises:
            ArtifactError: the file is not a SentencePiece model, or its special tokens are not the manifest's.
        """
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
        except (OSError, RuntimeError, UnicodeDecodeError) as error:  # the last: its message quotes the file
            msg = f"{file}: got something unreadable ({error}) · expected a SentencePiece model · export it again"
            raise ArtifactError(msg) from error
        got = (self._pieces.bos_id(), self._pieces.eos_id())
        if got != (decoding.bos_token_id, decoding.eos_token_id):
            msg = (
                f"{file}: got BOS and EOS ids {got} · expected {(decoding.bos_token_id, decoding.eos_token_id)} by the "
                "manifest · export the artifact again with the base model's own tokenizer.model"
            )
            raise ArtifactError(msg)
        self.bos_token_id, self.eos_token_id = decoding.bos_token_id, decoding.eos_token_id
        self.vocab_size: int = self._pieces.get_piece_size()
        special = [i for i in range(self.vocab_size) if self._pieces.is_control(i) or self._pieces.is_unknown(i)]
        self._special_ids = frozenset(special)
        self.special_tokens = tuple(self._pieces.id_to_piece(i) for i in special)

    def encode(self, text: str) -> list[int]:
        """Tokenise one chunk of text, without BOS."""
        ids: list[int] = self._pieces.encode(text)
        return ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """Turn token ids into text: special tokens are left out, and so is white space at both ends."""
        return self.decode_unstripped(token_ids).strip()

    def bytes_of(self, token_id: int) -> bytes:
        """Return what one token stands for within a text, in UTF-8: perhaps only a part of a character."""
        if token_id in self._special_ids or token_id >= self.vocab_size:
            return b""
        piece: str = self._pieces.id_to_piece(token_id)
        return bytes([int(piece[3:-1], 16)]) if self._pieces.is_byte(token_id) else piece.replace("▁", " ").encode()

    def decode_unstripped(self, token_ids: Iterable[int]) -> str:
        """Turn token ids into text with the white space at its ends; bytes that are not a character become U+FFFD."""
        # A vocabulary padded to a round size has ids beyond the tokenizer's: they stand for nothing.
        shown = [i for i in token_ids if i not in self._special_ids and i < self.vocab_size]
        text: str = self._pieces.decode(shown)
        return text


class TextStream:
    """Turn tokens into text as they come; the pieces, joined, are exactly `Tokenizer.decode` of all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._num_shown = 0  # characters

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is certain now, often a word, sometimes nothing.

        Held back are white space (it may be the end, where it is stripped) and bytes that may still grow into a
        character.
        """
        self._token_ids.append(token_id)
        # Decoding all of it each time keeps spaces and bytes right; for a few hundred tokens it takes microseconds.
        text = self._tokenizer.decode_unstripped(self._token_ids).lstrip()
        certain = len(text)
        while certain and (text[certain - 1].isspace() or text[certain - 1] == _INCOMPLETE):
            certain -= 1
        return self._show(text[:certain])

    def finish(self) -> str:
        """Return what was held back and belongs to the text."""
        return self._show(self._tokenizer.decode(self._token_ids))

    def _show(self, text: str) -> str:
        piece = text[self._num_shown :]
        self._num_shown = max(self._num_shown, len(text))
        return piece


class PromptEncoder:
    """Build the input_ids of a study."""

    def __init__(
        self, tokenizer: Tokenizer, template: PromptTemplate, *, num_image_tokens: int, max_seq_len: int
    ) -> None:
        """Check the template and tokenise nothing yet.

        Raises:
            ArtifactError: the template has not exactly one place for the image, the question and the reason.
        """
        places = {
            IMAGE_TOKEN: template.conversation.count(IMAGE_TOKEN),
            _QUESTION: template.conversation.count(_QUESTION),
            _REASON: template.question_with_reason.count(_REASON),
        }
        for place, count in places.items():
            if count != 1:
                msg = f"got {count} times {place} in the prompt template · expected it once · export the artifact again"
                raise ArtifactError(msg)
        self._tokenizer = tokenizer
        self._template = template
        # Who speaks, in the conversation: USER: and ASSISTANT:. In a reason they would be turns of their own.
        self._roles = tuple(re.findall(r"[A-Z]{3,}:", template.conversation))
        self.num_image_tokens = num_image_tokens
        self.max_seq_len = max_seq_len

    def num_tokens(self, input_ids: list[int]) -> int:
        """Return the places a prompt takes in the context, the image's included."""
        return len(input_ids) - 1 + self.num_image_tokens

    def encode(self, reason: str | None = None, *, query: str | None = None) -> list[int]:
        """Return the input_ids of the prompt for one study, with IMAGE_TOKEN_ID where the image goes.

        Args:
            reason: the reason for the exam; line breaks become spaces, as in training, and those at its ends nothing.
                None or only white space asks the question that has no reason in it.
            query: ask this instead, word for word (a trailing newline too). It excludes a reason.

        Raises:
            PromptError: the reason or query is not text, or holds `<image>`, a special token of the tokenizer, who
                speaks in the conversation (`USER:`), or a control character.
            ContextLengthError: the prompt leaves no room for a single new token.
        """
        text = self._template.conversation.replace(_QUESTION, self.question(reason, query))
        chunks = [[self._tokenizer.bos_token_id, *self._tokenizer.encode(chunk)] for chunk in text.split(IMAGE_TOKEN)]
        input_ids = [*chunks[0], IMAGE_TOKEN_ID, *chunks[1][1:]]
        self.check_length(
            self.num_tokens(input_ids),
            what=f"a prompt of {len(input_ids) - 1} text and {self.num_image_tokens} image tokens",
            shorten="reason" if query is None else "query",
        )
        return input_ids

    def check_length(self, num_tokens: int, *, what: str, shorten: str) -> None:
        """Raise ContextLengthError unless `num_tokens` leave room for one more in the context."""
        if num_tokens >= self.max_seq_len:
            msg = (
                f"got {what}, {num_tokens} in all · expected at most {self.max_seq_len - 1}, one less than the "
                f"decoder's context of {self.max_seq_len} · shorten the {shorten}"
            )
            raise ContextLengthError(msg)

    def question(self, reason: str | None, query: str | None = None) -> str:
        """Return what the model is asked.

        Raises:
            PromptError: the reason or the query cannot be used.
        """
        if query is not None:
            self._check("query", query)
            if reason is not None:
                msg = "got a reason and a query · expected one of them · write the reason into the query"
                raise PromptError(msg)
            if not query.strip():
                msg = "got an empty query · expected a question · leave the query out for the model's own question"
                raise PromptError(msg)
            return query
        if reason is not None:
            self._check("reason", reason)
        if reason is None or not reason.strip():
            return self._template.question_without_reason
        one_line = reason.strip("\r\n").replace("\r\n", "\n").replace("\r", "\n").replace("\n", " ")
        return self._template.question_with_reason.replace(_REASON, one_line)

    def _check(self, name: str, text: object) -> None:
        if not isinstance(text, str):
            msg = f"got a {name} of type {type(text).__name__} ({text!r}) · expected text · use None for no {name}"
            raise PromptError(msg)
        for token in (IMAGE_TOKEN, *self._tokenizer.special_tokens, *self._roles):
            if token in text:
                msg = f"got {token} in the {name} · expected plain text: the prompt has its own · remove it"
                raise PromptError(msg)
        if control := next(
            (char for char in text if unicodedata.category(char) == "Cc" and char not in "\t\n\r"), None
        ):
            msg = f"got the control character {control!r} in the {name} · expected plain text · remove it"
            raise PromptError(msg)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            msg = f"got a {name} with a character that is not Unicode ({error}) · expected text · check its encoding"
            raise PromptError(msg) from error
