"""From a report to its sentences, and from a sentence to clauses that each hold about one assertion."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest

from lite.eval.labels.vocabulary import WORDS

# Longer runs without a full stop are cut, which bounds the work on text that is no report.
_LONGEST_SENTENCE = 1000

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


def sentences(text: str) -> Iterator[tuple[int, int]]:
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


# --- Clauses ----------------------------------------------------------------------------------------------------------

FINITE = re.compile(
    rf"(?<!that )(?<!which )(?<!who )(?<!as )\b{WORDS['finite']}\b"
    r"|\b(?:there['’]s)\b"
)
_ADJECTIVE = re.compile(rf"\b{WORDS['adjective']}\b")
# Words after which a new assertion begins.
_HARD_BREAK = re.compile(
    r"\b(?:but(?! (?:persists?|remains?)\b)(?!(?: \w+ly| otherwise| now| still| is| are| remains?)* (?:clear|normal"
    r"|stable|unchanged|unremarkable|improved)\b)"
    r"|however|although|though|nevertheless|nonetheless|whereas|while|except(?:\s+for|\s+that|ing)?"
    r"|apart\s+from|aside\s+from|other\s+than|with\s+the\s+exception\s+of|besides|albeit)\b|[();]"
)
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
            or (_has_predicate(said) and _has_predicate(chunk) and not _PREDICATE_ONLY.match(chunk))
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
