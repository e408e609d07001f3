"""How good drafted findings are beside the reference: label F1, side and size accuracy, ROUGE-L, BLEU.

Every figure is a fraction between 0 and 1 and comes with a bootstrap interval: the studies are drawn again with
replacement, 500 times, and the middle 95 % of the results is the interval. All figures here are functions of sums over
studies (of true positives, of matched n-grams, of lengths), so each study is measured once and a resample only adds
rows of a small table.

A figure that has nothing to be measured on is NaN, not 0 and not 1: the precision of a label that was never predicted,
the F1 of a label that neither side has. F1 is 2tp / (2tp + fp + fn), so a label that is in the reference and was never
predicted has F1 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lite.errors import BackendUnavailable
from lite.eval.labels import LABELS, Label, Reading, read_labels

Floats: TypeAlias = NDArray[np.float64]
Readings: TypeAlias = Mapping[Label, Reading]
Uncertain = Literal["negative", "positive"]
Attribute = Literal["side", "size", "zone"]

RESAMPLES = 500
_INSTALL = 'install it with: pip install "llava-rad-lite[bench]"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure, its 95 % bootstrap interval, and how many cases it was measured on."""

    value: float
    low: float
    high: float
    count: int


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
    uncertain: Uncertain


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingsScores:
    """Everything this module measures, on one set of studies."""

    count: int
    label_f1: LabelF1
    side_accuracy: Estimate
    size_accuracy: Estimate
    zone_accuracy: Estimate
    rouge_l: Estimate
    bleu_1: Estimate
    bleu_4: Estimate


def _ratio(part: Floats, whole: Floats) -> Floats:
    """Divide, NaN where there is nothing to divide by."""
    ratio: Floats = np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)
    return ratio


def check_paired(references: Sequence[object], predictions: Sequence[object]) -> None:
    """Require one prediction for each reference, and at least one.

    Raises:
        ValueError: there are not.
    """
    if len(references) != len(predictions) or not references:
        msg = (
            f"got {len(references)} references and {len(predictions)} predictions · expected one prediction for each "
            "reference, and at least one · pass them in the same order"
        )
        raise ValueError(msg)


def _resampled_sums(per_study: Floats, resamples: int, seed: int) -> Floats:
    """Return the sums over all studies, and below them the sums over each resample: [1 + resamples, k]."""
    num_studies = len(per_study)
    rng = np.random.default_rng(seed)
    sums = np.empty((1 + resamples, per_study.shape[1]))
    sums[0] = per_study.sum(axis=0)
    for row in range(1, 1 + resamples):
        sums[row] = np.bincount(rng.integers(num_studies, size=num_studies), minlength=num_studies) @ per_study
    return sums


def _estimate(figures: Floats, count: int) -> Estimate:
    """Make an estimate of a figure on all studies and, after it, on each resample."""
    resampled = figures[1:][~np.isnan(figures[1:])]
    low, high = np.percentile(resampled, (2.5, 97.5)) if resampled.size else (np.nan, np.nan)
    return Estimate(value=float(figures[0]), low=float(low), high=float(high), count=count)


def bootstrap_interval(
    per_study: Floats,
    statistic: Callable[[Floats], Floats],
    *,
    count: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Measure `statistic` on all studies, with the middle 95 % of what it is on resampled ones.

    Resamples on which the statistic is undefined (NaN) are left out of the interval.

    Args:
        per_study: [num_studies, k], what each study adds to each of k sums.
        statistic: maps sums [n, k] to figures [n], row by row.
        count: what the estimate says it was measured on; the number of studies when not given.
        resamples: how many times the studies are drawn again, with replacement.
        seed: the same seed draws the same studies, whatever the statistic.
    """
    figures = statistic(_resampled_sums(per_study, resamples, seed))
    return _estimate(figures, len(per_study) if count is None else count)


def _is_positive(reading: Reading, uncertain: Uncertain) -> bool:
    return reading.status == "positive" or (uncertain == "positive" and reading.status == "uncertain")


def _f1(counts: Floats) -> Floats:
    """Turn true positives, false positives and false negatives [..., 3] into F1 [...]."""
    tp, fp, fn = np.moveaxis(counts, -1, 0)
    return _ratio(2 * tp, 2 * tp + fp + fn)


def _macro_f1(counts: Floats) -> Floats:
    """Average F1 over the labels with support, counts [n, labels, 3] to [n]."""
    supported = counts[..., 0] + counts[..., 2] > 0
    f1 = np.where(supported, _f1(counts), 0.0)
    return _ratio(f1.sum(axis=1), supported.sum(axis=1).astype(np.float64))


def label_f1(
    references: Sequence[Readings],
    predictions: Sequence[Readings],
    *,
    labels: Sequence[Label] = LABELS,
    uncertain: Uncertain = "negative",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> LabelF1:
    """Compare the labels read from the references with those read from the predictions.

    Args:
        references: what `read_labels` says of each reference text.
        predictions: the same for the predicted texts, in the same order.
        labels: the labels to look at.
        uncertain: what an uncertain label counts as, on both sides. Negated and unmentioned are always negative.
        resamples: how many bootstrap resamples.
        seed: the seed of the resamples.
    """
    check_paired(references, predictions)
    truth = np.array([[_is_positive(study[label], uncertain) for label in labels] for study in references])
    drafted = np.array([[_is_positive(study[label], uncertain) for label in labels] for study in predictions])
    counts = np.stack([truth & drafted, ~truth & drafted, truth & ~drafted], axis=-1).astype(np.float64)
    num_studies = len(references)
    sums = _resampled_sums(counts.reshape(num_studies, -1), resamples, seed).reshape(-1, len(labels), 3)
    by_label = _f1(sums)
    tp, fp, fn = np.moveaxis(sums[0], -1, 0)
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    per_label = tuple(
        LabelScore(
            label=label,
            precision=float(precision[index]),
            recall=float(recall[index]),
            f1=_estimate(by_label[:, index], num_studies),
            support=int(tp[index] + fn[index]),
            predicted=int(tp[index] + fp[index]),
        )
        for index, label in enumerate(labels)
    )
    return LabelF1(
        micro=_estimate(_f1(sums.sum(axis=1)), num_studies),
        macro=_estimate(_macro_f1(sums), num_studies),
        per_label=per_label,
        uncertain=uncertain,
    )


def attribute_accuracy(
    references: Sequence[Readings],
    predictions: Sequence[Readings],
    attribute: Attribute,
    *,
    uncertain: Uncertain = "negative",
    resamples: int = RESAMPLES,
    seed: int = 0,
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
            both = _is_positive(reading, uncertain) and _is_positive(drafted[label], uncertain)
            if both and expected is not None:
                row += (getattr(drafted[label], attribute) == expected, 1)
    return bootstrap_interval(
        per_study,
        lambda sums: _ratio(sums[:, 0], sums[:, 1]),
        count=int(per_study[:, 1].sum()),
        resamples=resamples,
        seed=seed,
    )


def rouge_l(
    references: Sequence[str], predictions: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
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
    scores = [scorer.score(reference, prediction)["rougeL"].fmeasure for reference, prediction in pairs]
    per_study = np.array([[score, 1.0] for score in scores])
    return bootstrap_interval(per_study, lambda sums: _ratio(sums[:, 0], sums[:, 1]), resamples=resamples, seed=seed)


def bleu_1(
    references: Sequence[str], predictions: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Compute the BLEU-1 of the whole corpus, in all else as `bleu_4`.

    Raises:
        BackendUnavailable: sacrebleu is not installed.
    """
    return _bleu(references, predictions, max_ngram_order=1, resamples=resamples, seed=seed)


def bleu_4(
    references: Sequence[str], predictions: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Compute the BLEU-4 of the whole corpus: sacrebleu, lower case, 13a tokenisation, exponential smoothing.

    Published report-generation figures come from several other tokenisers: compare within this instrument only.

    Raises:
        BackendUnavailable: sacrebleu is not installed.
    """
    return _bleu(references, predictions, max_ngram_order=4, resamples=resamples, seed=seed)


def _bleu(
    references: Sequence[str], predictions: Sequence[str], *, max_ngram_order: int, resamples: int, seed: int
) -> Estimate:
    check_paired(references, predictions)
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        msg = f"got no sacrebleu package · BLEU is computed by it · {_INSTALL}"
        raise BackendUnavailable(msg) from error
    bleu = BLEU(lowercase=True, tokenize="13a", max_ngram_order=max_ngram_order)
    per_study = np.empty((len(references), 2 * max_ngram_order + 2))
    for row, reference, prediction in zip(per_study, references, predictions, strict=True):
        score = bleu.corpus_score([prediction], [[reference]])
        row[:] = (*score.counts, *score.totals, score.sys_len, score.ref_len)

    def of_row(row: list[int]) -> float:
        matched, total, (sys_len, ref_len) = row[:max_ngram_order], row[max_ngram_order:-2], row[-2:]
        score = BLEU.compute_bleu(
            matched, total, sys_len, ref_len, smooth_method="exp", max_ngram_order=max_ngram_order
        )
        return score.score / 100

    return bootstrap_interval(
        per_study,
        lambda sums: np.array([of_row(row) for row in sums.astype(int).tolist()]),
        resamples=resamples,
        seed=seed,
    )


def same_text(
    references: Sequence[str], predictions: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Say how often the prediction is the reference, character for character."""
    check_paired(references, predictions)
    pairs = zip(references, predictions, strict=True)
    per_study = np.array([[reference == prediction, 1.0] for reference, prediction in pairs])
    return bootstrap_interval(per_study, lambda sums: sums[:, 0] / sums[:, 1], resamples=resamples, seed=seed)


def score_findings(
    references: Sequence[str],
    predictions: Sequence[str],
    *,
    truth: Sequence[Readings] | None = None,
    uncertain: Uncertain = "negative",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> FindingsScores:
    """Measure everything on pairs of texts.

    Args:
        references: the reference texts.
        predictions: the predicted texts, in the same order.
        truth: the labels of the references where they are known; otherwise they are read from the texts, as those of
            the predictions always are.
        uncertain: what an uncertain label counts as, on both sides.
        resamples: how many bootstrap resamples.
        seed: the seed of the resamples.

    Raises:
        BackendUnavailable: rouge-score or sacrebleu is not installed.
    """
    check_paired(references, predictions)
    truth = [read_labels(text) for text in references] if truth is None else truth
    drafted = [read_labels(text) for text in predictions]

    def accuracy(attribute: Attribute) -> Estimate:
        return attribute_accuracy(truth, drafted, attribute, uncertain=uncertain, resamples=resamples, seed=seed)

    return FindingsScores(
        count=len(references),
        label_f1=label_f1(truth, drafted, uncertain=uncertain, resamples=resamples, seed=seed),
        side_accuracy=accuracy("side"),
        size_accuracy=accuracy("size"),
        zone_accuracy=accuracy("zone"),
        rouge_l=rouge_l(references, predictions, resamples=resamples, seed=seed),
        bleu_1=bleu_1(references, predictions, resamples=resamples, seed=seed),
        bleu_4=bleu_4(references, predictions, resamples=resamples, seed=seed),
    )
