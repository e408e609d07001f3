"""The vocabulary of the labeller, `phrases.toml`, as compiled patterns."""

from __future__ import annotations

import re
import tomllib
from importlib import resources
from typing import Any

_FILE: dict[str, Any] = tomllib.loads(resources.files(__package__).joinpath("phrases.toml").read_text("utf-8"))

WORDS: dict[str, str] = {name: f"(?:{'|'.join(words)})" for name, words in _FILE["words"].items()}
"""Words that stand for one another, as one group."""

SIZE_IN_THE_NAME: dict[str, str] = _FILE["size_in_the_name"]


def _alternatives(phrases: list[str]) -> str:
    alternatives = "|".join(phrases)
    for name, words in WORDS.items():
        alternatives = alternatives.replace(f"{{{name}}}", words)
    return alternatives


def _whole_words(phrases: list[str]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{_alternatives(phrases)})(?!\w)")


def phrase(name: str) -> re.Pattern[str]:
    """Compile one of the lists under `[phrases]`."""
    return _whole_words(_FILE["phrases"][name])


def words_of(language: str) -> frozenset[str]:
    """Give the words listed under `[languages]` that tell a language."""
    return frozenset(_FILE["languages"][language].split())


def table(name: str) -> dict[str, re.Pattern[str]]:
    """Compile a table: a pattern for each label, side, zone or size."""
    return {key: _whole_words(phrases) for key, phrases in _FILE[name].items() if phrases}


def cues(name: str) -> re.Pattern[str]:
    """Compile a table of cues into one pattern whose groups are their kinds."""
    groups = (f"(?P<{kind.replace(' ', '_')}>{_alternatives(phrases)})" for kind, phrases in _FILE[name].items())
    return re.compile(r"(?:(?<!\w)|(?=:))(?:" + "|".join(groups) + r")(?:(?!\w)|(?<=\?))")
