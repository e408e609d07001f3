"""Pairs of reports with one known error each, to try a judge on: `python -m benchmarks.phantom plant OUT.jsonl`.

    {"id", "reference", "prediction", "row": {"kind": "wrong side", "planted": "incorrect_location"}}

The reference is a text of the grammar. In the prediction one sentence says something else, is missing or is new; of a
harmless rewording nothing is wrong, and "planted" is null.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from benchmarks.phantom.findings import Study, sample_study
from benchmarks.phantom.report import state_finding, write_findings
from lite.eval.labels import Label, read_labels
from lite.files import write_whole

_SWAPPED: Final = {"left": "right", "right": "left"}
_RESIZED: Final = {"small": "large", "large": "small", "mild": "severe", "severe": "mild"}
_CHANGES: Final = ("increased since the prior study", "decreased since the prior study", "new since the prior study")
_LUNGS: Final[frozenset[Label]] = frozenset({"Lung Opacity", "Edema", "Consolidation", "Lung Lesion", "Atelectasis"})

# Returns the texts of a pair, or None where the study has no place for the error.
Plant: TypeAlias = Callable[[Study, list[str], np.random.Generator], tuple[list[str], list[str]] | None]


def _positive(sentence: str) -> set[Label]:
    labels = read_labels(sentence).items()
    return {label for label, reading in labels if reading.status == "positive" and label != "No Finding"}


def _stated(sentences: Sequence[str], pattern: str = "") -> list[int]:
    """Return the places of sentences that state a finding and match a pattern."""
    return [
        place for place, text in enumerate(sentences) if _positive(text) and re.search(pattern, text, re.IGNORECASE)
    ]


def _exchanged(sentences: list[str], words: dict[str, str]) -> tuple[list[str], list[str]] | None:
    pattern = rf"\b({'|'.join(words)})(ly)?\b"
    # A nodule is small and a mass is large by their names.
    places = [place for place in _stated(sentences, pattern) if "Lung Lesion" not in _positive(sentences[place])]
    if not places:
        return None
    there = sentences[places[0]]

    def other(found: re.Match[str]) -> str:
        word = words[found[1].lower()] + (found[2] or "")
        return word.capitalize() if found[1][0].isupper() else word

    wrong = [re.sub(pattern, other, text, flags=re.IGNORECASE) if text == there else text for text in sentences]
    return sentences, wrong


def _false_finding(study: Study, sentences: list[str], rng: np.random.Generator) -> tuple[list[str], list[str]] | None:
    said = {label for label, reading in read_labels(" ".join(sentences)).items() if reading.status != "absent"}
    if "Lung Opacity" in said:  # clear lungs have nothing in them
        said |= _LUNGS
    others = [finding for seed in range(50) for finding in sample_study(int(rng.integers(2**31)) + seed).findings]
    new = next((finding for finding in others if finding.label not in said and not study.has(finding.label)), None)
    return None if new is None else (sentences, [*sentences, state_finding(new, rng)])


def _omission(_: Study, sentences: list[str], rng: np.random.Generator) -> tuple[list[str], list[str]] | None:
    places = _stated(sentences)
    if not places or len(sentences) < 2:
        return None
    left_out = places[int(rng.integers(len(places)))]
    return sentences, [text for place, text in enumerate(sentences) if place != left_out]


def _compared(sentences: list[str], rng: np.random.Generator) -> list[str] | None:
    places = _stated(sentences)
    if not places:
        return None
    place = places[int(rng.integers(len(places)))]
    change = _CHANGES[int(rng.integers(len(_CHANGES)))]
    return [f"{text[:-1]}, {change}." if at == place else text for at, text in enumerate(sentences)]


def _invented(_: Study, sentences: list[str], rng: np.random.Generator) -> tuple[list[str], list[str]] | None:
    compared = _compared(sentences, rng)
    return None if compared is None else (sentences, compared)


def _omitted(_: Study, sentences: list[str], rng: np.random.Generator) -> tuple[list[str], list[str]] | None:
    compared = _compared(sentences, rng)
    return None if compared is None else (compared, sentences)


def _reworded(study: Study, sentences: list[str], rng: np.random.Generator) -> tuple[list[str], list[str]] | None:
    other = write_findings(study, rng).text
    return None if other == " ".join(sentences) else (sentences, [other])


_KINDS: Final[dict[str, tuple[str | None, Plant]]] = {
    "false finding": ("false_positive_finding", _false_finding),
    "omission": ("omission_finding", _omission),
    "wrong side": ("incorrect_location", lambda _, sentences, __: _exchanged(sentences, _SWAPPED)),
    "wrong severity": ("incorrect_severity", lambda _, sentences, __: _exchanged(sentences, _RESIZED)),
    "invented comparison": ("false_positive_comparison", _invented),
    "omitted comparison": ("omission_comparison", _omitted),
    "harmless rewording": (None, _reworded),
}


def plant(out: Path, *, count: int, seed: int) -> int:
    """Write pairs, `count` of each kind; return how many in all."""
    lines = []
    for number, (kind, (planted, make)) in enumerate(_KINDS.items()):
        rng = np.random.default_rng([seed, number])
        found = 0
        while found < count:
            study = sample_study(int(rng.integers(2**31)))
            sentences = re.findall(r"[^.]+\.", write_findings(study, rng).text)
            pair = make(study, [text.strip() for text in sentences], rng)
            if pair is None:
                continue
            found += 1
            reference, prediction = (" ".join(text) for text in pair)
            row = {"kind": kind, "planted": planted}
            texts = {"id": f"{kind} {found}", "reference": reference, "prediction": prediction}
            lines.append(json.dumps(texts | {"row": row}))
    write_whole(out, "\n".join(lines) + "\n")
    return len(lines)
