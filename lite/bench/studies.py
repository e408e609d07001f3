"""Studies as a page shows them: a card each, with film, report, drafts, and what each draft has right."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from lite.bench.words import Passage, compare_words
from lite.errors import LiteError
from lite.eval.agreement import Verdict, compare_findings
from lite.eval.labels import unreadable
from lite.image.files import load_image

_FILM_PX: Final = 256
_MAX_FILMS: Final = 200  # of 10 kB each, in the page
_MAX_LABELS: Final = 8  # to filter by
_SURE: Final = 0.9
_STATES: Final = {"wrong": "a wrong finding", "differs": "texts that differ", "failed": "failed"}


class Writing(NamedTuple):
    """What one writer has written about a study, or why it could not."""

    name: str
    text: str
    error: str | None = None
    score: str = ""  # its figures on this study
    sentences: Sequence[tuple[str, float]] = ()  # how likely each is true


class Text(NamedTuple):
    """One text of a card."""

    names: Sequence[str]  # of all who wrote it, character for character
    error: str | None
    score: str
    passages: Sequence[Passage]
    unsure: Sequence[tuple[str, float]]  # sentences that are less likely true than `_SURE`, the least likely first
    verdicts: Sequence[Verdict]  # beside the findings that the card holds it against


class Card(NamedTuple):
    """One study."""

    id: str
    image: str  # the film's path; may be empty
    reason: str | None
    truth: str | None  # the report that comes with the film
    texts: Sequence[Text]
    wrong: Sequence[Verdict]  # of the text that has the most wrong
    num_findings: int  # that this text or the truth has
    tags: Sequence[str]  # of `_STATES` and the labels that a text has wrong
    film: str = ""  # a data URI; empty until `with_films`
    film_error: str = ""


def study_card(
    name: str, image: str, truth: str | None, writings: Sequence[Writing], *, marked: bool, reason: str | None = None
) -> Card:
    """Make a study's card.

    Args:
        name: what the study is called.
        image: its film's path; may be empty.
        truth: the findings that texts are held against.
        writings: who wrote what.
        marked: whether the first text is the others' yardstick: words that they have not in common are marked, and it
            takes the place of a truth that cannot be read.
        reason: for the exam.
    """
    first = writings[0] if marked and writings[0].error is None else None
    grouped: dict[tuple[str, str | None], list[Writing]] = {}
    for writing in writings:
        grouped.setdefault((writing.text, writing.error), []).append(writing)
    texts = []
    for (text, error), of in grouped.items():
        passages = compare_words(first.text if first else text, text) if error is None else []
        known = (first.text if first and first not in of else None) if unreadable(truth) else truth
        verdicts = [] if known is None or error is not None else compare_findings(known, text)
        unsure = sorted((one for one in of[0].sentences if one[1] < _SURE), key=lambda one: one[1])
        texts.append(Text([writing.name for writing in of], error, of[0].score, passages, unsure, verdicts))
    flaws = [([verdict for verdict in text.verdicts if verdict.wrong], len(text.verdicts)) for text in texts]
    wrong, num_findings = max(flaws, key=lambda of: (len(of[0]), of[1]), default=([], 0))
    holds = bool(wrong), len(texts) > 1, any(text.error is not None for text in texts)
    tags = [state for state, held in zip(_STATES, holds, strict=True) if held]
    labels = sorted({verdict.label for of, _ in flaws for verdict in of})
    return Card(name, image, reason, truth, texts, wrong, num_findings, [*tags, *labels])


def with_films(cards: Iterable[Card]) -> Iterator[Card]:
    """Put the films in, small, or what is wrong with them."""
    for index, card in enumerate(cards):
        if not card.image or index >= _MAX_FILMS:
            yield card._replace(film_error=f"The first {_MAX_FILMS} are shown." if card.image else "None is named.")
            continue
        film, error = film_thumbnail(card.image)
        yield card._replace(film=film, film_error=error)


def film_thumbnail(path: str, *, any_film: bool = False) -> tuple[str, str]:
    """Return a film as a data URI, small, or what is wrong with it; `any_film` as in `load_image`."""
    try:
        image = load_image(path, any_film=any_film).image
    except LiteError as error:
        return "", str(error)
    image.thumbnail((_FILM_PX, _FILM_PX))
    written = io.BytesIO()
    image.save(written, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}", ""


def filters(cards: Sequence[Card]) -> list[tuple[str, str, int]]:
    """Return by what cards can be chosen, all first: tag, title, and how many there are."""
    counts = Counter(tag for card in cards for tag in card.tags)
    labels = [label for label, _ in counts.most_common() if label not in _STATES][:_MAX_LABELS]
    titles = _STATES | {label: f"✗ {label}" for label in labels}
    found = [(tag, title, counts[tag]) for tag, title in titles.items() if 0 < counts[tag] < len(cards)]
    return [("", "all", len(cards)), *found] if found else []
