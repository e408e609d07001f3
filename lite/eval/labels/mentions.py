"""What a clause mentions: phrases that name a finding, and anatomy with a state, "the heart is enlarged"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias, cast

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
_STATES = {name: phrase(name) for name in ("clear", "enlarged", "prominent", "normal", "unchanged")}
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


_DENIED_STATE = re.compile(r"\b(?:no|not|without|n?either|nor|never|isn't|aren't|rather than)(?: \w+){0,3} ?$")
_DOUBTED_STATE = re.compile(
    r"\b(?:borderline|may|might|could|possib\w+|probab\w+|likely|question\w*|suspect\w*|suggest\w*|perhaps|equivocal\w*"
    r"|top normal (?:to|or)|upper (?:limits of )?normal (?:to|or)|normal (?:to|or))(?: \w+){0,3} ?$"
)


def read_structures(clause: str, offset: int) -> Iterator[Found]:
    """Yield what a clause says of the heart, the mediastinum, the lungs, the pleura and the vessels."""
    structures = [(label, match) for label, pattern in _STRUCTURES.items() for match in pattern.finditer(clause)]
    named = {name: list(pattern.finditer(clause)) for name, pattern in _STATES.items()} if structures else {}
    for label, structure in structures:
        if _PLACE_BEFORE.search(clause, max(0, structure.start() - 80), structure.start()):
            continue
        states = {
            name: [state for state in matches if _is_said_of(clause, structure, state)]
            for name, matches in named.items()
        }
        of_heart = label in ("Cardiomegaly", "Enlarged Cardiomediastinum")
        status, size = _heart_state(clause, states) if of_heart else (_lung_state(clause, label, states), None)
        if status:
            start, end = structure.start() + offset, structure.end() + offset
            unchanged = of_heart and not any(states[name] for name in ("enlarged", "prominent", "normal"))
            yield Found(label=label, start=start, end=end, status=status, size=size, unchanged=unchanged)


_States: TypeAlias = Mapping[str, list[re.Match[str]]]


def _is_denied(clause: str, state: re.Match[str]) -> bool:
    return bool(_DENIED_STATE.search(clause, max(0, state.start() - 40), state.start()))


def _lung_state(clause: str, label: Label, states: _States) -> Status | None:
    """Decide whether lungs, pleura or vessels are said to be clear, or vessels not to be wide."""
    clear = states["clear"]
    if clear and not all(_is_denied(clause, state) for state in clear):
        return "negative"
    wide = [*states["enlarged"], *states["prominent"]] if label == "Edema" else []
    return "negative" if wide and all(_is_denied(clause, state) for state in wide) else None


def _heart_state(clause: str, states: _States) -> tuple[Status | None, Size | None]:
    """Decide what is said of the size of the heart or the mediastinum, and how much."""
    enlarged, normal = states["enlarged"], states["normal"]
    for state in enlarged:
        before = clause[max(0, state.start() - 40) : state.start()]
        if _is_denied(clause, state):
            return "negative", None
        if _DOUBTED_STATE.search(before):
            return "uncertain", last_size(before)
    if enlarged:
        return "positive", last_size(clause[max(0, enlarged[0].start() - 30) : enlarged[0].start()])
    if states["prominent"]:
        return "uncertain", None
    if normal:
        denied = _is_denied(clause, normal[0]) and not normal[0][0].startswith("no")
        return ("uncertain" if denied else "negative"), None
    return ("uncertain" if states["unchanged"] else None), None
