"""From a report to its sentences: which sections describe the film, and where a statement ends in them.

Reports come as prose, wrapped at some column, and as lists of a statement a line, with or without bullets, numbers,
full stops and small letters. What the end of a line means is told from its paragraph, see `_statement_ends`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby, pairwise, zip_longest

# Longer runs without a full stop are cut, which bounds the work on text that is no report.
_LONGEST_SENTENCE = 1000

# Fields that ask a question or describe the exam; what they mention is not on the film.
_HEADING = re.compile(
    r"(?:^|(?<=[.\n;:]))[ \t\r]*(?:(?:"
    r"(?P<skip>indications?|(?:clinical |patient |relevant )?history(?: of present illness)?|clinical (?:information"
    r"|indication|data|question|details|statement)|reason for (?:the )?(?:exam(?:ination)?|study|request))"
    r"|(?P<skip_line>techniques?|comparisons?|exam(?:ination)?|procedure|study|views?|type of exam|order"
    r"|notifications?|recommendations?|date)"
    r"|(?P<read>findings and impression|findings ?/ ?impression|final report|report|wet read|interpretation|summary"
    r"|addendum|chest(?: [\w ,]{0,40})?))[ \t\r]*:"
    r"|(?:findings|impressions?|conclusions?|opinion)[ \t\r]*(?::|$))",
    re.IGNORECASE | re.MULTILINE,
)
_NOT_SPACE = re.compile(r"\S")
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")
_SENTENCE_END = re.compile(r"[.?]\s")
_ABBREVIATION = re.compile(
    r"(?:\b(?:dr|drs|mr|mrs|ms|vs|approx|fig|st|cf|ca|resp|prob|incl|excl|esp|dept|pt|prev|lat|temp|ant|post|inf"
    r"|sup|etc|e\.g|i\.e|a\.m|p\.m|\w\.\w|[a-z])|\d)$",
    re.IGNORECASE,
)
# A bullet in a line: between small letters, or the one that the line begins with.
_AFTER_PROSE = re.compile(r"[a-z.] [^\w\s] [A-Z][a-z ]")
_OTHER_SIDE_IS = re.compile(r"\s*(?:the )?(?:left|right)(?: one| side)? (?:is|are|remains?|has)\b", re.IGNORECASE)
_NO = re.compile(r"(?:\bnos?|[:=] ?[ny])$", re.IGNORECASE)
_NO_IS_ANSWER = re.compile(r"[:=] ?(?:no?|y)$", re.IGNORECASE)
_ANSWER = re.compile(
    r"\s*(?:(?:yes|no|none|negative|positive|absent|present|nil)\b\s*(?:[.,;]|$)"
    r"|(?:(?:tiny|trace|small|mild|moderate|large|left|right|bilateral)\b[\s,]*)+(?:[.;]|$))",
    re.IGNORECASE,
)
_BULLET = r"[-*•–—·▪●◦‣]"
_STOP = re.compile(
    rf"[.!?]+(?=[\s\"')\]]|$)|(?<=[a-z]{{3}})\.(?=[A-Z])|;|\n|<br\s?/?>| (?:\||--) |[•▪●◦‣]"
    # Bullets and numbers within a line.
    rf"|(?<= ){_BULLET}(?= [A-Z])"
    r"|(?<=[A-Za-z] )\d{1,2}[.)](?= [A-Z])"
)


def sentences(text: str) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of each sentence in the sections that describe the film."""
    line_ends = set(_statement_ends(text))
    for section_start, section_end in _sections(text, line_ends):
        start = section_start
        for stop in _STOP.finditer(text, section_start, section_end):
            if stop.start() in line_ends or (stop[0] != "\n" and _ends_sentence(text, start, stop)):
                yield from _pieces(start, stop.start())
                start = stop.end()
        yield from _pieces(start, section_end)


def _sections(text: str, line_ends: set[int]) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of the text after each heading worth reading, and of text under no heading."""
    start = 0
    headings = list(_HEADING.finditer(text))
    for heading, following in zip_longest(headings, headings[1:]):
        if heading is None:
            continue
        yield start, max(start, heading.start())
        start = heading.end()
        if heading["skip"] or heading["skip_line"]:
            end = following.start() if following else None
            line = text.find("\n", start, end)
            ends = heading["skip_line"] or following is None
            if ends and line in line_ends and text[start:line].strip():
                start = line
            else:
                start = _end_of_skipped(text, start, end)
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
    """Tell a full stop from an abbreviation's, and a question from one that is answered."""
    mark = stop[0]
    if mark == ";":
        return not _OTHER_SIDE_IS.match(text, stop.end())
    if mark in "-*·–—":
        line = text.rfind("\n", 0, stop.start()) + 1
        opening = _NOT_SPACE.search(text, line, stop.start())
        return bool(_AFTER_PROSE.match(text, stop.start() - 2)) or (opening is not None and opening[0] == mark)
    if mark[0] == "?":
        # "? small effusion" asks about what follows, "Effusion? No." has its answer behind.
        asked = start < stop.start() and not text[stop.start() - 1].isspace()
        return asked and not _ANSWER.match(text, stop.end(), stop.end() + 40)
    if mark != ".":
        return True
    before = text[max(start, stop.start() - 12) : stop.start()]
    after = text[stop.end() : stop.end() + 3].lstrip()[:1]
    if _NO.search(before):
        # "Rib no. 3" counts; "Effusion: no. 3. Edema: no" answers, and a number opens the next item.
        return not after.isdigit() or bool(_NO_IS_ANSWER.search(before))
    if not _ABBREVIATION.search(before):
        return True
    # A number may end a sentence ("3.4 cm" has no space); a number that opens one is an item of a list.
    return before[-1:].isdigit() and (after.isupper() or not after)


def _pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    for piece in range(start, end, _LONGEST_SENTENCE):
        yield piece, min(end, piece + _LONGEST_SENTENCE)


# --- Lines ------------------------------------------------------------------------------------------------------------

_MARK = re.compile(rf"[ \t]*(?:\(?\d{{1,2}}[.):]|{_BULLET}|[a-hA-H][.)])[ \t]+")
_FULL_STOP = re.compile(r"[.!?][\s\"')\]]*$")
_INNER_STOP = re.compile(r"[a-z]{2}[.!?;] ", re.IGNORECASE)
# Words that no statement ends with, and words that none begins with.
_GOES_ON = re.compile(
    r"(?:[,:]|\b(?:a|an|and|are|at|be|by|for|from|in|is|may|of|on|or|the|to|was|were|with|without"
    r"|(?<![:?=-] )(?<![:?=\t-])(?<!  )no))[ \t\r]*$",  # "Edema: no" is an answer
    re.IGNORECASE,
)
_WENT_ON = re.compile(
    r"[ \t]*(?:and|are|at|been|by|for|from|has|have|is|may|of|on|or|seen|than|that|to|was|were|which|with)\b",
    re.IGNORECASE,
)
_SHORT_LINE = 45


def _statement_ends(text: str) -> Iterator[int]:
    """Yield the line ends that also end a statement: all in a list, none in prose that was only wrapped."""
    starts = [0, *(match.end() for match in re.finditer("\n", text))]
    lines = [(start, text[start : end - 1]) for start, end in pairwise([*starts, len(text) + 1])]
    previous = 0
    for blank, group in groupby(lines, key=lambda line: not line[1].strip()):
        paragraph = list(group)
        if blank:
            continue
        if previous:
            yield previous
        yield from _statement_ends_of(paragraph)
        start, line = paragraph[-1]
        previous = start + len(line)


def _statement_ends_of(paragraph: list[tuple[int, str]]) -> Iterator[int]:
    lines = [line.rstrip() for _, line in paragraph]
    width = max(map(len, lines))
    whole = "".join(lines)
    has_case = whole != whole.upper() and whole != whole.lower()
    punctuated = any(_FULL_STOP.search(line[-4:]) or _INNER_STOP.search(line) for line in lines[:-1])
    listed = not punctuated and not any(_MARK.match(line) for line in lines) and _is_list(lines, width, has_case)
    inside_item = bool(_MARK.match(lines[0]))
    for (start, raw), line, following in zip(paragraph, lines, lines[1:], strict=False):
        opening = following.lstrip()
        if _MARK.match(following):
            inside_item = ends = True
        elif _GOES_ON.search(line[-10:]) or _WENT_ON.match(following) or (has_case and opening[0].islower()):
            ends = False
        elif inside_item:
            # The next line of an item is indented, or the line before it is full.
            ends = has_case and opening == following and _fits(line, following, width)
            inside_item = not ends
        elif listed:
            ends = True
        else:
            narrow = has_case and width < _SHORT_LINE
            ends = (narrow or _fits(line, following, width)) and (len(line) < _SHORT_LINE or not punctuated)
        if ends:
            yield start + len(raw)


def _fits(line: str, following: str, width: int) -> bool:
    """Say whether the next line's first word had room behind this line: whoever wraps text would have put it there."""
    return len(line) + 1 + len(following.split(maxsplit=1)[0]) <= width


def _is_list(lines: list[str], width: int, has_case: bool) -> bool:
    """Tell a list without full stops from one long sentence, which has one at its end and fills its lines."""
    if has_case and width >= _SHORT_LINE and any(line.lstrip()[0].islower() for line in lines):
        return False
    return not _FULL_STOP.search(lines[-1]) or any(_fits(line, following, width) for line, following in pairwise(lines))
