"""How good drafted findings are beside the reference: label F1, side and size accuracy, ROUGE-L, BLEU.

Every figure is a fraction between 0 and 1 and comes with a bootstrap interval, see `lite.eval.figures`.

A figure that has nothing to be measured on is NaN, not 0 and not 1: the precision of a label that was never predicted,
the F1 of a label that neither side has. F1 is 2tp / (2tp + fp + fn), so a label that is in the reference and was never
predicted has F1 0. An uncertain label counts as negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from lite.errors import BackendUnavailable
from lite.eval.figures import Estimate, Floats, bootstrap_interval, check_paired, f1, mean_estimate, ratio
from lite.eval.labels import LABELS, Label, Reading, read_labels

Readings: TypeAlias = Mapping[Label, Reading]
Attribute = Literal["side", "size", "zone"]

_INSTALL = 'install it with: pip install "llava-rad-lite[bench]"'


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScore:
    """How one label fared: `support` references have it, `predicted` predictions do."""

    label: Label
    precision: float
    recall: float
    f1: Estimate
    support: int
    predicted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelF1:
    """F1 over all labels at once (micro), averaged over the labels that the references have (macro), and by label."""

    micro: Estimate
    macro: Estimate
    per_label: tuple[LabelScore, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingsScores:
    """Everything this module measures, on one set of studies."""

    count: int
    left_out: Mapping[str, int] = field(default_factory=dict)  # studies that are in no figure, by what is wrong
    label_f1: LabelF1
    side_accuracy: Estimate
    size_accuracy: Estimate
    zone_accuracy: Estimate
    rouge_l: Estimate
    bleu_1: Estimate
    bleu_4: Estimate


def label_f1(references: Sequence[Readings], predictions: Sequence[Readings]) -> LabelF1:
    """Compare what `read_labels` says of each reference text with what it says of the predicted one."""
    check_paired(references, predictions)
    truth, drafted = (
        np.array([[study[label].status == "positive" for label in LABELS] for study in side])
        for side in (references, predictions)
    )
    counts = np.stack([truth & drafted, ~truth & drafted, truth & ~drafted], axis=-1).astype(np.float64)
    per_study = counts.reshape(len(references), -1)

    def by_label(sums: Floats) -> Floats:
        return sums.reshape(-1, len(LABELS), 3)

    def macro(sums: Floats) -> Floats:
        supported = by_label(sums)[..., 0] + by_label(sums)[..., 2] > 0
        kept = np.where(supported, f1(by_label(sums)), 0.0)
        return ratio(kept.sum(axis=1), supported.sum(axis=1).astype(np.float64))

    tp, fp, fn = np.moveaxis(counts.sum(axis=0), -1, 0)
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    return LabelF1(
        micro=bootstrap_interval(per_study, lambda sums: f1(by_label(sums).sum(axis=1))),
        macro=bootstrap_interval(per_study, macro),
        per_label=tuple(
            LabelScore(
                label=label,
                precision=float(precision[index]),
                recall=float(recall[index]),
                f1=bootstrap_interval(counts[:, index], f1),
                support=int(tp[index] + fn[index]),
                predicted=int(tp[index] + fp[index]),
            )
            for index, label in enumerate(LABELS)
        ),
    )


def attribute_accuracy(
    references: Sequence[Readings], predictions: Sequence[Readings], attribute: Attribute
) -> Estimate:
    """Say how often a finding that both sides report is on the same side (of the same size, in the same zone).

    Counted are the labels that are positive on both sides and whose reference carries the attribute; a prediction that
    leaves it out is wrong. Findings missed or made up are the business of `label_f1`.
    """
    check_paired(references, predictions)
    per_study = np.zeros((len(references), 2))
    for row, truth, drafted in zip(per_study, references, predictions, strict=True):
        for label, reading in truth.items():
            expected = getattr(reading, attribute)
            if reading.status == drafted[label].status == "positive" and expected is not None:
                row += (getattr(drafted[label], attribute) == expected, 1)
    return bootstrap_interval(per_study, lambda sums: ratio(sums[:, 0], sums[:, 1]), count=int(per_study[:, 1].sum()))


def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> Estimate:
    """Average the ROUGE-L F-measure of each study: rouge-score, its own tokeniser (lower case), no stemming.

    Raises:
        BackendUnavailable: rouge-score is not installed.
    """
    check_paired(references, predictions)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        msg = f"got no rouge-score package · ROUGE-L is computed by it · {_INSTALL}"
        raise BackendUnavailable(msg) from error
    scorer = RougeScorer(["rougeL"])
    pairs = zip(references, predictions, strict=True)
    return mean_estimate([scorer.score(reference, prediction)["rougeL"].fmeasure for reference, prediction in pairs])


def bleu(references: Sequence[str], predictions: Sequence[str], order: int) -> Estimate:
    """Compute the BLEU of the whole corpus up to n-grams of an order: sacrebleu, lower case, 13a tokens, exp smoothing.

    Published report-generation figures come from several other tokenisers: compare within this instrument only.

    Raises:
        BackendUnavailable: sacrebleu is not installed.
    """
    check_paired(references, predictions)
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        msg = f"got no sacrebleu package · BLEU is computed by it · {_INSTALL}"
        raise BackendUnavailable(msg) from error
    scorer = BLEU(lowercase=True, tokenize="13a", max_ngram_order=order)
    per_study = np.empty((len(references), 2 * order + 2))
    for row, reference, prediction in zip(per_study, references, predictions, strict=True):
        score = scorer.corpus_score([prediction], [[reference]])
        row[:] = (*score.counts, *score.totals, score.sys_len, score.ref_len)

    def of_row(row: list[int]) -> float:
        matched, total, (sys_len, ref_len) = row[:order], row[order:-2], row[-2:]
        score = BLEU.compute_bleu(matched, total, sys_len, ref_len, smooth_method="exp", max_ngram_order=order)
        return score.score / 100

    return bootstrap_interval(per_study, lambda sums: np.array([of_row(row) for row in sums.astype(int).tolist()]))


def same_text(references: Sequence[str], predictions: Sequence[str]) -> Estimate:
    """Say how often the prediction is the reference, character for character."""
    check_paired(references, predictions)
    pairs = zip(references, predictions, strict=True)
    return mean_estimate([reference == prediction for reference, prediction in pairs])


def score_findings(
    references: Sequence[str], predictions: Sequence[str], *, truth: Sequence[Readings] | None = None
) -> FindingsScores:
    """Measure everything on pairs of texts.

    Args:
        truth: the labels of the references where they are known; otherwise they are read from the texts, as those of
            the predictions always are.

    Raises:
        BackendUnavailable: rouge-score or sacrebleu is not installed.
    """
    check_paired(references, predictions)
    truth = [read_labels(text) for text in references] if truth is None else truth
    drafted = [read_labels(text) for text in predictions]
    return FindingsScores(
        count=len(references),
        label_f1=label_f1(truth, drafted),
        side_accuracy=attribute_accuracy(truth, drafted, "side"),
        size_accuracy=attribute_accuracy(truth, drafted, "size"),
        zone_accuracy=attribute_accuracy(truth, drafted, "zone"),
        rouge_l=rouge_l(references, predictions),
        bleu_1=bleu(references, predictions, 1),
        bleu_4=bleu(references, predictions, 4),
    )
