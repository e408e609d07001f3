"""The findings and the reason for an exam, cut out of a free-text report by its headings.

A section begins where a line begins with a known heading and a colon, and ends where the next one begins. Headings that
are not known ("LUNGS:") belong to the section they stand in. Where a heading comes twice, as in an addendum, the first
section with words in it counts.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

# The best first.
_REASON: Final = re.compile(r"INDICATION|CLINICAL INDICATION|REASON FOR (THE )?(EXAM(INATION)?|STUDY)")
_HISTORY: Final = re.compile(r"(CLINICAL )?HISTORY|CLINICAL INFORMATION")
_FINDINGS: Final = re.compile(r"FINDINGS?( AND IMPRESSION|/IMPRESSION)?")
_OTHERS: Final = (
    "FINAL REPORT|EXAMINATIONS?|EXAM|STUDY|TYPE OF EXAM|PROCEDURE|TECHNIQUE|VIEWS?|COMPARISONS?|PRIOR STUDIES"
    "|IMPRESSIONS?|CONCLUSIONS?|OPINION|RECOMMENDATIONS?|NOTIFICATIONS?|ADDENDUM|WET READ|DATE"
)
_HEADING: Final = re.compile(
    rf"^[ \t]*({_REASON.pattern}|{_HISTORY.pattern}|{_FINDINGS.pattern}|{_OTHERS})[ \t]*:", re.IGNORECASE | re.MULTILINE
)


class Sections(NamedTuple):
    """What a report says, without the breaks of its lines; None where it has no such section."""

    reason: str | None = None
    findings: str | None = None


def cut_sections(report: str) -> Sections:
    """Cut the findings and the reason out of a report."""
    headings = list(_HEADING.finditer(report))
    ends = [heading.start() for heading in headings[1:]] + [len(report)]
    found: dict[str, str] = {}
    for heading, end in zip(headings, ends, strict=False):
        if text := " ".join(report[heading.end() : end].split()):
            found.setdefault(heading[1].upper(), text)

    def first(heading: re.Pattern[str]) -> str | None:
        return next((text for name, text in found.items() if heading.fullmatch(name)), None)

    return Sections(first(_REASON) or first(_HISTORY), first(_FINDINGS))
