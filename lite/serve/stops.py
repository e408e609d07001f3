"""Where a text is cut: before the first stop string, wherever between tokens that begins."""

from __future__ import annotations

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
        self._has_begun = False
        self._held = ""  # text that may be the beginning of a stop string
        self._tokens: list[Token] = []  # whose text has not been given out yet
        self._num_bytes = 0  # of the text that those before them have had, less of what was given out

    def push(self, text: str, tokens: Sequence[Token], *, is_all: bool) -> tuple[str, list[Token], bool]:
        """Take what has come; return text and tokens that can be given out, and whether that was all."""
        self.num_tokens += len(tokens)
        self._tokens += tokens
        self._held += text
        found = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None)
        if found is not None:
            self.is_cut, certain = True, found
        else:
            certain = len(self._held) if is_all else self._certain()
        piece, self._held = self._held[:certain], self._held[certain:]
        self._num_bytes -= len(piece.encode("utf-8", "surrogatepass"))
        return piece, self._tokens_of_text(all_of_them=is_all and not self.is_cut), is_all or self.is_cut

    def _certain(self) -> int:
        """Return how much of the text is not the beginning of a stop string."""
        longest = max(map(len, self._stops), default=0)
        for start in range(max(0, len(self._held) - longest + 1), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                return start
        return len(self._held)

    def _tokens_of_text(self, *, all_of_them: bool) -> list[Token]:
        """Return the tokens that lie within the text given out; white space before the text is nobody's."""
        count = 0
        for token in self._tokens:
            data = self._tokenizer.bytes_of(token.id)
            data = data if self._has_begun else data.lstrip()
            if self._num_bytes + len(data) > 0 and not all_of_them:
                break
            self._num_bytes += len(data)
            self._has_begun = self._has_begun or bool(data)
            count += 1
        given, self._tokens = self._tokens[:count], self._tokens[count:]
        return given
