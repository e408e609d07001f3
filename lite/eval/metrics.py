"""How good drafted findings are beside the reference: label F1, side and size accuracy, ROUGE-L, BLEU.

Every figure is a fraction between 0 and 1. Most come as `Sums`, of which an estimate with its interval is made, or a
comparison: see `lite.eval.figures` and `lite.eval.paired`.

A figure that has nothing to be measured on is NaN, not 0 and not 1: the precision of a label that was never predicted,
the F1 of a label that neither side has. F1 is 2tp / (2tp + fp + fn), so a label that is in the reference and was never
predicted has F1 0. An uncertain label counts as negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from lite.errors import BackendUnavailable
from lite.eval.figures import (
    Estimate,
    Floats,
    Sums,
    bootstrap_interval,
    check_paired,
    f1,
    mean_estimate,
    mean_sums,
    ratio,
)
from lite.eval.labels import LABELS, Label, Reading

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


def label_counts(references: Sequence[Readings], predictions: Sequence[Readings]) -> Floats:
    """Count true positives, false positives and false negatives of each label in each study: [num_studies, 14, 3]."""
    check_paired(references, predictions)
    truth, drafted = (
        np.array([[study[label].status == "positive" for label in LABELS] for study in side])
        for side in (references, predictions)
    )
    return np.stack([truth & drafted, ~truth & drafted, truth & ~drafted], axis=-1).astype(np.float64)


def label_sums(counts: Floats) -> dict[str, Sums]:
    """Return label F1 over all labels at once, "label_f1_micro", and averaged over labels, "label_f1_macro"."""
    per_study = counts.reshape(len(counts), -1)
    return {
        "label_f1_micro": Sums(per_study=per_study, statistic=_micro),
        "label_f1_macro": Sums(per_study=per_study, statistic=_macro),
    }


def _by_label(sums: Floats) -> Floats:
    return sums.reshape(-1, len(LABELS), 3)


def _micro(sums: Floats) -> Floats:
    return f1(_by_label(sums).sum(axis=1))


def _macro(sums: Floats) -> Floats:
    supported = _by_label(sums)[..., 0] + _by_label(sums)[..., 2] > 0
    kept = np.where(supported, f1(_by_label(sums)), 0.0)
    return ratio(kept.sum(axis=1), supported.sum(axis=1).astype(np.float64))


def label_f1(references: Sequence[Readings], predictions: Sequence[Readings]) -> LabelF1:
    """Compare what `read_labels` says of each reference text with what it says of the predicted one."""
    counts = label_counts(references, predictions)
    whole = label_sums(counts)
    tp, fp, fn = np.moveaxis(counts.sum(axis=0), -1, 0)
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    return LabelF1(
        micro=whole["label_f1_micro"].estimate(),
        macro=whole["label_f1_macro"].estimate(),
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


def attribute_accuracy(references: Sequence[Readings], predictions: Sequence[Readings], attribute: Attribute) -> Sums:
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
    found = int(per_study[:, 1].sum())
    return Sums(per_study=per_study, statistic=lambda sums: ratio(sums[:, 0], sums[:, 1]), count=found, own_cases=True)


def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> Sums:
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
    return mean_sums([scorer.score(reference, prediction)["rougeL"].fmeasure for reference, prediction in pairs])


def bleu(references: Sequence[str], predictions: Sequence[str], order: int) -> Sums:
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

    def statistic(sums: Floats) -> Floats:
        return np.array([of_row(row) for row in sums.astype(int).tolist()])

    return Sums(per_study=per_study, statistic=statistic)


def same_text(references: Sequence[str], predictions: Sequence[str]) -> Estimate:
    """Say how often the prediction is the reference, character for character."""
    check_paired(references, predictions)
    pairs = zip(references, predictions, strict=True)
    return mean_estimate([reference == prediction for reference, prediction in pairs])
