"""How far a candidate's next-token distributions are from a reference's, on the same text.

Both models read the same tokens, the reference's own, and are asked at each of them what comes next (teacher forcing).
So one early slip does not make everything after it incomparable, as it does for texts that each model writes freely:

    reference   film, prompt, t0 t1 … ──▶ p(· | film, prompt, t0 … t(i-1))  ─┐   KL(p‖q) in nats
    candidate   film, prompt, t0 t1 … ──▶ q(· | film, prompt, t0 … t(i-1))  ─┴▶  the same top token?  NLL of ti in each

KL(p‖q) = Σ p (ln p − ln q) is what the candidate loses, 0 when it computes the same. The perplexity ratio only looks at
the probability of the tokens that are there, and may fall below 1 by luck. Where the text is the reference's own greedy
one, the first token on which the two disagree is the one where the candidate's own text would leave it.

What `compare_logits` keeps of a study are arrays over its tokens, not its logits: these are vocabulary times larger.
Intervals are those of `lite.bench.metrics`: studies drawn again, all tokens of a study together, as the tokens of one
text are anything but independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lite.bench.metrics import RESAMPLES, Estimate, Floats, bootstrap_interval
from lite.errors import LiteError

Bools: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyDivergence:
    """One study, token by token: arrays of the length of its text, at least 1."""

    kl: Floats  # [T], KL(reference ‖ candidate) in nats
    same_top: Bools  # [T], both give the same token the highest probability
    reference_nll: Floats  # [T], -ln of the probability that the reference gives to the token that is there, in nats
    candidate_nll: Floats  # [T]

    def __post_init__(self) -> None:
        """Refuse arrays that are empty or not of one length."""
        shapes = {np.shape(values) for values in (self.kl, self.same_top, self.reference_nll, self.candidate_nll)}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 1 or shape[0] < 1:
            msg = "got arrays of other shapes · expected four of one length, at least 1 · pass one value per token"
            raise LiteError(msg)

    @property
    def num_tokens(self) -> int:
        """The length of the text."""
        return len(self.kl)

    @property
    def first_divergent_token(self) -> int | None:
        """Where the top tokens differ for the first time, from 0; None where they never do."""
        return None if self.same_top.all() else int(self.same_top.argmin())


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceSummary:
    """All studies together. Not all of these are fractions: KL is in nats, a ratio may be above 1."""

    num_studies: int
    num_tokens: int
    mean_kl: Estimate  # nats per token, over all tokens
    median_kl: Estimate
    p99_kl: Estimate  # 99 % of the tokens have no more
    same_top: Estimate  # share of the tokens
    perplexity_ratio: Estimate  # candidate / reference, over all tokens; above 1: the candidate finds the text odder
    without_divergence: Estimate  # share of the studies whose every top token is the reference's
    first_divergent_token: Estimate  # median over the studies that diverge, its count; NaN if none does


def compare_logits(reference: ArrayLike, candidate: ArrayLike, target_ids: Sequence[int]) -> StudyDivergence:
    """Compare the logits with which two models predict each token of one study's text.

    Args:
        reference: [T, V], what `FindingsModel.score` returns; computed with in float64 whatever it comes in.
        candidate: [T, V], on the same tokens.
        target_ids: [T], the tokens themselves, below V.

    Raises:
        LiteError: shapes that do not fit each other, a token outside the vocabulary, or logits that are not finite.
    """
    shapes = np.shape(reference), np.shape(candidate)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != len(target_ids) or not len(target_ids):
        msg = (
            f"got logits {list(shapes[0])} and {list(shapes[1])} for {len(target_ids)} tokens · expected [T, V] twice, "
            "with T tokens, at least one · score both models on the same tokens, with one tokenizer"
        )
        raise LiteError(msg)
    targets = np.asarray(target_ids, dtype=np.int64)
    if targets.min() < 0 or targets.max() >= shapes[0][1]:
        msg = (
            f"got token ids from {targets.min()} to {targets.max()} · expected 0 to {shapes[0][1] - 1}, the columns of "
            "the logits · check that the text comes from the same tokenizer"
        )
        raise LiteError(msg)
    log_p, log_q = _log_softmax(reference, "reference"), _log_softmax(candidate, "candidate")
    rows = np.arange(len(targets))
    # Of equals argmax takes the first, as greedy decoding does.
    same_top = log_p.argmax(axis=1) == log_q.argmax(axis=1)
    reference_nll, candidate_nll = -log_p[rows, targets], -log_q[rows, targets]
    np.subtract(log_p, log_q, out=log_q)
    kl = np.einsum("tv,tv->t", np.exp(log_p, out=log_p), log_q)
    # A KL is never negative; sums of float64 miss 0 by some 1e-17.
    return StudyDivergence(
        kl=np.maximum(kl, 0.0), same_top=same_top, reference_nll=reference_nll, candidate_nll=candidate_nll
    )


def _log_softmax(logits: ArrayLike, whose: str) -> Floats:
    shifted = np.array(logits, dtype=np.float64)
    if not np.isfinite(shifted).all():
        msg = (
            f"got logits of the {whose} that are not finite · expected numbers · its arithmetic overflows: load it in "
            "float32, or export it again"
        )
        raise LiteError(msg)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def summarise(studies: Sequence[StudyDivergence], *, resamples: int = RESAMPLES, seed: int = 0) -> DivergenceSummary:
    """Put studies together, each figure with its bootstrap interval over studies.

    Quantiles are the smallest value that is reached: of an even number of values the median is the lower middle one.

    Args:
        studies: at least one.
        resamples: how many times the studies are drawn again.
        seed: of the resamples; the same studies are drawn for every figure, and for every candidate.

    Raises:
        LiteError: no studies.
    """
    if not studies:
        raise LiteError("got no studies · expected at least one · compare some first")
    num_studies, num_tokens = len(studies), sum(study.num_tokens for study in studies)
    sums = np.array(
        [
            (
                study.num_tokens,
                study.kl.sum(),
                study.same_top.sum(),
                study.candidate_nll.sum() - study.reference_nll.sum(),
                1,
                study.same_top.all(),
            )
            for study in studies
        ],
        dtype=np.float64,
    )
    # Quantiles are no functions of such sums. They are functions of how often each study was drawn, and that is the sum
    # of rows of the identity.
    draws = np.eye(num_studies)
    owner = np.repeat(np.arange(num_studies), [study.num_tokens for study in studies])
    kl = np.concatenate([study.kl for study in studies])
    first = [study.first_divergent_token for study in studies]
    diverging = np.array([index for index, token in enumerate(first) if token is not None], dtype=np.int64)
    positions = np.array([token for token in first if token is not None], dtype=np.float64)

    def estimate(table: Floats, statistic: Callable[[Floats], Floats], count: int) -> Estimate:
        return bootstrap_interval(table, statistic, count=count, resamples=resamples, seed=seed)

    return DivergenceSummary(
        num_studies=num_studies,
        num_tokens=num_tokens,
        mean_kl=estimate(sums, lambda s: s[:, 1] / s[:, 0], num_tokens),
        median_kl=estimate(draws, _quantile_of_drawn(kl, owner, 0.5), num_tokens),
        p99_kl=estimate(draws, _quantile_of_drawn(kl, owner, 0.99), num_tokens),
        same_top=estimate(sums, lambda s: s[:, 2] / s[:, 0], num_tokens),
        perplexity_ratio=estimate(sums, lambda s: np.exp(s[:, 3] / s[:, 0]), num_tokens),
        without_divergence=estimate(sums, lambda s: s[:, 5] / s[:, 4], num_studies),
        first_divergent_token=estimate(draws, _quantile_of_drawn(positions, diverging, 0.5), len(positions)),
    )


def _quantile_of_drawn(values: Floats, owner: NDArray[np.int64], share: float) -> Callable[[Floats], Floats]:
    """Return the statistic "quantile of `values`, each as often as its study was drawn"; NaN where none was."""
    order = np.argsort(values, kind="stable")
    ranked, owner = values[order], owner[order]

    def of_draws(draws: Floats) -> Floats:
        quantiles = np.full(len(draws), np.nan)
        # A row at a time: rows times tokens would be large.
        for row, times in enumerate(draws):
            reached = np.cumsum(times[owner])
            if reached.size and reached[-1] > 0:
                quantiles[row] = ranked[np.searchsorted(reached, share * reached[-1])]
        return quantiles

    return of_draws
