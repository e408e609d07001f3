"""Divergence from a reference, against torch's own formulas and plainly resampled studies."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from numpy.typing import NDArray
from torch.nn import functional as F

from lite.bench.divergence import StudyDivergence, compare_logits, summarise
from lite.errors import LiteError

VOCAB = 50


def random_logits(num_tokens: int, *, seed: int, noise: float = 0.0) -> NDArray[np.float32]:
    """Logits of one text; those with noise are near those without."""
    plain = np.random.default_rng(seed).normal(0, 3, (num_tokens, VOCAB))
    return (plain + noise * np.random.default_rng([seed, 1]).normal(0, 1, plain.shape)).astype(np.float32)


def random_study(num_tokens: int, *, seed: int, noise: float = 0.5) -> StudyDivergence:
    targets = np.random.default_rng([seed, 2]).integers(VOCAB, size=num_tokens).tolist()
    return compare_logits(
        random_logits(num_tokens, seed=seed), random_logits(num_tokens, seed=seed, noise=noise), targets
    )


def test_tokens_are_compared_as_torch_compares_them() -> None:
    reference, candidate = random_logits(30, seed=1), random_logits(30, seed=1, noise=1.0)
    targets = list(range(30))
    study = compare_logits(reference, candidate, targets)
    p, q = torch.from_numpy(reference).double(), torch.from_numpy(candidate).double()
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(study.kl, kl.numpy(), rtol=1e-10)
    for nll, logits in ((study.reference_nll, p), (study.candidate_nll, q)):
        expected = F.cross_entropy(logits, torch.tensor(targets), reduction="none")
        np.testing.assert_allclose(nll, expected.numpy(), rtol=1e-10)
    same_top = (p.argmax(-1) == q.argmax(-1)).tolist()
    assert study.same_top.tolist() == same_top
    assert 0 < sum(same_top) < 30
    assert study.first_divergent_token == same_top.index(False)
    assert study.num_tokens == 30


def test_a_worked_example() -> None:
    # p = (3/4, 1/4), q = (1/4, 3/4) at the first token, and the same at the second, with a constant added.
    reference = np.log([[0.75, 0.25], [0.5, 0.5]])
    study = compare_logits(reference, np.log([[0.25, 0.75], [0.5, 0.5]]) + 7, [0, 1])
    np.testing.assert_allclose(study.kl, [0.5 * math.log(3), 0], atol=1e-12)
    assert study.same_top.tolist() == [False, True]
    assert study.first_divergent_token == 0
    summary = summarise([study])
    assert summary.mean_kl.value == pytest.approx(0.25 * math.log(3))
    assert summary.perplexity_ratio.value == pytest.approx(math.sqrt(3))
    assert summary.same_top.value == 0.5


def test_the_same_logits_do_not_diverge_at_all() -> None:
    studies = [random_study(4 + seed, seed=seed, noise=0.0) for seed in range(5)]
    summary = summarise(studies)
    assert all(study.first_divergent_token is None for study in studies)
    for estimate, value in (
        (summary.mean_kl, 0),
        (summary.median_kl, 0),
        (summary.p99_kl, 0),
        (summary.same_top, 1),
        (summary.perplexity_ratio, 1),
        (summary.without_divergence, 1),
    ):
        assert (estimate.value, estimate.low, estimate.high) == (value, value, value)
    assert math.isnan(summary.first_divergent_token.value)
    assert summary.first_divergent_token.count == 0


def test_kl_is_never_negative_and_no_logit_is_too_large() -> None:
    huge = random_logits(200, seed=3) * 1e4
    assert np.isfinite(compare_logits(huge, -huge, [0] * 200).kl).all()
    # Without the floor, rounding leaves about half of these below 0.
    shifted = random_logits(200, seed=3).astype(np.float64) + 0.1
    study = compare_logits(random_logits(200, seed=3), shifted, [0] * 200)
    assert 0 <= study.kl.min() <= study.kl.max() < 1e-12


def test_what_is_kept_of_a_study_does_not_grow_with_the_vocabulary() -> None:
    study = random_study(7, seed=1)
    assert [study.kl.shape, study.same_top.shape, study.reference_nll.shape, study.candidate_nll.shape] == [(7,)] * 4
    assert study.kl.base is None
    assert study.reference_nll.base is None


def test_figures_and_intervals_are_those_of_studies_drawn_again() -> None:
    # Some texts long and much changed, some short and hardly: no figure is the mean of the studies' own.
    studies = [random_study(3 + 5 * seed, seed=seed, noise=0.05 + 0.1 * (seed % 4)) for seed in range(12)]
    assert 0 < sum(study.first_divergent_token is None for study in studies) < len(studies)
    summary = summarise(studies, resamples=40, seed=9)
    rng = np.random.default_rng(9)
    drawn = [range(12), *(rng.integers(12, size=12) for _ in range(40))]
    figures: dict[str, list[float]] = {}
    for indices in drawn:
        sample = [studies[index] for index in indices]
        kl = np.concatenate([study.kl for study in sample])
        nll = [
            np.concatenate([getattr(s, f"{name}_nll") for s in sample]).mean() for name in ("candidate", "reference")
        ]
        first = [study.first_divergent_token for study in sample if study.first_divergent_token is not None]
        for name, value in {
            "mean_kl": kl.mean(),
            "median_kl": np.quantile(kl, 0.5, method="inverted_cdf"),
            "p99_kl": np.quantile(kl, 0.99, method="inverted_cdf"),
            "same_top": np.concatenate([study.same_top for study in sample]).mean(),
            "perplexity_ratio": math.exp(nll[0] - nll[1]),
            "without_divergence": 1 - len(first) / 12,
            "first_divergent_token": np.quantile(first, 0.5, method="inverted_cdf"),
        }.items():
            figures.setdefault(name, []).append(float(value))
    for name, (value, *resampled) in figures.items():
        estimate = getattr(summary, name)
        assert estimate.value == pytest.approx(value), name
        assert (estimate.low, estimate.high) == pytest.approx(tuple(np.percentile(resampled, (2.5, 97.5)))), name
        assert estimate.low < estimate.high, name
    assert summary.num_studies == 12
    assert summary.num_tokens == summary.mean_kl.count == sum(3 + 5 * seed for seed in range(12))
    assert summary.first_divergent_token.count == sum(study.first_divergent_token is not None for study in studies)


@pytest.mark.parametrize(
    ("reference", "candidate", "targets", "message"),
    [
        ((3, 5), (3, 6), [0, 1, 2], r"got logits \[3, 5\] and \[3, 6\] for 3 tokens.*one tokenizer"),
        ((3, 5), (3, 5), [0, 1], "for 2 tokens"),
        ((0, 5), (0, 5), [], "at least one"),
        ((5,), (5,), [0], r"\[T, V\] twice"),
        ((2, 5), (2, 5), [0, 5], "got token ids from 0 to 5 · expected 0 to 4"),
        ((2, 5), (2, 5), [-1, 4], "got token ids from -1 to 4"),
    ],
)
def test_what_does_not_fit_is_refused(
    reference: tuple[int, ...], candidate: tuple[int, ...], targets: list[int], message: str
) -> None:
    with pytest.raises(LiteError, match=message):
        compare_logits(np.zeros(reference), np.zeros(candidate), targets)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("whose", ["reference", "candidate"])
def test_logits_that_are_no_numbers_are_refused(bad: float, whose: str) -> None:
    logits = {"reference": np.zeros((2, 5)), "candidate": np.zeros((2, 5))}
    logits[whose][1, 3] = bad
    with pytest.raises(LiteError, match=f"logits of the {whose} that are not finite"):
        compare_logits(logits["reference"], logits["candidate"], [0, 1])


def test_nothing_to_summarise_is_refused() -> None:
    with pytest.raises(LiteError, match="got no studies"):
        summarise([])
    study = random_study(3, seed=1)
    with pytest.raises(LiteError, match="one value per token"):
        StudyDivergence(
            kl=study.kl, same_top=study.same_top[:2], reference_nll=study.kl, candidate_nll=study.candidate_nll
        )


def test_it_needs_no_torch() -> None:
    code = "import sys, lite.bench.divergence; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
