"""What a clause mentions: phrases that name a finding, and anatomy with a state, "the heart is enlarged"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import cast

from lite.eval.labels.places import last_size
from lite.eval.labels.readings import Found, Label, Size, Status
from lite.eval.labels.scopes import FINITE
from lite.eval.labels.vocabulary import WORDS, phrase, table

_FINDINGS = [
    (cast("Label", label), doubtful, pattern)
    for doubtful, name in ((False, "findings"), (True, "doubtful_findings"))
    for label, pattern in table(name).items()
]
_EXCLUDED = table("exclusions")
_OTHER = phrase("other_findings")


def _overlaps(start: int, end: int, spans: Iterable[tuple[int, int]]) -> bool:
    return any(start < other_end and other_start < end for other_start, other_end in spans)


def name_findings(sentence: str) -> list[Found]:
    """Find every phrase that names a finding, before asking whether it is there."""
    found: list[Found] = []
    for label, doubtful, pattern in _FINDINGS:
        matches = list(pattern.finditer(sentence))
        if not matches:
            continue
        excluded = [match.span() for match in _EXCLUDED[label].finditer(sentence)] if label in _EXCLUDED else []
        found += [
            Found(label=label, start=match.start(), end=match.end(), doubtful=doubtful)
            for match in matches
            if not _overlaps(*match.span(), excluded)
        ]
    spans = [(item.start, item.end) for item in found]
    found += [
        Found(label="", start=match.start(), end=match.end())
        for match in _OTHER.finditer(sentence)
        if not _overlaps(*match.span(), spans)
    ]
    return sorted(found, key=lambda item: (item.start, item.end))


# --- Structures: "the heart is enlarged", "lungs are clear" -----------------------------------------------------------

_STRUCTURES = {cast("Label", label): pattern for label, pattern in table("structures").items()}
_CLEAR, _ENLARGED, _PROMINENT = phrase("clear"), phrase("enlarged"), phrase("prominent")
_NORMAL, _UNCHANGED = phrase("normal"), phrase("unchanged")
_PLACE_BEFORE = re.compile(phrase("only_a_place").pattern.removesuffix(r"(?!\w)") + r"$")
_BETWEEN_STATE_AND_STRUCTURE = re.compile(rf"(?:[ ,/]|\b{WORDS['between_state_and_structure']}\b)*")
_AFTER_STATE = re.compile(rf"\s*(?:$|[,;:.)/]|{WORDS['after_state']}\b)")
_ADVERBS = re.compile(r"(?:\s|\b(?:\w+ly|again|now|still|at|top|not|no|of|otherwise|or|to|upper|also|in)\b)*")


def _is_said_of(clause: str, structure: re.Match[str], state: re.Match[str]) -> bool:
    """Say whether a state such as "enlarged" is predicated of a structure in the same clause."""
    if state.end() <= structure.start():
        return bool(_BETWEEN_STATE_AND_STRUCTURE.fullmatch(clause, state.end(), structure.start()))
    if state.start() < structure.end() or not _AFTER_STATE.match(clause, state.end()):
        return False
    head, comma, tail = clause[structure.end() : state.start()].rpartition(",")
    if len(head) + len(tail) > 90:
        return False
    return not comma or bool(FINITE.search(tail)) or bool(_ADVERBS.fullmatch(tail))


def _states(clause: str, structure: re.Match[str], pattern: re.Pattern[str]) -> list[re.Match[str]]:
    return [state for state in pattern.finditer(clause) if _is_said_of(clause, structure, state)]


_DENIED_STATE = re.compile(r"\b(?:no|not|without|nor|never|isn't|aren't|rather than)(?: \w+){0,3} ?$")
_DOUBTED_STATE = re.compile(
    r"\b(?:borderline|may|might|could|possib\w+|probab\w+|likely|question\w*|suspect\w*|suggest\w*|perhaps|equivocal\w*"
    r"|top normal (?:to|or)|upper (?:limits of )?normal (?:to|or)|normal (?:to|or))(?: \w+){0,3} ?$"
)


def read_structures(clause: str, offset: int) -> Iterator[Found]:
    """Yield what a clause says of the heart, the mediastinum, the lungs, the pleura and the vessels."""
    for label, pattern in _STRUCTURES.items():
        for structure in pattern.finditer(clause):
            if _PLACE_BEFORE.search(clause, 0, structure.start()):
                continue
            found = Found(label=label, start=structure.start() + offset, end=structure.end() + offset)
            if label not in ("Cardiomegaly", "Enlarged Cardiomediastinum"):
                clear = _states(clause, structure, _CLEAR)
                if clear and not all(_DENIED_STATE.search(clause, 0, state.start()) for state in clear):
                    yield replace(found, status="negative")
                continue
            status, size = _heart_state(clause, structure)
            if status:
                yield replace(found, status=status, size=size)


def _heart_state(clause: str, structure: re.Match[str]) -> tuple[Status | None, Size | None]:
    """Decide what is said of the size of the heart or the mediastinum, and how much."""
    enlarged = _states(clause, structure, _ENLARGED)
    for state in enlarged:
        before = clause[max(0, state.start() - 40) : state.start()]
        if _DENIED_STATE.search(before):
            return "negative", None
        if _DOUBTED_STATE.search(before):
            return "uncertain", last_size(before)
    if enlarged:
        return "positive", last_size(clause[max(0, enlarged[0].start() - 30) : enlarged[0].start()])
    if _states(clause, structure, _PROMINENT):
        return "uncertain", None
    normal = _states(clause, structure, _NORMAL)
    if normal:
        denied = _DENIED_STATE.search(clause, 0, normal[0].start()) and not normal[0][0].startswith("no")
        return ("uncertain" if denied else "negative"), None
    if _states(clause, structure, _UNCHANGED):
        return "uncertain", None
    return None, None
