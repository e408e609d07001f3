"""The findings that a clause mentions, and whether each is affirmed, denied or doubted.

A mention is a phrase that names a finding, or a piece of anatomy with a state: "the heart is enlarged". The cues around
it decide its status. Reading left to right, "no" opens a denial and "may represent" a doubt, and both reach as far as
the list that they govern; "has resolved" and "cannot be excluded" act backwards, on the subject and what is joined to
it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import cast

from lite.eval.labels.places import last_size
from lite.eval.labels.readings import Found, Label, Size, Status
from lite.eval.labels.sentences import FINITE
from lite.eval.labels.vocabulary import WORDS, cues, phrase, table

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


# --- Status -----------------------------------------------------------------------------------------------------------

_CUE = cues("cues")
_FOLLOWING_CUE = cues("following_cues")
_NEW_ITEM = re.compile(rf"(?P<item>(?:,(?: and)?|\band)(?= {WORDS['descriptor']}\b))|(?P<comma>,)")
_OR = re.compile(r"\b(?:or|nor|and/or|versus|vs)\b")


def _open_cues(clause: str) -> list[tuple[int, str]]:
    """List where denial, doubt and the like begin and end in a clause, as (position, kind)."""
    events = [(match.start(), str(match.lastgroup)) for match in _CUE.finditer(clause)]
    # "No effusion, edema or small pneumothorax" is one list, "no effusion, small pneumothorax" is not.
    events += [
        (item.start(), str(item.lastgroup)) for item in _NEW_ITEM.finditer(clause) if not _OR.search(clause, item.end())
    ]
    return sorted(events)


def classify(clause: str, offset: int, found: list[Found]) -> list[Found]:
    """Give every finding of a clause its status.

    Args:
        clause: the text of the clause.
        offset: where the clause begins in its sentence.
        found: its findings in order, positions in the sentence.
    """
    events = _open_cues(clause)
    classified: list[Found] = []
    state, upcoming = "", 0
    for item in found:
        while upcoming < len(events) and events[upcoming][0] < item.start - offset:
            state = _next_state(state, events[upcoming][1])
            upcoming += 1
        classified.append(replace(item, status=_status_under(state, item.label == "Support Devices")))
    classified = _classify_backwards(clause, offset, classified)
    classified = _doubt_alternatives(clause, offset, classified)
    return [replace(f, status="uncertain") if f.doubtful and f.status == "positive" else f for f in classified]


def _next_state(state: str, event: str) -> str:
    """Follow one cue: what is open after it, given what was open before."""
    if event in ("keep", "stop", "item"):
        return ""
    if event == "setting":
        return "" if state == "deny" else state
    if event == "comma":
        # A denial runs on through a bare list, a doubt or a removal does not.
        return state if state == "deny" else ""
    if event == "doubt" and state in ("deny", "strong_doubt"):
        return state
    return event


def _status_under(state: str, device: bool) -> Status:
    if state in ("deny", "instead") or (state == "removed" and device) or (state == "resolved" and not device):
        return "negative"
    return "uncertain" if state in ("doubt", "strong_doubt") else "positive"


# A tip that is not seen is that of a tube that is there.
_PART_OF_DEVICE = re.compile(r"\b(?:tip|end|course|side ?holes?|side port|portion|position|terminus)\b")


def _classify_backwards(clause: str, offset: int, found: list[Found]) -> list[Found]:
    """Apply cues that follow their finding: "has resolved", "is unlikely", "cannot be excluded"."""
    for cue in _FOLLOWING_CUE.finditer(clause):
        kind = cue.lastgroup
        for index in _subjects(clause, offset, found, cue.start() + offset):
            device = found[index].label == "Support Devices"
            if device and kind == "deny" and _PART_OF_DEVICE.search(clause, 0, cue.start()):
                continue
            if kind == "deny" or (kind == "removed" and device) or (kind in ("resolved", "normal") and not device):
                found[index] = replace(found[index], status="negative")
            elif kind == "doubt" and found[index].status == "positive":
                found[index] = replace(found[index], status="uncertain")
    return found


def _subjects(clause: str, offset: int, found: list[Found], before: int) -> Iterator[int]:
    """Yield the finding in front of a position, and those joined to it by "and" or a list."""
    indices = [index for index, item in enumerate(found) if item.end <= before]
    joined = False
    for index in reversed(indices):
        if index == indices[-1]:
            gap = clause[found[index].end - offset : before - offset]
            if ("," in gap and gap.strip(" ,")) or " with " in gap:
                return
            yield index
            continue
        gap = clause[found[index].end - offset : max(found[index + 1].start, found[index].end) - offset]
        joined = joined or bool(re.search(r"\b(?:and|or|rather than|instead of)\b|/", gap))
        same_words = found[index].end > found[index + 1].start or not gap.strip()
        if not same_words and (not joined or len(gap) > 60 or _APART.search(gap)):
            return
        yield index


_APART = re.compile(
    r"\bwith\b|\bin\b.*,|\b(?:may|might|could|would|likely|represent\w*|reflect\w*)\b|" + FINITE.pattern
)
_ALTERNATIVE = re.compile(r"[^,;]*,? ?\b(?:or|versus|vs|and/or)\b[^,;]*")


def _doubt_alternatives(clause: str, offset: int, found: list[Found]) -> list[Found]:
    """Doubt both of two different findings joined by "or" or "versus"."""
    for index in range(len(found) - 1):
        first, second = found[index], found[index + 1]
        gap = clause[first.end - offset : second.start - offset]
        if (
            first.label != second.label
            and "Support Devices" not in (first.label, second.label)
            and len(gap) <= 60
            and _ALTERNATIVE.fullmatch(gap)
        ):
            for place in (index, index + 1):
                if found[place].status == "positive":
                    found[place] = replace(found[place], status="uncertain")
    return found


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
