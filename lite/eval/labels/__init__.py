"""CheXpert-14 labels, with side, zone and size, read from the findings text of a radiology report by rules.

    report ──► sentences ──► mentions, in clauses ──► status ──► side, zone, size ──► one reading a label
               sentences.py  mentions.py, scopes.py   scopes.py  places.py            decisions.py

The vocabulary is in `phrases.toml`; `docs/labels.md` has the conventions, those of CheXpert (Irvin et al. 2019), and
how well it reads. Among the mentions of a label positive wins over uncertain, uncertain over negative; none at all is
"absent". No Finding is positive when nothing else but Support Devices is positive or uncertain, abnormalities without a
label of their own (emphysema, scoliosis, a tortuous aorta) included.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

from lite.eval.labels.decisions import decide
from lite.eval.labels.language import unreadable
from lite.eval.labels.mentions import name_findings, read_structures
from lite.eval.labels.places import attribute, share_places
from lite.eval.labels.readings import LABELS, Found, Label, Mention, Reading, Side, Size, Status, Zone
from lite.eval.labels.scopes import FINITE, classify, clauses
from lite.eval.labels.sentences import sentences
from lite.eval.labels.vocabulary import WORDS, phrase

__all__ = [
    "LABELS", "Label", "Mention", "Reading", "Side", "Size", "Status", "Zone", "read_labels", "read_mentions",
    "unreadable",
]  # fmt: skip

_EXTUBATED = phrase("extubated")
_NUMBER = re.compile(r"\(?\d{1,2}[.)]?")
_LEAD = re.compile(rf"(?:there (?:is|are) )?{WORDS['lead']} ?:")
_BETWEEN_ITEMS = re.compile(r"[.,]?(?:;|[ \t\r]*(?:\n|[•▪●◦‣]))[^\w\n]*(?:\d{1,2}[^\w\n]+)?")


def read_mentions(text: str | None) -> list[Mention]:
    """List every mention of a label in a report, in reading order; none in one that is not in English.

    Args:
        text: a findings section, an impression, or a whole report; None counts as empty.
    """
    report = "" if unreadable(text) else text or ""
    return [
        Mention(
            label=found.label,
            status=found.status,
            side=found.side,
            zone=found.zone,
            size=found.size,
            text=report[found.start : found.end],
            start=found.start,
            end=found.end,
        )
        for found in _read_report(report)
        if found.label
    ]


def read_labels(text: str | None) -> dict[Label, Reading]:
    """Read the fourteen labels from a report; one that is not in English has none, not even No Finding.

    Args:
        text: a findings section, an impression, or a whole report; None counts as empty.

    Returns:
        One reading per label, in CheXpert's order. The side is the union over the deciding mentions (left and right
        make bilateral), the size their largest, the zone theirs if they agree on one.
    """
    if unreadable(text) == "not in English":
        return {label: Reading(status="absent") for label in LABELS}
    return decide(list(_read_report(text or "")))


def _read_report(text: str) -> Iterator[Found]:
    """Yield what every sentence says, at positions in the report."""
    lead, previous = "", 0
    for start, end in sentences(text):
        words = list(re.finditer(r"\S+", _plain(text[start:end])))
        normalised = " ".join(word[0] for word in words)
        if not normalised or _NUMBER.fullmatch(normalised):
            continue
        # "No evidence of:" governs the items behind it, each of which is a sentence.
        own = _LEAD.match(normalised)
        between = _BETWEEN_ITEMS.fullmatch(text, previous, start + words[0].start()) if lead else None
        goes_on = between and not FINITE.search(normalised)
        lead = f"{own[0].strip()} " if own else lead if goes_on else ""
        previous, shift = end, 0 if own else len(lead)
        # A sentence is read once however often it returns: "No pleural effusion or pneumothorax" returns a lot.
        found_in_sentence = _read_sentence(normalised if own else lead + normalised)
        if not found_in_sentence:
            continue
        starts = list(accumulate((len(word[0]) + 1 for word in words[:-1]), initial=shift))
        for found in found_in_sentence:
            first, last = bisect_right(starts, found.start) - 1, bisect_right(starts, found.end - 1) - 1
            yield replace(
                found,
                start=start + words[first].start() + found.start - starts[first],
                end=start + words[last].start() + found.end - starts[last],
            )


_PLAIN = str.maketrans(dict.fromkeys("-_‐‑‒–—−\u00a0\u2009\u202f\ufeff", " ") | {"’": "'", "‘": "'", "`": "'"})


def _plain(text: str) -> str:
    """Lower the case and turn hyphens and underscores into spaces, keeping every character's position."""
    lowered = text.lower()
    if len(lowered) != len(text):
        lowered = "".join(character.lower() if len(character.lower()) == 1 else character for character in text)
    return lowered.translate(_PLAIN)


@lru_cache(maxsize=4096)
def _read_sentence(sentence: str) -> tuple[Found, ...]:
    """Read one normalised sentence; positions are within it."""
    named = name_findings(sentence)
    read: list[Found] = []
    for start, end in clauses(sentence):
        clause = sentence[start:end]
        inside = [item for item in named if start <= item.start < end]
        for extubation in _EXTUBATED.finditer(clause):
            span = (extubation.start() + start, extubation.end() + start)
            read.append(Found(label="Support Devices", start=span[0], end=span[1], status="negative"))
        named_here = {(item.label, place) for item in inside for place in range(item.start, item.end)}
        states = [
            state
            for state in read_structures(clause, start)
            if not any((state.label, place) in named_here for place in range(state.start, state.end))
        ]
        if inside:
            read += attribute(sentence, start, end, classify(clause, start, inside))
        read += states
    read.sort(key=lambda item: (item.start, item.end))
    return tuple(share_places(sentence, read))
