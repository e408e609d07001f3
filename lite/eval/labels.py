"""CheXpert-14 labels, with side, zone and size, read from the findings text of a radiology report by rules.

The pipeline, one short function per arrow (the vocabulary is in `label_phrases.py`):

    report ──► sections ──► sentences ──► clauses ──► mentions ──► status ──► side, zone, size ──► one reading a label

1. Sections that say why or how the exam was done (indication, technique, comparison) are left out.
2. A sentence is cut into clauses wherever a new assertion begins: after "but", "except for", and at a comma, "and" or
   "with" that has a predicate of its own on both sides. Nothing said in one clause denies anything in another.
3. A mention is a phrase that names a finding, or a piece of anatomy with a state: "the heart is enlarged".
4. Its status comes from the cues around it. Reading left to right, "no" opens a denial and "may represent" a doubt, and
   both reach as far as the list that they govern; "has resolved" and "cannot be excluded" act backwards, on the
   subject and what is joined to it. "No change in" only looks like a denial.
5. Side, zone and size come from the words that modify the mention: "small left effusion", "effusion on the left".

Conventions are those of CheXpert (Irvin et al. 2019) where that paper, its rules or its annotators' directions say
something. What may surprise:

* Among the mentions of a label positive wins over uncertain, uncertain over negative; none at all is "absent".
* Labels are mention-based: no label implies its parent. "Opacity, possibly pneumonia" is Lung Opacity positive and
  Pneumonia uncertain; a consolidation alone is no Lung Opacity.
* A normal heart or mediastinum is a negative mention; one that is only "stable", "unchanged", borderline, prominent or
  obscured is uncertain. "Cardiac and mediastinal contours" speaks of both labels, "cardiomediastinal silhouette" of
  Enlarged Cardiomediastinum alone.
* Clear lungs are Lung Opacity negative, sharp costophrenic angles Pleural Effusion negative, blunted ones uncertain,
  normal vessels Edema negative, congested ones uncertain. Heart failure is Edema positive and Cardiomegaly uncertain.
* "No new X", "X or Y" outside a denial, "X versus Y" and "likely X" are uncertain; "consistent with X" is positive,
  "X is unlikely" negative. "No acute osseous abnormality" does not mention fractures.
* No Finding is positive when nothing else but Support Devices is positive or uncertain, abnormalities without a label
  of their own (emphysema, scoliosis, calcification) included; otherwise it is absent.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from typing import Literal, cast, get_args

from lite.eval import label_phrases as phrases

Label = Literal[
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Lesion",
    "Lung Opacity",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
]
Side = Literal["left", "right", "bilateral"]
Zone = Literal["upper", "mid", "lower"]
Size = Literal["small", "moderate", "large"]
Status = Literal["positive", "negative", "uncertain", "absent"]

LABELS: tuple[Label, ...] = get_args(Label)
"""The fourteen labels in CheXpert's order."""

_SIZE_ORDER: tuple[Size, ...] = get_args(Size)
_STATUS_ORDER: tuple[Status, ...] = ("positive", "uncertain", "negative")
_WITHOUT_SIDE: frozenset[Label] = frozenset({"Enlarged Cardiomediastinum", "Cardiomegaly", "Edema"})
_WITHOUT_ZONE: frozenset[Label] = _WITHOUT_SIDE | {"Support Devices"}
_IN_THE_LUNG: frozenset[Label] = frozenset(
    {
        "Lung Lesion",
        "Lung Opacity",
        "Consolidation",
        "Pneumonia",
        "Atelectasis",
        "Pleural Effusion",
        "Pneumothorax",
        "Pleural Other",
    }
)
# Longer runs without a full stop are cut, which bounds the work on text that is no report.
_LONGEST_SENTENCE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Mention:
    """One place where a report speaks of a label: `text` is the report's own words, `report[start:end]`."""

    label: Label
    status: Status
    side: Side | None = None
    zone: Zone | None = None
    size: Size | None = None
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a whole report says of one label. Attributes belong to the mentions that decided the status."""

    status: Status
    side: Side | None = None
    zone: Zone | None = None
    size: Size | None = None


def read_mentions(text: str | None) -> list[Mention]:
    """List every mention of a label in a report, in reading order.

    Args:
        text: a findings section, an impression, or a whole report; None counts as empty.
    """
    report = text or ""
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
    """Read the fourteen labels from a report.

    Args:
        text: a findings section, an impression, or a whole report; None counts as empty.

    Returns:
        One reading per label, in CheXpert's order. The side is the union over the deciding mentions (left and right
        make bilateral), the size their largest, the zone theirs if they agree on one.
    """
    found = list(_read_report(text or ""))
    readings = {label: _aggregate([mention for mention in found if mention.label == label]) for label in LABELS}
    abnormal = any(f.status in ("positive", "uncertain") and f.label != "Support Devices" for f in found)
    readings["No Finding"] = Reading(status="absent" if abnormal else "positive")
    return readings


def to_chexpert(readings: dict[Label, Reading]) -> dict[Label, float | None]:
    """Convert readings to the cells of CheXpert's csv: 1 positive, 0 negative, -1 uncertain, None for a blank."""
    cells: dict[Status, float | None] = {"positive": 1.0, "negative": 0.0, "uncertain": -1.0, "absent": None}
    return {label: cells[readings[label].status] for label in LABELS}


# --- From report to sentences -----------------------------------------------------------------------------------------

# Fields that ask a question or describe the exam; what they mention is not on the film.
_HEADING = re.compile(
    r"(?:^|(?<=[.\n;:]))[ \t\r]*(?:"
    r"(?P<skip>indications?|(?:clinical |patient |relevant )?history(?: of present illness)?|clinical (?:information"
    r"|indication|data|question|details|statement)|reason for (?:the )?(?:exam(?:ination)?|study|request)|techniques?"
    r"|comparisons?|exam(?:ination)?|procedure|study|views?|type of exam|order|notifications?|recommendations?|date)"
    r"|(?P<read>findings(?: and impression| ?/ ?impression)?|impressions?|conclusions?|opinion|report|final report"
    r"|wet read"
    r"|interpretation|summary|addendum|chest(?: [\w ,]{0,40})?))[ \t\r]*:",
    re.IGNORECASE | re.MULTILINE,
)
_NOT_SPACE = re.compile(r"\S")
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")
_SENTENCE_END = re.compile(r"[.?]\s")
_ABBREVIATION = re.compile(
    r"(?:\b(?:dr|drs|mr|mrs|ms|vs|approx|no|nos|fig|st|cf|ca|resp|prob|incl|excl|esp|dept|pt|prev|lat|temp|ant|post|inf"
    r"|sup|etc|e\.g|i\.e|a\.m|p\.m|\w\.\w|[a-z])|\d)$",
    re.IGNORECASE,
)
_STOP = re.compile(
    r"[.!?]+(?=[\s\"')\]]|$)|(?<=[a-z]{3})\.(?=[A-Z])|;|\n[ \t\r]*\n|\n(?=[ \t\r]*(?:\d{1,2}[.)]|[-*•–]) )|\n"
)


def _read_report(text: str) -> Iterator[_Found]:
    """Yield what every sentence says, at positions in the report."""
    for start, end in _sentences(text):
        words = list(re.finditer(r"\S+", _plain(text[start:end])))
        normalised = " ".join(word[0] for word in words)
        # A sentence is read once however often it returns: "No pleural effusion or pneumothorax" returns a lot.
        found_in_sentence = _read_sentence(normalised)
        if not found_in_sentence:
            continue
        starts: list[int] = []
        position = 0
        for word in words:
            starts.append(position)
            position += len(word[0]) + 1
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


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of each sentence in the sections that describe the film."""
    for section_start, section_end in _sections(text):
        start = section_start
        for stop in _STOP.finditer(text, section_start, section_end):
            if _ends_sentence(text, start, stop):
                yield from _pieces(start, stop.start())
                start = stop.end()
        yield from _pieces(start, section_end)


def _sections(text: str) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of the text after each heading worth reading, and of text under no heading."""
    start = 0
    headings = list(_HEADING.finditer(text))
    for heading, following in zip_longest(headings, headings[1:]):
        if heading is None:
            continue
        yield start, max(start, heading.start())
        start = heading.end()
        if heading["skip"]:
            start = _end_of_skipped(text, start, following.start() if following else None)
    yield start, len(text)


def _end_of_skipped(text: str, start: int, following: int | None) -> int:
    """Find where an unwanted section ends: at the next heading, after a paragraph, or else after a sentence."""
    end = len(text) if following is None else following
    first = _NOT_SPACE.search(text, start, end)
    if first is None:
        return end
    blank_line = _BLANK_LINE.search(text, first.start(), end)
    if blank_line:
        return blank_line.end()
    if following is not None:
        return end
    sentence = _SENTENCE_END.search(text, first.start(), end)
    return sentence.end() if sentence else end


def _ends_sentence(text: str, start: int, stop: re.Match[str]) -> bool:
    """Tell a full stop from an abbreviation's, and the end of a line from mere wrapping."""
    mark = stop[0]
    if mark == "\n":
        # Wrapped lines are long, or go on in lower case; lists of statements are short and start anew.
        line_start = text.rfind("\n", start, stop.start()) + 1
        following = text[stop.end() : stop.end() + 20].lstrip()[:1]
        return 0 < stop.start() - max(line_start, start) < 45 and following.isupper()
    if mark[0] == "?":
        # "? small effusion" asks about what follows.
        return start < stop.start() and not text[stop.start() - 1].isspace()
    if mark != ".":
        return True
    before = text[max(start, stop.start() - 12) : stop.start()]
    after = text[stop.end() : stop.end() + 3].lstrip()[:1]
    if not _ABBREVIATION.search(before):
        return True
    # A number may end a sentence ("3.4 cm" has no space); a number that opens one is an item of a list.
    return before[-1:].isdigit() and (after.isupper() or not after)


def _pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    for piece in range(start, end, _LONGEST_SENTENCE):
        yield piece, min(end, piece + _LONGEST_SENTENCE)


# --- From sentence to clauses -----------------------------------------------------------------------------------------

_JOINT = re.compile(r",(?: and| or| with)?(?= )|\band\b|\bwith\b")
_DENIAL_OPENS = re.compile(r"\s*(?:there (?:is|are) )?(?:no|not|without)\b")
# "Opacity in the left base, right lung is clear."
_COMPLETE_WITHOUT_VERB = re.compile(r"\s*(?!in\b|on\b|at\b|as\b|since\b|compared\b|after\b|within\b).*\b(?:in|at|on)\b")
_PREDICATE_ONLY = re.compile(
    r"\s*(?:(?:is|are|was|were|has|have|remains?|appears?|cannot|ends?|terminates?|extends?|projects?)\b"
    r"|(?:\w+ly )*(?:normal|enlarged|stable|unchanged|clear|intact|unremarkable|widened|resolved|removed|in place"
    r"|in situ)"
    r"(?: (?:in|from|compared|since|given|with|on|for|at|by|to)\b.*)?\s*$)"
)


def _clauses(sentence: str) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of every clause, so that each holds about one assertion."""
    start = 0
    for hard in [*phrases.HARD_BREAK.finditer(sentence), None]:
        end = hard.start() if hard else len(sentence)
        yield from _soft_clauses(sentence, start, end)
        start = hard.end() if hard else end


def _soft_clauses(sentence: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    joints = [*_JOINT.finditer(sentence, start, end)]
    previous: re.Match[str] | None = None
    for joint, after in zip_longest(joints, joints[1:]):
        chunk = sentence[joint.end() : after.start() if after else end]
        said = sentence[start : joint.start()]
        cut: re.Match[str] | None = None
        if (
            _DENIAL_OPENS.match(chunk)
            or (_has_predicate(said) and _has_predicate(chunk) and not _PREDICATE_ONLY.match(chunk))
            or (joint[0] == "," and phrases.FINITE.search(chunk) and _COMPLETE_WITHOUT_VERB.match(said))
        ):
            cut = joint
            # "Lungs are clear, heart and mediastinum are normal": the plural verb has two subjects.
            if (
                previous
                and joint[0] == "and"
                and re.match(r"\s*\w+(?: \w+){0,3} (?:are|were|have|remain|appear)\b", chunk)
                and not _has_predicate(sentence[previous.end() : joint.start()])
                and _has_predicate(sentence[start : previous.start()])
            ):
                cut = previous
        if cut:
            yield start, cut.start()
            start, previous = cut.end(), joint if cut is previous else None
        else:
            previous = joint
    if start < end:
        yield start, end


def _has_predicate(text: str) -> bool:
    return bool(phrases.FINITE.search(text) or phrases.ADJECTIVE.search(text))


# --- From clause to mentions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A mention while it is being worked out; `label` is "" for an abnormality that has no label."""

    label: Label | Literal[""]
    start: int
    end: int
    status: Status = "positive"
    doubtful: bool = False  # affirmed, it is still only uncertain
    side: Side | None = None
    zone: Zone | None = None
    size: Size | None = None
    side_follows: bool = False  # "effusions at the left base"


_FINDINGS = [
    (cast("Label", label), doubtful, phrases.compile_phrases(*table[label]))
    for doubtful, table in ((False, phrases.FINDINGS), (True, phrases.DOUBTFUL_FINDINGS))
    for label in table
]
_EXCLUDED = {
    cast("Label", label): phrases.compile_phrases(*words) for label, words in phrases.EXCLUSIONS.items() if words
}
_OTHER = phrases.compile_phrases(*phrases.OTHER_FINDINGS)
_STRUCTURES = {cast("Label", label): phrases.compile_phrases(*words) for label, words in phrases.STRUCTURES.items()}


def _overlaps(start: int, end: int, spans: Iterable[tuple[int, int]]) -> bool:
    return any(start < other_end and other_start < end for other_start, other_end in spans)


def _name_findings(sentence: str) -> list[_Found]:
    """Find every phrase that names a finding, before asking whether it is there."""
    found: list[_Found] = []
    for label, doubtful, pattern in _FINDINGS:
        matches = list(pattern.finditer(sentence))
        if not matches:
            continue
        excluded = [match.span() for match in _EXCLUDED[label].finditer(sentence)] if label in _EXCLUDED else []
        found += [
            _Found(label=label, start=match.start(), end=match.end(), doubtful=doubtful)
            for match in matches
            if not _overlaps(*match.span(), excluded)
        ]
    spans = [(item.start, item.end) for item in found]
    found += [
        _Found(label="", start=match.start(), end=match.end())
        for match in _OTHER.finditer(sentence)
        if not _overlaps(*match.span(), spans)
    ]
    return sorted(found, key=lambda item: (item.start, item.end))


# --- Status -----------------------------------------------------------------------------------------------------------


def _compile_cues(table: dict[str, tuple[str, ...]]) -> re.Pattern[str]:
    groups = (f"(?P<{kind.replace(' ', '_')}>{'|'.join(words)})" for kind, words in table.items())
    return re.compile(r"(?:(?<!\w)|(?=:))(?:" + "|".join(groups) + r")(?:(?!\w)|(?<=\?))")


_CUE = _compile_cues(phrases.CUES)
_FOLLOWING_CUE = _compile_cues(phrases.FOLLOWING_CUES)
_NEW_ITEM = re.compile(rf"(?P<item>(?:,(?: and)?|\band)(?= {phrases.DESCRIPTOR}\b))|(?P<comma>,)")
_OR = re.compile(r"\b(?:or|nor|and/or|versus|vs)\b")


def _open_cues(clause: str) -> list[tuple[int, str]]:
    """List where denial, doubt and the like begin and end in a clause, as (position, kind)."""
    events = [(match.start(), str(match.lastgroup)) for match in _CUE.finditer(clause)]
    # "No effusion, edema or small pneumothorax" is one list, "no effusion, small pneumothorax" is not.
    events += [
        (item.start(), str(item.lastgroup)) for item in _NEW_ITEM.finditer(clause) if not _OR.search(clause, item.end())
    ]
    return sorted(events)


def _classify(clause: str, offset: int, found: list[_Found]) -> list[_Found]:
    """Give every finding of a clause its status.

    Args:
        clause: the text of the clause.
        offset: where the clause begins in its sentence.
        found: its findings in order, positions in the sentence.
    """
    events = _open_cues(clause)
    classified: list[_Found] = []
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


def _classify_backwards(clause: str, offset: int, found: list[_Found]) -> list[_Found]:
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


def _subjects(clause: str, offset: int, found: list[_Found], before: int) -> Iterator[int]:
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
    r"\bwith\b|\bin\b.*,|\b(?:may|might|could|would|likely|represent\w*|reflect\w*)\b|" + phrases.FINITE.pattern
)
_ALTERNATIVE = re.compile(r"[^,;]*,? ?\b(?:or|versus|vs|and/or)\b[^,;]*")


def _doubt_alternatives(clause: str, offset: int, found: list[_Found]) -> list[_Found]:
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

_PLACE_BEFORE = re.compile(phrases.STRUCTURE_IS_ONLY_A_PLACE.pattern.removesuffix(r"(?!\w)") + r"$")
_BETWEEN_STATE_AND_STRUCTURE = re.compile(
    r"(?:[ ,/]|\b(?:appearing|appearance|of|in|the|and|size|sized|cardiac|mediastinal|hilar|heart|pulmonary|superior"
    r"|upper"
    r"|overall|configuration|postoperative|postsurgical|hila|mediastinum|pleural?|surfaces|bones|aorta|contours?"
    r"|silhouettes?"
    r"|vess\w+|vascul\w+|trachea|structures|is|both|left|right|for|within|stable|unchanged|mildly|top|lungs?|very"
    r"|grossly|contour|upper)\b)*"
)
_AFTER_STATE = re.compile(
    r"\s*(?:$|[,;:.)/]|(?:in|for|from|at|given|and|but|or|size|sized|with|without|compared|since|by|on|as|due|to"
    r"|despite|which"
    r"|limits?|range|configuration|contours?|calib\w+|appearance|bilaterally|throughout|again|today|allowing|accounting"
    r"|status|when|though|this|even|also|silhouette|of|cardiac|heart|than|may|is|are|accentuated|side|aside|overall)\b)"
)
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
    return not comma or bool(phrases.FINITE.search(tail)) or bool(_ADVERBS.fullmatch(tail))


def _states(clause: str, structure: re.Match[str], pattern: re.Pattern[str]) -> list[re.Match[str]]:
    return [state for state in pattern.finditer(clause) if _is_said_of(clause, structure, state)]


_DENIED_STATE = re.compile(r"\b(?:no|not|without|nor|never|isn't|aren't|rather than)(?: \w+){0,3} ?$")
_DOUBTED_STATE = re.compile(
    r"\b(?:borderline|may|might|could|possib\w+|probab\w+|likely|question\w*|suspect\w*|suggest\w*|perhaps|equivocal\w*"
    r"|top normal (?:to|or)|upper (?:limits of )?normal (?:to|or)|normal (?:to|or))(?: \w+){0,3} ?$"
)


def _read_structures(clause: str, offset: int) -> Iterator[_Found]:
    """Yield what a clause says of the heart, the mediastinum, the lungs, the pleura and the vessels."""
    for label, pattern in _STRUCTURES.items():
        for structure in pattern.finditer(clause):
            if _PLACE_BEFORE.search(clause, 0, structure.start()):
                continue
            found = _Found(label=label, start=structure.start() + offset, end=structure.end() + offset)
            if label not in ("Cardiomegaly", "Enlarged Cardiomediastinum"):
                clear = _states(clause, structure, phrases.CLEAR)
                if clear and not all(_DENIED_STATE.search(clause, 0, state.start()) for state in clear):
                    yield replace(found, status="negative")
                continue
            status, size = _heart_state(clause, structure)
            if status:
                yield replace(found, status=status, size=size)


def _heart_state(clause: str, structure: re.Match[str]) -> tuple[Status | None, Size | None]:
    """Decide what is said of the size of the heart or the mediastinum, and how much."""
    enlarged = _states(clause, structure, phrases.ENLARGED)
    for state in enlarged:
        before = clause[max(0, state.start() - 40) : state.start()]
        if _DENIED_STATE.search(before):
            return "negative", None
        if _DOUBTED_STATE.search(before):
            return "uncertain", _last_size(before)
    if enlarged:
        return "positive", _last_size(clause[max(0, enlarged[0].start() - 30) : enlarged[0].start()])
    if _states(clause, structure, phrases.PROMINENT):
        return "uncertain", None
    normal = _states(clause, structure, phrases.NORMAL)
    if normal:
        denied = _DENIED_STATE.search(clause, 0, normal[0].start()) and not normal[0][0].startswith("no")
        return ("uncertain" if denied else "negative"), None
    if _states(clause, structure, phrases.UNCHANGED):
        return "uncertain", None
    return None, None


# --- Side, zone and size ----------------------------------------------------------------------------------------------

_SIDE = {side: phrases.compile_phrases(*words) for side, words in phrases.SIDES.items()}
_ZONE = {zone: phrases.compile_phrases(*words) for zone, words in phrases.ZONES.items()}
_SIZE = {size: phrases.compile_phrases(*words) for size, words in phrases.SIZES.items()}


def _sides(text: str) -> set[str]:
    """Collect the sides named in a stretch of text, except those of anatomy and directions."""
    text = phrases.SIDE_OF_SOMETHING_ELSE.sub(lambda match: " " * len(match[0]), text)
    return {side for side, pattern in _SIDE.items() if pattern.search(text)}


def _zones(text: str) -> list[str]:
    return [zone for zone, pattern in _ZONE.items() if pattern.search(text)]


_NOW = re.compile(r"\b(?:now|to|currently)\b(.*)")


def _largest_size(text: str) -> Size | None:
    text = phrases.SIZE_OF_CHANGE.sub(lambda match: " " * len(match[0]), text)
    sizes = [size for size in _SIZE_ORDER if _SIZE[size].search(text)]
    return sizes[-1] if sizes else None


def _new_size(behind: str) -> Size | None:
    """Read "has increased to moderate", which outdates the size in front."""
    change = _NOW.search(behind)
    return _largest_size(change[1]) if change else None


def _last_size(text: str) -> Size | None:
    """Give the size named last: the one nearest to "enlarged"."""
    places = {size: [match.start() for match in _SIZE[size].finditer(text)] for size in _SIZE_ORDER}
    named = [(max(starts), size) for size, starts in places.items() if starts]
    return max(named)[1] if named else None


def _union(sides: Iterable[str]) -> Side | None:
    together = set(sides)
    if "bilateral" in together or together >= {"left", "right"}:
        return "bilateral"
    return cast("Side", together.pop()) if together else None


_SEPARATOR = re.compile(
    r"(,(?: and| or)?|\band/or\b|\band\b|\bor\b|/|\bto\b(?= (?:small|moderate|large|severe|mild|marked)))"
    r"|(;|\bwith(?:out)?\b|\b(?:is|are|was|were|has|have|remains?|appears?|there|may|could|might|likely|represent\w*"
    r"|reflect\w*"
    r"|suggest\w*|versus|vs|due|secondary|consistent|compatible|concerning|suspicious|which|that|showing|shows"
    r"|demonstrat\w+|from|obscur\w+|given|superimposed|adjacent|related)\b)"
)
_MODIFIER_ONLY = re.compile(
    r"(?:[\s>,/]|\b(?:a|an|the|small|tiny|trace|minimal|mild|mildly|moderate|moderately|large|severe|marked|slight"
    r"|massive"
    r"|left|right|bilateral|both|upper|lower|mid|middle|lobes?|lungs?|base|bases|basal|basilar|bibasilar|apical|apex"
    r"|zones?|side|sided|pleural|greater|than|more|less|perihilar|retrocardiac|new|stable|unchanged|persistent"
    r"|loculated"
    r"|layering|patchy|hazy|linear|focal|old|acute|healed|displaced|nondisplaced|probable|possible|likely|residual"
    r"|again"
    r"|increasing|increased|decreasing|decreased|improving|multifocal|diffuse|dense|subtle|partial|also|sized|size"
    r"|field"
    r"|lateral|medial|anterior|posterior|hilar|r|l|lul|lll|rul|rml|rll|rib|ribs|subsegmental|plate|like|known)\b)*"
)
_PLACE_OPENS = re.compile(
    r"\s*(?:in|at|on|within|involving|throughout|along|along|over|near|of|especially|particularly|predominantly"
    r"|mainly|mostly"
    r"|most|more|greater|larger|worse|worst|left|right|both|bilaterally|bilateral|small|moderate|large|tiny|mild"
    r"|minimal"
    r"|severe|is|are|now|again|to|from|seen|noted|present|identified|also|increased|decreased|unchanged|stable"
    r"|in the)\b"
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
        if other in ("with", "without", "may", "could", "might", "that", "from", "given", "there", ";"):
            break
        if other is None and not (_PLACE_OPENS.match(text) or _MODIFIER_ONLY.fullmatch(text)):
            break
        kept.append((listed or other or "") + text)
    return " ".join(kept)


def _attribute(sentence: str, start: int, end: int, found: list[_Found]) -> list[_Found]:
    """Give the findings of a clause their side, zone and size from the words around them."""
    described: list[_Found] = []
    for index, item in enumerate(found):
        before = max([start, *(other.end for other in found[:index] if other.end <= item.start)])
        after = min([end, *(other.start for other in found[index + 1 :] if other.start >= item.end)])
        stretches = _stretches_before(sentence[before : item.start])
        stretches[0] += " " + sentence[item.start : item.end]
        front = " ".join(reversed(stretches))
        behind = _stretch_after(sentence[item.end : after], last=after == end)
        sides = _sides(front)
        side_follows = False
        if not sides or re.match(r",?\s*(?:\w+ )?(?:greater|larger|more|>|right and left|left and right)", behind):
            sides |= _sides(behind)
            side_follows = bool(sides)
        if not sides and before == start:
            # "On the right there is an effusion": anything earlier in the clause will do.
            sides = _sides(sentence[start : item.start])
        zones = _zones(front) or _zones(behind)
        size = _new_size(behind) or _largest_size(front) or _largest_size(behind)
        described.append(
            replace(
                item,
                side=None if item.label in _WITHOUT_SIDE else _union(sides),
                zone=cast("Zone", zones[0]) if zones and item.label not in _WITHOUT_ZONE else None,
                size=size or _size_in_name(sentence[item.start : item.end]),
                side_follows=side_follows,
            )
        )
    return described


def _size_in_name(name: str) -> Size | None:
    """Read "nodule" as small and "mass" as large where nothing else is said."""
    return cast("Size | None", phrases.SIZE_IN_THE_NAME.get(name))


_SAME_PLACE = re.compile(
    r"\b(?:represent\w*|reflect\w*|compatible|consistent|likely|possib\w+|probab\w+|due to|suggest\w*|may be|could be"
    r"|concerning|worrisome|suspicious|versus|vs|or|associated|adjacent|overlying|underlying|accompanying|compressive"
    r"|secondary|related)\b"
)
_PLAIN_AND = re.compile(
    r" ?,? ?(?:and|and/or|or|/)(?: (?:associated|adjacent|overlying|underlying|compressive|pleural|small"
    r"|moderate|large|mild|tiny|trace|new)){0,2} ?"
)


def _share_places(sentence: str, found: list[_Found]) -> list[_Found]:
    """Let a finding without a place of its own take that of its neighbour: "left base opacity, likely atelectasis"."""
    for index in range(1, len(found)):
        first, second = found[index - 1], found[index]
        gap = sentence[first.end : second.start]
        pair = {first.label, second.label}
        if not (pair <= _IN_THE_LUNG or pair == {"", "Fracture"}) or len(gap) > 90:
            continue
        joined = _PLAIN_AND.fullmatch(gap) is not None
        if first.side and not second.side and (joined or _SAME_PLACE.search(gap)):
            found[index] = replace(second, side=first.side, zone=second.zone or first.zone)
        elif second.side and not first.side and joined and second.side_follows:
            found[index - 1] = replace(first, side=second.side, zone=first.zone or second.zone)
    return found


# --- Sentence and report ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _read_sentence(sentence: str) -> tuple[_Found, ...]:
    """Read one normalised sentence; positions are within it."""
    named = _name_findings(sentence)
    read: list[_Found] = []
    for start, end in _clauses(sentence):
        clause = sentence[start:end]
        inside = [item for item in named if start <= item.start < end]
        for extubation in phrases.EXTUBATED.finditer(clause):
            span = (extubation.start() + start, extubation.end() + start)
            read.append(_Found(label="Support Devices", start=span[0], end=span[1], status="negative"))
        named_here = {(item.label, place) for item in inside for place in range(item.start, item.end)}
        states = [
            state
            for state in _read_structures(clause, start)
            if not any((state.label, place) in named_here for place in range(state.start, state.end))
        ]
        if inside:
            read += _attribute(sentence, start, end, _classify(clause, start, inside))
        read += states
    read.sort(key=lambda item: (item.start, item.end))
    return tuple(_share_places(sentence, read))


def _aggregate(found: list[_Found]) -> Reading:
    """Make one reading of a label's mentions: positive wins over uncertain, uncertain over negative."""
    for status in _STATUS_ORDER:
        deciding = [mention for mention in found if mention.status == status]
        if not deciding:
            continue
        if status == "negative":
            return Reading(status=status)
        zones = {mention.zone for mention in deciding if mention.zone}
        sizes = [mention.size for mention in deciding if mention.size]
        return Reading(
            status=status,
            side=_union(mention.side for mention in deciding if mention.side),
            zone=zones.pop() if len(zones) == 1 else None,
            size=max(sizes, key=_SIZE_ORDER.index) if sizes else None,
        )
    return Reading(status="absent")
