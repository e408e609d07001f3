"""How much of northside's way of writing there is in drafted findings: its list, its millimetres, its words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.phantom.hospital import MILLIMETRES
from lite.eval.figures import Estimate, Floats, Sums, mean_estimate, ratio
from lite.eval.labels import Label, Size, read_labels, read_mentions
from lite.eval.labels.sentences import sentences
from lite.eval.metrics import label_counts, label_sums, rouge_l
from lite.eval.scoring import read_pairs

_NUMBER: Final = re.compile(r"(?:^|(?<=\. ))(\d+)\. ")
_MM: Final = re.compile(r"\b(\d+) mm\b")


def is_numbered(text: str) -> bool:
    """Say whether a text is one line of items "1. …. 2. …." and so on, each with words, without a gap."""
    before, *parts = _NUMBER.split(text)
    numbers, items = parts[::2], parts[1::2]
    whole = "\n" not in text and text.endswith(".") and all(re.search(r"[a-z]", item) for item in items)
    return bool(numbers) and not before and whole and numbers == [str(n + 1) for n in range(len(numbers))]


def widths(text: str) -> dict[Label, int | None]:
    """Return the millimetres of each finding that northside measures and the text affirms; None: it gives none."""
    found: dict[Label, int | None] = {}
    for start, end in sentences(text):
        sentence = text[start:end]
        labels = {mention.label for mention in read_mentions(sentence) if mention.status == "positive"}
        given = _MM.search(sentence)
        for label in labels & MILLIMETRES.keys():
            found[label] = int(given[1]) if given else found.get(label)
    return found


def band(label: Label, mm: int | None) -> Size | None:
    """Return the size whose numbers hold this one; None: there is none."""
    bands = MILLIMETRES[label].items()
    return next((size for size, (low, high) in bands if mm is not None and low <= mm <= high), None)


def measure_style(predictions: Path, truth: Path | None = None) -> dict[str, Estimate]:
    """Measure drafts beside northside's own reports.

    Args:
        predictions: what `python -m lite run` has written about a list of northside's.
        truth: that list; None: the findings in `predictions`.

    Returns:
        By name: "numbered list", the share of drafts that are one; "given in mm", of the findings that northside
        measures, when draft and report have them; "mm of the right size", of the same; "ROUGE-L"; "label F1, macro".

    Raises:
        LiteError: as `read_pairs`.
        BackendUnavailable: rouge-score is not installed.
    """
    pairs = read_pairs([predictions], truth=truth)
    drafts = pairs.texts[0]
    measured = np.array([_measured(*texts) for texts in zip(pairs.references, drafts, strict=True)])
    readings = ([read_labels(text) for text in texts] for texts in (pairs.references, drafts))
    return {
        "numbered list": mean_estimate([is_numbered(draft) for draft in drafts]),
        "given in mm": _share(measured[:, :2]),
        "mm of the right size": _share(measured[:, ::2]),
        "ROUGE-L": rouge_l(pairs.references, drafts).estimate(),
        "label F1, macro": label_sums(label_counts(*readings))["label_f1_macro"].estimate(),
    }


def _measured(reference: str, draft: str) -> tuple[int, int, int]:
    """Count the findings with a width in both texts, those that the draft gives in mm, and those with the right mm."""
    wanted, given = widths(reference), widths(draft)
    both = wanted.keys() & given.keys()
    right = sum(band(label, given[label]) == band(label, wanted[label]) for label in both)
    return len(both), sum(given[label] is not None for label in both), right


def _share(whole_and_part: Floats) -> Estimate:
    count = int(whole_and_part[:, 0].sum())
    return Sums(per_study=whole_and_part, statistic=lambda sums: ratio(sums[:, 1], sums[:, 0]), count=count).estimate()


def style_table(files: Sequence[Path], truth: Path | None = None) -> str:
    """Return `measure_style` of every file as a Markdown table, a row a figure and a column a file."""
    columns = [measure_style(file, truth) for file in files]
    rows = [["", *(str(file) for file in files)], ["---", *(["---"] * len(files))]]
    for name in columns[0]:
        figures = (column[name] for column in columns)
        rows.append([name, *(f"{each.value:.3f} ({each.low:.3f} – {each.high:.3f})" for each in figures)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
