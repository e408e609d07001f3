"""Where a text is cut: before the first stop string, wherever between tokens that begins."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lite.prompt import Tokenizer
    from lite.session.request import Token


class Choice:
    """The text of one draft, given out as far as it is certain that it stays."""

    def __init__(self, stops: Sequence[str], tokenizer: Tokenizer) -> None:
        """Begin with nothing.

        Args:
            stops: what cuts the text.
            tokenizer: says how long tokens are.
        """
        self.is_cut = False
        self.num_tokens = 0  # that were drafted, those behind the cut included
        self._stops = stops
        self._tokenizer = tokenizer
        self._held = ""  # text that may be the beginning of a stop string
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._has_begun = False  # behind the white space before the text, which is none of it
        self._tokens: list[tuple[Token, int]] = []  # whose text has not been given out yet, with how many characters
        self._num_ahead = 0  # characters of tokens given out, less those of the text given out

    def push(self, text: str, tokens: Sequence[Token], *, is_all: bool) -> tuple[str, list[Token], bool]:
        """Take what has come; return text and tokens that can be given out, and whether that was all."""
        self.num_tokens += len(tokens)
        self._tokens += [(token, self._size(token)) for token in tokens]
        self._held += text
        found = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None)
        if found is not None:
            self.is_cut, certain = True, found
        else:
            certain = len(self._held) if is_all else self._certain()
        piece, self._held = self._held[:certain], self._held[certain:]
        self._num_ahead -= len(piece)
        return piece, self._tokens_of_text(all_of_them=is_all and not self.is_cut), is_all or self.is_cut

    def _certain(self) -> int:
        """Return how much of the text is not the beginning of a stop string."""
        longest = max(map(len, self._stops), default=0)
        for start in range(max(0, len(self._held) - longest + 1), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                return start
        return len(self._held)

    def _size(self, token: Token) -> int:
        """Return how many characters of the text end with a token."""
        text = self._characters.decode(self._tokenizer.bytes_of(token.id))
        text = text if self._has_begun else text.lstrip()
        self._has_begun = self._has_begun or bool(text)
        return len(text)

    def _tokens_of_text(self, *, all_of_them: bool) -> list[Token]:
        """Return the tokens that lie within the text given out."""
        count = 0
        for _, size in self._tokens:
            if self._num_ahead + size > 0 and not all_of_them:
                break
            self._num_ahead += size
            count += 1
        given, self._tokens = self._tokens[:count], self._tokens[count:]
        return [token for token, _ in given]
