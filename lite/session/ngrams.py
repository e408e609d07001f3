"""Past texts, and what has followed in them: the table that drafts are made from.

    tokens   [eos] t1 t2 … [eos] t1 … [eos]     all texts, one behind the other
    places   each place of that, ordered by the CONTEXT tokens before it, the nearest first

Places that are preceded by the same words lie side by side. So where the newest tokens of a text would stand among
them, the two neighbours have the longest match, and all others as long are beside those. Nothing looks beyond the
beginning of its text.

As a file a table is texts alone: a line of JSON, which says of which tokenizer, and the tokens. It is as confidential
as the reports that it was made from.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from lite.config import from_json, to_json
from lite.errors import LiteError
from lite.files import write_whole
from lite.studies.results import read_results

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from lite.artifact.open import Artifact

CONTEXT: Final = 8
"""Tokens that a match may have."""
MAX_TOKENS: Final = 1 << 21
"""Of a table: 22,000 reports of 95 tokens, and 56 MB in memory."""
_HALF: Final = CONTEXT // 2  # as many of 16 bits are one number of 64
_BEFORE: Final = 0xFFFF  # what stands before the beginning of a text
_MOST_PLACES: Final = 64  # that are asked what followed there; more tell no more
_FORMAT: Final = "llava-rad-lite drafts 1"
_LONGEST_HEADER: Final = 1 << 12


class Guess(NamedTuple):
    """A token that may come next, and what speaks for it."""

    token_id: int
    matched: int  # tokens before it that were the same, up to CONTEXT
    seen: int  # places where they were, as far as counted
    share: float  # of these, how many went on so


class Ngrams:
    """Some texts, ordered once; it does not change."""

    def __init__(self, tokens: NDArray[np.uint16]) -> None:
        """Order texts: tokens as `join` gives them."""
        self.tokens = tokens
        self._view = tokens.data  # read one at a time
        near, far = _contexts(tokens)
        # The first place has nothing before it.
        self._places = np.lexsort((far, near))[: len(tokens)].astype(np.int32) + 1
        self._near, self._far = near[self._places - 1], far[self._places - 1]

    def __len__(self) -> int:
        """Return the number of tokens, those between texts included."""
        return len(self.tokens)

    def follow(self, text: Sequence[int], count: int, *, least: float = 0.1) -> list[Guess]:
        """Say how a text may go on: the way that most of those places have gone where the longest match ends.

        Args:
            text: its tokens so far.
            count: how many more, at most. There are fewer where texts have ended, and none without a match.
            least: the least share of the first places that may have gone all of this way.
        """
        matched, found = self._longest(text)
        places, tokens, eos = found.tolist(), self._view, self._view[0]
        guesses: list[Guess] = []
        share = 1.0
        while places and len(guesses) < count:
            following = [tokens[place] for place in places]
            token_id, seen = following[0], len(following)
            most = following.count(token_id)
            if most < seen:
                ((token_id, most),) = collections.Counter(following).most_common(1)
            share *= most / seen
            if token_id == eos or share < least:
                break
            guesses.append(Guess(token_id, matched, seen, most / seen))
            places = [place + 1 for place, other in zip(places, following, strict=True) if other == token_id]
            matched = min(matched + 1, CONTEXT)
        return guesses

    def _longest(self, text: Sequence[int]) -> tuple[int, NDArray[np.int32]]:
        """Return the length of the longest match, and the places that follow it, or some of them."""
        recent = [*text[: -CONTEXT - 1 : -1], int(self.tokens[0]), *[_BEFORE] * CONTEXT][:CONTEXT]
        near, far = _packed(recent[:_HALF]), _packed(recent[_HALF:])
        first, end = _range(self._near, near, 0, 0, len(self._near))
        keys, key, before = (self._far, far, _HALF) if first < end else (self._near, near, 0)
        if first == end:
            first, end = 0, len(keys)
        at = first + int(keys[first:end].searchsorted(np.uint64(key)))
        beside = (int(keys[place]) ^ key for place in (at - 1, at) if first <= place < end)
        same = (64 - min(beside, default=2**64 - 1).bit_length()) // 16
        if before + same == 0:
            return 0, self._places[:0]
        first, end = _range(keys, key, 64 - 16 * same, first, end)
        return before + same, self._places[first : end : -(-(end - first) // _MOST_PLACES)]


def _range(keys: NDArray[np.uint64], key: int, ignored: int, first: int, end: int) -> tuple[int, int]:
    """Return where keys[first:end], which are in order, begin with the same bits, but for the last `ignored`."""
    low = key >> ignored << ignored
    part = keys[first:end]
    begin = int(part.searchsorted(np.uint64(low)))
    return first + begin, first + int(part.searchsorted(np.uint64(low + (1 << ignored) - 1), "right"))


def _packed(recent: Sequence[int]) -> int:
    key = 0
    for token_id in recent:
        key = key << 16 | token_id
    return key


def _contexts(tokens: NDArray[np.uint16]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Pack the tokens before each place but the first, the nearest in the highest bits, those beyond four apart."""
    count, keys = len(tokens) - 1, []
    goes_on = np.ones(count, bool)
    for back in range(1, CONTEXT + 1):
        if back % _HALF == 1:
            keys.append(np.zeros(count, np.uint64))
        column = np.full(count, _BEFORE, np.uint64)
        column[back - 1 :] = tokens[: max(0, count - back + 1)]
        column[~goes_on] = _BEFORE
        goes_on &= column != tokens[0]
        keys[-1] = keys[-1] << np.uint64(16) | column
    return keys[0], keys[1]


def join(texts: Iterable[Sequence[int]], eos_token_id: int, *, most: int = MAX_TOKENS) -> NDArray[np.uint16]:
    """Put texts one behind the other, as many of the last as have room."""
    kept: collections.deque[Sequence[int]] = collections.deque()
    size = 1
    for text in texts:
        kept.append(text)
        size += len(text) + 1
        while size > most and kept:
            size -= len(kept.popleft()) + 1
    ids = [eos_token_id]
    for text in kept:
        ids += [*text, eos_token_id]
    return np.array(ids, np.uint16)


def num_texts(tokens: NDArray[np.uint16]) -> int:
    """Return how many texts were joined."""
    return int((tokens == tokens[0]).sum()) - 1


# -- As a file -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """The first line of a file."""

    format: str
    tokenizer_sha256: str
    num_texts: int
    num_tokens: int
    sha256: str  # of the tokens that follow, two bytes each, the lower one first


def write_table(file: Path, tokens: NDArray[np.uint16], *, tokenizer_sha256: str) -> None:
    """Write texts as `join` gives them, whole or not at all.

    Raises:
        LiteError: the file cannot be written.
    """
    data = tokens.astype("<u2").tobytes()
    header = _Header(
        format=_FORMAT,
        tokenizer_sha256=tokenizer_sha256,
        num_texts=num_texts(tokens),
        num_tokens=len(tokens),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    write_whole(file, json.dumps(to_json(header)).encode() + b"\n" + data)


def tokenizer_sha256(artifact: Artifact) -> str:
    """Return the hash of an artifact's tokenizer, by its manifest."""
    tokenizer = artifact.manifest.parts.tokenizer
    return tokenizer.files[tokenizer.file].sha256


def read_table(file: Path, *, tokenizer_sha256: str, vocab_size: int, eos_token_id: int) -> NDArray[np.uint16]:
    """Read texts that `write_table` has written for this tokenizer.

    Raises:
        LiteError: it cannot be read, is damaged, or is of another tokenizer.
    """
    todo = "make it again with `python -m lite drafts build`"
    try:
        with file.open("rb") as lines:
            first = lines.readline(_LONGEST_HEADER)
            data = lines.read(2 * MAX_TOKENS + 1)
        header = from_json(_Header, json.loads(first), where=str(file))
    except (OSError, ValueError, RecursionError, LiteError) as error:
        msg = f"{file}: got no table of drafts ({str(error).partition(' · ')[0]}) · expected one"
        raise LiteError(f"{msg} · {todo}") from error
    tokens = np.frombuffer(data[: len(data) // 2 * 2], "<u2").astype(np.uint16)
    whole = len(data) == 2 * header.num_tokens and hashlib.sha256(data).hexdigest() == header.sha256
    for got, fits, expected in (
        (f"the format {header.format!r}", header.format == _FORMAT, repr(_FORMAT)),
        ("a table for another tokenizer", header.tokenizer_sha256 == tokenizer_sha256, "the artifact's own"),
        (f"{len(data)} bytes of tokens, not as hashed", whole, f"{2 * header.num_tokens}, as they were written"),
        ("tokens that are no texts", whole and _are_texts(tokens, vocab_size, eos_token_id), "texts between EOS"),
    ):
        if not fits:
            raise LiteError(f"{file}: got {got} · expected {expected} · {todo}")
    return tokens


def _are_texts(tokens: NDArray[np.uint16], vocab_size: int, eos_token_id: int) -> bool:
    inside = len(tokens) > 1 and int(tokens.max()) < min(vocab_size, _BEFORE)
    return inside and int(tokens[0]) == int(tokens[-1]) == eos_token_id


def read_texts(file: Path) -> list[str]:
    """Read the texts of reports: of a JSON list of results predictions and references, or else each line one.

    Raises:
        LiteError: it cannot be read, or there is no text in it.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{file}: got a file that cannot be read ({error}) · expected a report on each line"
        raise LiteError(f"{msg} · check the path") from error
    if text.lstrip().startswith("{"):
        results = read_results(file)
        texts = [one for result in results for one in (result.prediction, result.study.reference) if one]
    else:
        texts = text.splitlines()
    if not (found := [stripped for one in texts if (stripped := one.strip())]):
        raise LiteError(f"{file}: got no text · expected a report on each line · name another file")
    return found
