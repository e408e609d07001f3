"""The figures that everything is judged by, against worked examples, independent formulas and sacrebleu itself."""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import numpy as np
import pytest

from lite.errors import BackendUnavailable
from lite.eval.figures import Floats, bootstrap_interval
from lite.eval.labels import LABELS, Label, Reading, Side, Size, Status
from lite.eval.metrics import Readings, attribute_accuracy, bleu, label_f1, rouge_l, same_text


def read(
    *positive: Label, uncertain: tuple[Label, ...] = (), side: Side | None = None, size: Size | None = None
) -> Readings:
    """Return the readings of a study, with the same side and size for every label that is positive or uncertain."""

    def reading(label: Label) -> Reading:
        status: Status = "positive" if label in positive else "uncertain" if label in uncertain else "absent"
        there = status != "absent"
        return Reading(status=status, side=side if there else None, size=size if there else None)

    return {label: reading(label) for label in LABELS}


REFERENCES = [read("Edema", "Cardiomegaly"), read("Edema"), read("Fracture"), read(uncertain=("Edema",))]
PREDICTIONS = [read("Edema"), read("Edema", "Fracture"), read("Fracture"), read("Edema")]


def scores_of(label: Label) -> tuple[float, float, float, int, int]:
    rows = label_f1(REFERENCES, PREDICTIONS).per_label
    row = next(row for row in rows if row.label == label)
    return row.precision, row.recall, row.f1.value, row.support, row.predicted


def test_label_f1_of_a_worked_example() -> None:
    # Edema: tp 2, fp 1 (the uncertain one), fn 0. Cardiomegaly: fn 1. Fracture: tp 1, fp 1.
    assert scores_of("Edema") == (pytest.approx(2 / 3), 1.0, pytest.approx(0.8), 2, 3)
    precision, recall, f1, support, predicted = scores_of("Cardiomegaly")
    assert math.isnan(precision)
    assert (recall, f1, support, predicted) == (0.0, 0.0, 1, 0)
    result = label_f1(REFERENCES, PREDICTIONS)
    assert result.micro.value == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    assert result.macro.value == pytest.approx((0.8 + 0.0 + 2 / 3) / 3)
    assert result.micro.count == len(REFERENCES)


def test_a_label_that_neither_side_has_is_undefined_and_outside_the_macro_average() -> None:
    _, _, f1, support, predicted = scores_of("Pneumothorax")
    assert math.isnan(f1)
    assert (support, predicted) == (0, 0)
    # A label only predicted is wrong (F1 0) and lowers micro, but macro is over the labels of the references.
    result = label_f1([read("Edema")], [read("Edema", "Pneumonia")])
    assert next(row for row in result.per_label if row.label == "Pneumonia").f1.value == 0.0
    assert result.macro.value == 1.0
    assert result.micro.value == pytest.approx(2 / 3)


def test_nothing_to_measure_is_nan_and_never_a_warning() -> None:
    result = label_f1([read()], [read()])
    assert math.isnan(result.micro.value)
    assert math.isnan(result.macro.low)
    assert math.isnan(attribute_accuracy([read()], [read()], "side").estimate().value)


@pytest.mark.parametrize(
    ("drafted", "value", "count"),
    [
        (read("Pneumothorax", side="left"), 1.0, 1),
        (read("Pneumothorax", side="right"), 0.0, 1),
        (read("Pneumothorax"), 0.0, 1),  # left out is wrong
        (read("Edema", side="left"), math.nan, 0),  # missed: not a question of side
    ],
)
def test_side_accuracy(drafted: Readings, value: float, count: int) -> None:
    estimate = attribute_accuracy([read("Pneumothorax", side="left")], [drafted], "side").estimate()
    assert estimate.value == pytest.approx(value, nan_ok=True)
    assert estimate.count == count


def test_size_accuracy_ignores_references_without_a_size() -> None:
    references = [read("Edema", "Pneumothorax", size="small"), read("Edema")]
    predictions = [read("Edema", "Pneumothorax", size="large"), read("Edema", size="large")]
    estimate = attribute_accuracy(references, predictions, "size").estimate()
    assert (estimate.value, estimate.count) == (0.0, 2)


TEXTS = [
    ("The heart is normal in size.", "Heart size is normal."),
    ("There is a small left pleural effusion. The lungs are clear.", "There is a small right pleural effusion."),
    ("No pneumothorax.", "No pneumothorax."),
    ("Right upper zone consolidation.", ""),
]
TEXT_REFERENCES = [reference for reference, _ in TEXTS]
TEXT_PREDICTIONS = [prediction for _, prediction in TEXTS]


def lcs_f(reference: str, prediction: str) -> float:
    """ROUGE-L's F-measure from its definition."""
    ours, theirs = (text.lower().replace(".", "").split() for text in (reference, prediction))
    table = np.zeros((len(ours) + 1, len(theirs) + 1))
    for i, word in enumerate(ours):
        for j, other in enumerate(theirs):
            table[i + 1, j + 1] = table[i, j] + 1 if word == other else max(table[i, j + 1], table[i + 1, j])
    common = table[-1, -1]
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def test_rouge_l_is_the_mean_over_studies_of_the_definition() -> None:
    expected = np.mean([lcs_f(reference, prediction) for reference, prediction in TEXTS])
    assert rouge_l(TEXT_REFERENCES, TEXT_PREDICTIONS).estimate().value == pytest.approx(expected)


@pytest.mark.parametrize("order", [1, 4])
@pytest.mark.parametrize("count", [1, len(TEXTS)])  # the first text alone has no 4-gram in common: smoothing
def test_bleu_from_sums_is_sacrebleus_own_corpus_figure(order: int, count: int) -> None:
    import sacrebleu

    references, predictions = TEXT_REFERENCES[:count], TEXT_PREDICTIONS[:count]
    theirs = sacrebleu.BLEU(lowercase=True, max_ngram_order=order)
    expected = theirs.corpus_score(predictions, [references]).score / 100
    assert 0 < expected < 1
    assert bleu(references, predictions, order).estimate().value == pytest.approx(expected)
    assert bleu(references, [""] * count, order).estimate().value == 0.0


def test_bleu_1_of_a_worked_example() -> None:
    # Of "a small effusion ." two words and the full stop are in the reference; it is 4 long, the reference 5: the
    # brevity penalty is exp(1 - 5/4).
    estimate = bleu(["Small left pleural effusion."], ["A small effusion."], 1).estimate()
    assert estimate.value == pytest.approx(3 / 4 * math.exp(1 - 5 / 4))


def test_same_text_is_the_share_of_texts_that_are_equal_to_the_character() -> None:
    predictions = ["Clear lungs.", "clear lungs.", "Clear lungs. ", "Clear lungs."]
    estimate = same_text(["Clear lungs."] * 4, predictions)
    assert (estimate.value, estimate.count) == (0.5, 4)
    assert 0 <= estimate.low < 0.5 < estimate.high <= 1


@pytest.mark.parametrize(
    ("metric", "package"), [(rouge_l, "rouge_score"), (functools.partial(bleu, order=4), "sacrebleu")]
)
def test_a_missing_package_names_the_extra(metric: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendUnavailable, match=r"llava-rad-lite\[bench\]"):
        metric(TEXT_REFERENCES, TEXT_PREDICTIONS)


def mean_of_sums(sums: Floats) -> Floats:
    mean: Floats = sums[:, 0] / sums[:, 1]
    return mean


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(3).normal(0.5, 0.1, size=400)
    estimate = bootstrap_interval(np.stack([values, np.ones_like(values)], axis=1), mean_of_sums)
    half_width = 1.96 * values.std() / math.sqrt(len(values))
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half_width, abs=0.3 * half_width)
    assert estimate.high == pytest.approx(values.mean() + half_width, abs=0.3 * half_width)


def test_the_interval_is_seeded_and_leaves_undefined_resamples_out() -> None:
    # One study in four carries anything: many resamples have nothing to divide by.
    per_study = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])

    def ratio(sums: Floats) -> Floats:
        return np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] > 0)

    estimate = bootstrap_interval(per_study, ratio)
    assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)
    varied = np.stack([np.arange(20.0), np.ones(20)], axis=1)
    first, again = (bootstrap_interval(varied, mean_of_sums, seed=5) for _ in range(2))
    assert first == again
    assert first != bootstrap_interval(varied, mean_of_sums, seed=6)


def test_unpaired_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 references and 1 predictions"):
        rouge_l(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="at least one"):
        rouge_l([], [])
