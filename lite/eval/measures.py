"""What is measured of drafted texts beside their references: figures by name, of the metrics that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import get_args

from lite.errors import BackendUnavailable
from lite.eval.chexbert import chexbert_f1
from lite.eval.figures import Missing, Sums
from lite.eval.labels import read_labels
from lite.eval.metrics import Attribute, attribute_accuracy, bleu, label_counts, label_sums, rouge_l
from lite.eval.radgraph import radgraph_f1

TEXT_METRICS = ("labels", "rouge", "bleu")
"""Those that take no model."""


def text_sums(
    references: Sequence[str], predictions: Sequence[str], metrics: Collection[str] = TEXT_METRICS
) -> dict[str, Sums | Missing]:
    """Measure what takes no model: label_f1_micro and _macro, side_, size_ and zone_accuracy, rouge_l, bleu_1, bleu_4.

    Returns:
        Each figure, or why it is missing: its package is not installed, or no two texts have such a finding.
    """
    figures: dict[str, Sums | Missing] = {}
    if "labels" in metrics:
        readings = [read_labels(text) for text in references], [read_labels(text) for text in predictions]
        figures |= label_sums(label_counts(*readings))
        for attribute in get_args(Attribute):
            found = attribute_accuracy(*readings, attribute)
            figures[f"{attribute}_accuracy"] = found if found.count else Missing(why="in no report")
    measured: dict[str, tuple[str, Callable[[], Sums]]] = {
        "rouge_l": ("rouge", lambda: rouge_l(references, predictions)),
        "bleu_1": ("bleu", lambda: bleu(references, predictions, 1)),
        "bleu_4": ("bleu", lambda: bleu(references, predictions, 4)),
    }
    for name, (metric, measure_it) in measured.items():
        if metric in metrics:
            try:
                figures[name] = measure_it()
            except BackendUnavailable as error:
                figures[name] = Missing(why="not installed", todo=str(error))
    return figures


def model_sums(
    references: Sequence[str],
    predictions: Sequence[str],
    metrics: Collection[str],
    *,
    chexbert: Path | None = None,
    device: str = "cpu",
) -> dict[str, Sums | Missing]:
    """Measure what takes a model: "radgraph_f1", and "chexbert_f1 micro-14 uncertain negative" and so on.

    Args:
        metrics: which, "radgraph" and "chexbert".
        chexbert: CheXbert's weights, see `lite.eval.chexbert`.
        device: what the models run on.
    """
    figures: dict[str, Sums | Missing] = {}
    if "radgraph" in metrics:
        figures["radgraph_f1"] = radgraph_f1(references, predictions, device=device)
    if "chexbert" in metrics:
        found = chexbert_f1(references, predictions, weights=chexbert, device=device)
        if isinstance(found, Missing):
            figures["chexbert_f1"] = found
        else:
            figures |= {f"chexbert_f1 {name}": sums for name, sums in found.items()}
    return figures
