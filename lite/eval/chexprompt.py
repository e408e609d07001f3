"""CheXprompt: six kinds of errors in a report, significant or not, counted by a language model.

What is asked and answered, and what the counts come to; `lite.eval.judge` speaks to the model. The kinds and their keys
are the published ones; the prompt's words and its examples (`chexprompt.txt`) are this project's own, so scores are to
be compared with scores of the same prompt and judge only. Who has another prompt gives it as a file:

    system message
    ---
    message with {reference} and {candidate} in it

Source: the paper that brought LLaVA-Rad, and https://github.com/microsoft/chexprompt
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from lite.errors import LiteError
from lite.eval.figures import Sums, mean_sums, ratio

ERRORS: Final = (
    "false_positive_finding",
    "omission_finding",
    "incorrect_location",
    "incorrect_severity",
    "false_positive_comparison",
    "omission_comparison",
)
"""What can be wrong."""
SEVERITIES: Final = ("clinically_significant", "clinically_insignificant")

Counts: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""How many errors of each kind: significant ones, insignificant ones."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a judge is asked: `message` has {reference} and {candidate} in it."""

    system: str
    message: str
    name: str

    @property
    def sha256(self) -> str:
        """The hash of its words, which each score is labelled with."""
        return hashlib.sha256(f"{self.system}\n---\n{self.message}".encode()).hexdigest()

    @property
    def formats(self) -> list[dict[str, Any]]:
        """What an endpoint is held to, the best first; nothing for a prompt that does not name our keys."""
        return list(_FORMATS) if all(severity in self.message for severity in SEVERITIES) else []

    def messages(self, reference: str, candidate: str) -> list[dict[str, str]]:
        """Return what is sent for a pair of texts."""
        texts = {"{reference}": reference, "{candidate}": candidate}
        # In one pass: a report that has "{candidate}" in it stays as it is.
        user = re.sub("|".join(map(re.escape, texts)), lambda found: texts[found[0]], self.message)
        parts = (("system", self.system), ("user", user))
        return [{"role": role, "content": content} for role, content in parts if content]


def read_prompt(path: Path | None = None) -> Prompt:
    """Read a prompt from a file: see the module. Without one, the project's own.

    Raises:
        LiteError: it cannot be read, or one of the two texts has no place in it.
    """
    try:
        text = (path or resources.files("lite.eval").joinpath("chexprompt.txt")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: got a file that cannot be read ({error}) · expected a prompt · check the path"
        raise LiteError(msg) from error
    system, _, message = text.rpartition("\n---\n")
    prompt = Prompt(system.strip(), message.strip(), path.name if path else "own prompt")
    if missing := [name for name in ("{reference}", "{candidate}") if name not in prompt.message]:
        msg = f"{path}: got no {missing[0]} · expected {{reference}} and {{candidate}} where the texts go · add it"
        raise LiteError(msg)
    return prompt


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


_ANSWER: Final = _object({name: _object({kind: {"type": "integer"} for kind in ERRORS}) for name in SEVERITIES})
_FORMATS: Final[tuple[dict[str, Any], ...]] = (
    {"type": "json_schema", "json_schema": {"name": "errors", "strict": True, "schema": _ANSWER}},
    {"type": "json_object", "schema": _ANSWER},  # llama-cpp-python's server, which does not know the other
)

# -- Answers ---------------------------------------------------------------------------------------------------------

_FENCE: Final = re.compile(r"```(?:json)?\s*(\{.*\})\s*```", re.DOTALL)
_LINE: Final = re.compile(r"number of clinically (in)?significant errors by type:\s*([^\n]*)", re.IGNORECASE)
_PAIR: Final = re.compile(r"\(\s*([A-F])\s*,\s*(\d{1,3})\s*\)")


def parse_answer(text: str) -> Counts | None:
    """Read a judge's answer: our JSON object, or the two lines that the published prompt asks for.

    Returns:
        The counts; None unless all six kinds are there in both severities, once each and as whole numbers from 0.
    """
    fenced = _FENCE.fullmatch(text.strip())
    try:
        value = json.loads(fenced[1] if fenced else text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return _parse_lines(text)
    if not isinstance(value, dict) or value.keys() != set(SEVERITIES):
        return None
    halves = []
    for severity in SEVERITIES:
        half = value[severity]
        if not isinstance(half, dict) or half.keys() != set(ERRORS):
            return None
        if any(type(count) is not int or count < 0 for count in half.values()):
            return None
        halves.append(tuple(half[kind] for kind in ERRORS))
    return halves[0], halves[1]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return dict(pairs)


def _parse_lines(text: str) -> Counts | None:
    lines = _LINE.findall(text)
    halves: dict[str, tuple[int, ...]] = {}
    for insignificant, counts in lines:
        pairs = _PAIR.findall(counts)
        if [letter for letter, _ in pairs] != list("ABCDEF") or re.sub(r"[\s,()\[\]]", "", _PAIR.sub("", counts)):
            return None
        halves[insignificant.lower()] = tuple(int(count) for _, count in pairs)
    return (halves[""], halves["in"]) if len(lines) == len(halves) == len(SEVERITIES) else None


# -- Figures ---------------------------------------------------------------------------------------------------------


def error_sums(counts: Sequence[Counts | None]) -> dict[str, Sums]:
    """Turn the errors of each report into figures: their means, whole and by kind, and the share of reports without.

    A report that the judge has not scored (None) is in none of them but "unscored".
    """
    scored = np.array([count is not None for count in counts], dtype=np.float64)
    table = np.array([count or ((0,) * 6, (0,) * 6) for count in counts], dtype=np.float64)  # [reports, severities, 6]

    def figure(values: Any, *, lower: bool = True) -> Sums:  # noqa: ANN401 - an array
        return Sums(
            per_study=np.stack([values * scored, scored], axis=1),
            statistic=lambda sums: ratio(sums[:, 0], sums[:, 1]),
            count=int(scored.sum()),
            lower_is_better=lower,
            own_cases=True,
        )

    figures = {"errors": figure(table.sum(axis=(1, 2)))}
    words = ("significant", "insignificant")
    figures |= {f"{word} errors": figure(table[:, half].sum(axis=1)) for half, word in enumerate(words)}
    for half, word in enumerate(words):
        figures |= {f"{word} {kind}": figure(table[:, half, column]) for column, kind in enumerate(ERRORS)}
    figures["reports without errors"] = figure(table.sum(axis=(1, 2)) == 0, lower=False)
    figures["reports without significant errors"] = figure(table[:, 0].sum(axis=1) == 0, lower=False)
    unscored = mean_sums((1 - scored).tolist())
    return figures | {"reports unscored": replace(unscored, lower_is_better=True)}
