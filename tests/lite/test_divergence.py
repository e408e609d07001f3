"""Divergence from a reference, against torch's own formulas and plainly resampled studies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from lite.errors import LiteError
from lite.eval.divergence import StudyDivergence, TopK, compare_logits, compare_top_k, gap_limit, summarise, top_k

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
    summary = summarise(studies)
    rng = np.random.default_rng(0)
    drawn = [range(12), *(rng.integers(12, size=12) for _ in range(500))]
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
        ((3, 5), (3, 6), [0, 1, 2], r"got logits \[3, 6\] for 3 tokens · expected \[T, 5\].*one tokenizer"),
        ((3, 5), (3, 5), [0, 1], "for 2 tokens"),
        ((0, 5), (0, 5), [], "at least one"),
        ((5,), (5,), [0], r"got logits \[5\] for 1 tokens · expected \[T, V\]"),
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


LOGITS = {
    "flat": lambda plain: plain / 10,
    "random": lambda plain: plain,
    "peaked": lambda plain: plain * 10,
    "certain": lambda plain: plain * 1e4,
    "tied": lambda plain: plain.round(),
}


@pytest.mark.parametrize("shape", LOGITS)
@pytest.mark.parametrize("noise", [0.01, 1.0])
def test_kl_of_the_top_k_and_the_tail_is_a_lower_bound_that_more_tokens_raise(shape: str, noise: float) -> None:
    reference, candidate = (LOGITS[shape](random_logits(40, seed=4, noise=n)).astype(np.float32) for n in (0.0, noise))
    targets = reference.argmax(axis=1).tolist()
    full = compare_logits(reference, candidate, targets)
    below = np.zeros(40)
    for k in (1, 2, 5, 20, VOCAB - 1, VOCAB, 64):
        kept = top_k(reference, k)
        assert kept.ids.shape == kept.log_probs.shape == (40, min(k, VOCAB))
        study = compare_top_k(kept, candidate, targets)
        slack = 1e-12 * (1 + full.kl)
        assert (study.kl <= full.kl + slack).all()
        assert (study.kl >= below - slack).all()
        assert (full.kl <= study.kl + gap_limit(kept, candidate) + slack).all()
        below = study.kl
        np.testing.assert_array_equal(study.same_top, full.same_top)
        np.testing.assert_allclose(study.reference_nll, full.reference_nll, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(study.candidate_nll, full.candidate_nll)
    # One token more than k is a tail of one token: nothing is pooled.
    for k in (VOCAB - 1, VOCAB, 64):
        kept = top_k(reference, k)
        np.testing.assert_allclose(compare_top_k(kept, candidate, targets).kl, full.kl, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(gap_limit(kept, candidate), 0, atol=1e-12 * (1 + full.kl.max()))


def test_a_worked_example_of_pooling() -> None:
    # Of p = (1/2, 1/4, 3/16, 1/16) the first two are kept, in their own order; q is uniform.
    reference = np.log([[3 / 16, 0.5, 1 / 16, 0.25]])
    kept = top_k(reference, 2)
    assert kept.ids.tolist() == [[1, 3]]
    np.testing.assert_allclose(np.exp(kept.log_probs), [[0.5, 0.25]])
    np.testing.assert_allclose(kept.tail_mass, [0.25])
    study = compare_top_k(kept, np.zeros((1, 4)), [3])
    np.testing.assert_allclose(study.kl, [0.5 * math.log(2) + 0.25 * math.log(0.5)])
    np.testing.assert_allclose([study.reference_nll, study.candidate_nll], [[math.log(4)]] * 2)
    # The worst there can be is a tail of (1/4, 0).
    np.testing.assert_allclose(gap_limit(kept, np.zeros((1, 4))), [0.25 * math.log(2)])


def test_the_limit_of_the_gap_is_reached_by_the_worst_reference() -> None:
    # Beside the two kept, p is as probable as the second where q is least probable, then what is left, then nothing.
    reference = np.log([[0.5, 0.2, 0.1, 1e-300, 0.2], [0.5, 0.2, 0.2, 0.1, 1e-300]])
    candidate = np.log([[0.4, 0.3, 0.1, 0.15, 0.05], [0.4, 0.2, 0.05, 0.15, 0.2]])
    # By hand: which of the equals top_k would keep is its own affair.
    kept = TopK(ids=np.array([[0, 1]] * 2), log_probs=reference[:, :2], log_tail=np.log([0.3, 0.3]))
    study = compare_top_k(kept, candidate, [0, 0])
    gap = compare_logits(reference, candidate, [0, 0]).kl - study.kl
    np.testing.assert_allclose(gap, gap_limit(kept, candidate), rtol=1e-12)
    assert (gap > 0.01).all()


def test_rounding_what_is_kept_adds_no_divergence() -> None:
    logits = random_logits(60, seed=8)
    kept = top_k(logits, 16)
    rounded = TopK(
        ids=kept.ids.astype(np.uint8),
        log_probs=kept.log_probs.astype(np.float32),
        log_tail=kept.log_tail.astype(np.float32),
    )
    # Not scaled to sum to 1 again, these were some 1e-8.
    assert compare_top_k(rounded, logits, kept.ids[:, 0].tolist()).kl.max() < 1e-12


def test_of_equals_the_first_is_the_top_however_many_there_are() -> None:
    candidate = np.zeros((1, VOCAB))
    for k in (1, 4, VOCAB):
        kept = top_k(np.zeros((1, VOCAB)), k)
        assert kept.ids[0, 0] == 0
        assert len(set(kept.ids[0].tolist())) == k
        assert compare_top_k(kept, candidate, [0]).same_top.all()
    assert top_k([[1.0, 3.0, 2.0, 3.0, 3.0]], 2).ids[0, 0] == 1


def test_a_tail_too_small_for_a_probability_is_no_error() -> None:
    reference, candidate = np.array([[0.0, -1.0, -2e3, -2e3]]), np.array([[0.0, -1.0, -3e38, -3e38]])
    kept = top_k(reference, 2)
    assert kept.tail_mass == 0
    assert np.isfinite(kept.log_tail).all()
    assert compare_top_k(kept, candidate, [0]).kl == 0
    assert gap_limit(kept, candidate) == 0


@pytest.mark.parametrize(
    ("candidate", "targets", "message"),
    [
        ((3, VOCAB), [0, 1], r"got logits \[3, 50\] for 2 tokens · expected \[T, V\], with T tokens"),
        ((2, VOCAB), [0], "for 1 tokens"),
        ((2, 4), [0, 1], "got logits of 4 tokens · expected more than 9, .*one tokenizer"),
        ((VOCAB,), [0, 1], r"got logits \[50\]"),
        ((2, VOCAB), [0, VOCAB], "got token 50 at 1"),
        ((2, VOCAB), [1, 2], "got token 2 at 1 · expected one of the 4 .* own greedy text"),
    ],
)
def test_what_does_not_fit_what_was_kept_is_refused(
    candidate: tuple[int, ...], targets: list[int], message: str
) -> None:
    reference = np.zeros((2, VOCAB))
    reference[0, [0, 1, 7, 8]] = reference[1, [0, 1, 8, 9]] = 5.0
    with pytest.raises(LiteError, match=message):
        compare_top_k(top_k(reference, 4), np.zeros(candidate), targets)


def test_nothing_to_summarise_is_refused() -> None:
    with pytest.raises(LiteError, match="got no studies"):
        summarise([])
