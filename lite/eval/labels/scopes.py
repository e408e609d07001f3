"""How far words reach: a sentence is cut into clauses, and in a clause cues affirm, deny or doubt its findings.

Reading left to right, "no" opens a denial and "may represent" a doubt, and both reach as far as the list that they
govern; "has resolved" and "cannot be excluded" act backwards, on the subject and what is joined to it. What stands
after "history of", "sensitive for" or "if there is concern for" is not on the film.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest

from lite.eval.labels.readings import Found, Status
from lite.eval.labels.vocabulary import WORDS, cues

# --- Clauses ----------------------------------------------------------------------------------------------------------

FINITE = re.compile(rf"(?<!that )(?<!which )(?<!who )(?<!as )\b{WORDS['finite']}\b|\bthere['’]s\b")
_ADJECTIVE = re.compile(rf"\b{WORDS['adjective']}\b")
# Words after which a new assertion begins.
_HARD_BREAK = re.compile(
    r"\b(?:but(?! (?:persists?|remains?|is new|are new)\b)(?!(?: \w+ly| otherwise| now| still| is| are| remains?)*"
    r" (?:clear|normal|stable|unchanged|unremarkable|improved)\b)"
    r"|however|although|though|nevertheless|nonetheless|whereas|while|except(?:\s+for|\s+that|ing)?"
    r"|apart\s+from|aside\s+from|other\s+than|with\s+the\s+exception\s+of|besides|albeit)\b|[);]"
    # "(on the left)" only says where, "(none)" whether.
    r"|\((?! ?(?:on|in|at|left|right|bilateral|both|l|r|no|none|absent)\b[^()]*\))"
)
_JOINT = re.compile(r",(?: and| or| with)?(?= )|\band\b|\bwith\b")
_DENIAL_OPENS = re.compile(r"\s*(?:there (?:is|are) )?(?:no|not|without)\b")
# "Opacity in the left base, right lung is clear."
_COMPLETE_WITHOUT_VERB = re.compile(r"\s*(?!in\b|on\b|at\b|as\b|since\b|compared\b|after\b|within\b).*\b(?:in|at|on)\b")
_CLEAR_ELSEWHERE = re.compile(
    r"\s*(?:the )?(?:left|right|other)(?: (?:lung|side|base|hemithorax|costophrenic angle))?(?: is| remains?)?"
    r"(?: \w+ly)? (?:clear|normal|sharp|unremarkable|spared)\b"
)
_PREDICATE_ONLY = re.compile(
    r"\s*(?:(?:is|are|was|were|has|have|remains?|appears?|cannot|ends?|terminates?|extends?|projects?)\b"
    r"|(?:\w+ly )*(?:normal|enlarged|stable|unchanged|clear|intact|unremarkable|widened|resolved|removed|in place"
    r"|in situ|within (?:the )?(?:normal )?(?:limits|range)(?: of normal)?)"
    r"(?: (?:in|from|compared|since|given|with|on|for|at|by|to)\b.*)?\s*$)"
)
# "Normal and stable heart size" is one thought, "effusion: no, edema: yes" are two.
_ADJECTIVE_ONLY = re.compile(rf"\s*(?:\w+ly )*{WORDS['adjective']}\s*")
_FIELD = re.compile(r"\s*[a-z]+(?: [a-z]+){0,3} ?:")


def clauses(sentence: str) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of every clause, so that each holds about one assertion."""
    start = 0
    for hard in [*_HARD_BREAK.finditer(sentence), None]:
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
            or _CLEAR_ELSEWHERE.match(chunk)
            or (":" in said and _FIELD.match(chunk))
            or (
                _has_predicate(chunk)
                and _has_predicate(said)
                and not (_PREDICATE_ONLY.match(chunk) or _ADJECTIVE_ONLY.fullmatch(said))
            )
            or (joint[0] == "," and FINITE.search(chunk) and _COMPLETE_WITHOUT_VERB.match(said))
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
    return bool(FINITE.search(text) or _ADJECTIVE.search(text))


# --- Cues -------------------------------------------------------------------------------------------------------------

_CUE = cues("cues")
_FOLLOWING_CUE = cues("following_cues")
_NEW_ITEM = re.compile(rf"(?P<item>(?:,(?: and)?|\band)(?= {WORDS['descriptor']}\b))|(?P<comma>,)")
_OR = re.compile(r"\b(?:or|nor|and/or|versus|vs)\b|(?<=\w\w)/")
_SIDED = re.compile(r" (?:the|left|right|both|bilateral)\b")
_UP_TO_COMMA = re.compile(r"[^,]{0,80}")


def _open_cues(clause: str) -> list[tuple[int, str]]:
    """List where denial, doubt and the like begin and end in a clause, as (position, kind)."""
    events = [(match.start(), str(match.lastgroup)) for match in _CUE.finditer(clause)]
    # "No effusion, edema or small pneumothorax" is one list, "no effusion, small pneumothorax" is not.
    last_or = max((match.start() for match in _OR.finditer(clause)), default=0)
    for item in _NEW_ITEM.finditer(clause, last_or):
        kind = str(item.lastgroup)
        rest = _UP_TO_COMMA.match(clause, item.end())
        # "Removal of the tube, left line and right drain" is one list, "of the tube, left line in place" is not.
        if rest and not _has_predicate(rest[0]) and (kind == "comma" or _SIDED.match(rest[0])):
            kind = f"bare {kind}"
        events.append((item.start(), kind))
    return sorted(events)


_NOT = re.compile(r"\b(?:not|nor|neither|never)\b")


def classify(clause: str, offset: int, found: list[Found]) -> list[Found]:
    """Give every finding of a clause its status, and leave out those that are spoken of only in passing.

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
        status = _status_under(state, item.label == "Support Devices")
        if _NOT.search(clause, item.start - offset, item.end - offset):  # "the vessels are not engorged"
            status = "negative"
        classified.append(replace(item, status=status))
    classified = _classify_backwards(clause, offset, classified)
    classified = _doubt_alternatives(clause, offset, classified)
    return [
        replace(item, status="uncertain") if item.doubtful and item.status == "positive" else item
        for item in classified
        if item.status != "absent"
    ]


# Which states run on through the items of a list; what is no descriptor opens a comma's item.
_RUN_ON = {
    "comma": {"deny", "history", "method", "differential", "explanation"},
    "bare comma": {"deny", "history", "method", "differential", "explanation", "removed"},
    "item": {"method", "differential"},
    "bare item": {"method", "differential", "removed", "resolved"},
}
# What a doubt cannot change.
_FIRM = {"deny", "strong_doubt", "history", "method", "differential", "explanation"}


def _next_state(state: str, event: str) -> str:
    """Follow one cue: what is open after it, given what was open before."""
    if event in ("keep", "stop"):
        return ""
    if event in _RUN_ON:
        return state if state in _RUN_ON[event] else ""
    if event in ("setting", "placed"):
        return "" if state == ("deny" if event == "setting" else "removed") else state
    if event == "doubt" and state in _FIRM:
        return state
    return event


def _status_under(state: str, device: bool) -> Status:
    if state in ("deny", "instead") or (state == "removed" and device) or (state == "resolved" and not device):
        return "negative"
    if state in ("history", "method"):
        return "absent"
    return "uncertain" if state in ("doubt", "strong_doubt", "differential", "explanation") else "positive"


# A tip that is not seen is that of a tube that is there.
_PART_OF_DEVICE = re.compile(r"\b(?:tip|end|course|side ?holes?|side port|portion|position|terminus)\b")


def _classify_backwards(clause: str, offset: int, found: list[Found]) -> list[Found]:
    """Apply cues that follow their finding: "has resolved", "is unlikely", "cannot be excluded"."""
    for cue in _FOLLOWING_CUE.finditer(clause):
        kind = cue.lastgroup
        for index in _subjects(clause, offset, found, cue.start() + offset):
            device = found[index].label == "Support Devices"
            if device and kind in ("deny", "doubt") and _PART_OF_DEVICE.search(clause, 0, cue.start()):
                continue
            if kind == "deny" or (kind == "removed" and device) or (kind in ("resolved", "normal") and not device):
                found[index] = replace(found[index], status="negative")
            elif kind == "method":
                found[index] = replace(found[index], status="absent")
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
