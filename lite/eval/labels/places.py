"""Side, zone and size of a finding, from the words that modify it: "small left effusion", "effusion on the left"."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import cast, get_args

from lite.eval.labels.readings import LABELS, Found, Label, Side, Size, Zone
from lite.eval.labels.vocabulary import SIZE_IN_THE_NAME, WORDS, phrase, table

SIZES: tuple[Size, ...] = get_args(Size)
_WITHOUT_SIDE: frozenset[Label] = frozenset({"Enlarged Cardiomediastinum", "Cardiomegaly", "Edema"})
_WITHOUT_ZONE: frozenset[Label] = _WITHOUT_SIDE | {"Support Devices"}
_IN_THE_LUNG: frozenset[Label] = frozenset(LABELS) - _WITHOUT_SIDE - {"No Finding", "Fracture", "Support Devices"}
_SIDE, _ZONE, _SIZE = table("sides"), table("zones"), table("sizes")
_SIDE_OF_SOMETHING_ELSE, _SIZE_OF_CHANGE = phrase("side_of_something_else"), phrase("size_of_change")


def _sides(text: str) -> set[str]:
    """Collect the sides named in a stretch of text, except those of anatomy and directions."""
    text = _SIDE_OF_SOMETHING_ELSE.sub(lambda match: " " * len(match[0]), text)
    return {side for side, pattern in _SIDE.items() if pattern.search(text)}


def _zones(text: str) -> list[str]:
    return [zone for zone, pattern in _ZONE.items() if pattern.search(text)]


_FROM_TO = re.compile(r"\b(?:from (?:\w+ ){1,2}to|previously \w+,(?: is| are)? now)(\b.*)")
_NOW = re.compile(r"\b(?:now|to|currently)\b(.*)")


def _largest_size(text: str) -> Size | None:
    text = _SIZE_OF_CHANGE.sub(lambda match: " " * len(match[0]), text)
    sizes = [size for size in SIZES if _SIZE[size].search(text)]
    return sizes[-1] if sizes else None


def _new_size(gap: str, behind: str) -> Size | None:
    """Read "has increased to moderate", which outdates the size in front."""
    change = _FROM_TO.search(gap) or _NOW.search(behind)
    return _largest_size(change[1]) if change else None


def last_size(text: str) -> Size | None:
    """Give the size named last: the one nearest to "enlarged"."""
    places = {size: [match.start() for match in _SIZE[size].finditer(text)] for size in SIZES}
    named = [(max(starts), size) for size, starts in places.items() if starts]
    return max(named)[1] if named else None


def union(sides: Iterable[str]) -> Side | None:
    """Put sides together: left and right make bilateral."""
    together = set(sides)
    if "bilateral" in together or together >= {"left", "right"}:
        return "bilateral"
    return cast("Side", together.pop()) if together else None


_SEPARATOR = re.compile(
    r"(,(?: and| or)?|\band/or\b|\band\b|\bor\b|/|\bto\b(?= (?:small|moderate|large|severe|mild|marked)))"
    rf"|(;|\bwith(?:out)?\b|\b{WORDS['thought']}\b)"
)
_MODIFIER_ONLY = re.compile(rf"(?:[\s>,/]|\b{WORDS['modifier']}\b)*")
_PLACE_OPENS = re.compile(rf"\s*{WORDS['place_opener']}\b")
# "In the right lung, there is a mass, and in the left, small nodules"
_PLACE_FIRST = re.compile(r"(?:^|\band)\s*(?:in|on|at|within) [^,]*,[^,]*$")
# "left greater than right", "and trace on the left"
_AND_THE_OTHER = (
    r",?\s*(?:\w+ )?(?:greater|larger|more|>|right and left|left and right)"
    r"|,?\s*and (?:a )?(?:\w+ )?(?:one )?on (?:the )?(?:left|right)\b"
)
# "The left effusion is small; the right is trace."
_OTHER_SIDE = re.compile(
    r"[^,;]{0,60}(?:[,;]|,? (?:and|while))(?: the)? (left|right)(?: one| side)? (?:is|remains?|persists?)\b"
    r"(?! (?:\w+ )?(?:clear|normal|sharp|unremarkable|spared|resolved|gone|not|no|free|absent|decreased to none)\b)"
)
# "and a smaller one at the right base"
_ANOTHER = re.compile(
    rf"(?:\s|\b{WORDS['modifier']}\b)*(?:(?:focus|foci|areas?|ones?|patch|component) )?(?:in|at|on)\b"
)


def _stretches_before(gap: str) -> list[str]:
    """List the modifiers in front of a mention, nearest first, up to where another thought begins."""
    pieces = _SEPARATOR.split(gap)
    # Splitting leaves text, list separator or None, other separator or None, text, ...
    stretches = [pieces[-1]]
    for index in range(len(pieces) - 3, 0, -3):
        if pieces[index] is None or not _MODIFIER_ONLY.fullmatch(pieces[index - 1]):
            break
        stretches.append(pieces[index - 1])
    return stretches


def _stretch_after(gap: str, *, last: bool) -> str:
    """Give the words behind a mention that still speak of it: "in the left base", "is small"."""
    pieces = _SEPARATOR.split(gap)
    texts = pieces[0::3]
    if not last and len(texts) > 1:
        # What stands right before the next mention belongs to that one.
        texts = texts[:-1]
    elif not last and not _PLACE_OPENS.match(gap):
        return ""
    kept = [texts[0]]
    for index in range(1, len(texts)):
        listed, other = pieces[3 * index - 2], pieces[3 * index - 1]
        text = texts[index]
        if _ANOTHER.match(text):
            kept.append((listed or "") + text)
            continue
        if other in ("with", "without", "may", "could", "might", "that", "from", "given", "there", ";"):
            break
        if other is None and not (_PLACE_OPENS.match(text) or _MODIFIER_ONLY.fullmatch(text)):
            break
        kept.append((listed or other or "") + text)
    return " ".join(kept)


def attribute(sentence: str, start: int, end: int, found: list[Found]) -> list[Found]:
    """Give the findings of a clause their side, zone and size from the words around them."""
    described: list[Found] = []
    for index, item in enumerate(found):
        before = max(
            (other.end for other in found[max(0, index - 8) : index] if other.end <= item.start), default=start
        )
        after = next((other.start for other in found[index + 1 :] if other.start >= item.end), end)
        stretches = _stretches_before(sentence[before : item.start])
        stretches[0] += " " + sentence[item.start : item.end]
        front = " ".join(reversed(stretches))
        behind = _stretch_after(sentence[item.end : after], last=after == end)
        sides = _sides(front)
        opening = None if sides else _PLACE_FIRST.search(sentence[before : item.start])
        if opening and (before == start or opening[0].startswith("and")):
            sides = _sides(opening[0])
        side_follows = False
        if not sides or re.match(_AND_THE_OTHER, behind):
            sides |= _sides(behind)
            side_follows = bool(sides)
        if not sides and before == start:
            # "On the right there is an effusion": anything earlier in the clause will do.
            sides = _sides(sentence[start : item.start])
        if len(sides) == 1 and item.status != "negative" and (other := _OTHER_SIDE.match(sentence, item.end)):
            sides |= {other[1]}
        zones = _zones(front) or _zones(behind)
        size = _new_size(sentence[item.end : after], behind) or _largest_size(front) or _largest_size(behind)
        described.append(
            replace(
                item,
                side=None if item.label in _WITHOUT_SIDE else union(sides),
                zone=cast("Zone", zones[0]) if zones and item.label not in _WITHOUT_ZONE else None,
                size=size or cast("Size | None", SIZE_IN_THE_NAME.get(sentence[item.start : item.end])),
                side_follows=side_follows,
            )
        )
    return described


_SAME_PLACE = re.compile(rf"\b{WORDS['same_place']}\b")
_PLAIN_AND = re.compile(
    r" ?,? ?(?:and|and/or|or|/)(?: (?:associated|adjacent|overlying|underlying|compressive|pleural|small"
    r"|moderate|large|mild|tiny|trace|new)){0,2} ?"
)


def share_places(sentence: str, found: list[Found]) -> list[Found]:
    """Let a finding without a place of its own take that of its neighbour: "left base opacity, likely atelectasis"."""
    for index in range(1, len(found)):
        first, second = found[index - 1], found[index]
        gap = sentence[first.end : second.start]
        pair = {first.label, second.label}
        if not (pair <= {*_IN_THE_LUNG, ""} or pair == {"", "Fracture"}) or len(gap) > 90:
            continue
        joined = _PLAIN_AND.fullmatch(gap) is not None
        explains = first.label == "Lung Opacity" and second.status == "uncertain" and gap.endswith(", ")
        if first.side and not second.side and (joined or explains or _SAME_PLACE.search(gap)):
            found[index] = replace(second, side=first.side, zone=second.zone or first.zone)
        elif second.side and not first.side and joined and second.side_follows:
            found[index - 1] = replace(first, side=second.side, zone=first.zone or second.zone)
    return found
