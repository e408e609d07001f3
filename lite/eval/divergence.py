"""How far a candidate's next-token distributions are from a reference's, on the same text.

Both models read the same tokens, the reference's own, and are asked at each of them what comes next (teacher forcing).
So one early slip does not make everything after it incomparable, as it does for texts that each model writes freely:

    reference   film, prompt, t0 t1 … ──▶ p(· | film, prompt, t0 … t(i-1))  ─┐   KL(p‖q) in nats
    candidate   film, prompt, t0 t1 … ──▶ q(· | film, prompt, t0 … t(i-1))  ─┴▶  the same top token?  NLL of ti in each

KL(p‖q) = Σ p (ln p − ln q) is what the candidate loses, 0 when it computes the same. The perplexity ratio only looks at
the probability of the tokens that are there, and may fall below 1 by luck. Where the text is the reference's own greedy
one, the first token on which the two disagree is the one where the candidate's own text would leave it.

A reference that is only recorded has kept the k most probable tokens and, as one more class, all others together:

    p over the vocabulary     p1 p2 … pk │ p(k+1) … pV          KL(p‖q) = KL over k + 1 classes + the gap
    what is kept              p1 p2 … pk │ tail mass            gap = tail mass · KL inside the tail ≥ 0

Pooling classes never raises a KL (the data-processing inequality), so what `compare_top_k` gives is a lower bound,
exact where the tail has no mass. `gap_limit` says how much may be missing: it knows the candidate's tail, and of the
reference's that it sums to the tail mass with no token above the k-th. That limit is a guarantee, not an estimate, and
often far from the gap; the gap itself takes both models' logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lite.errors import LiteError
from lite.eval.figures import Estimate, Floats, bootstrap_interval, mean_estimate

Bools: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyDivergence:
    """One study, token by token: arrays of the length of its text, at least 1."""

    kl: Floats  # [T], KL(reference ‖ candidate) in nats
    same_top: Bools  # [T], both give the same token the highest probability
    reference_nll: Floats  # [T], -ln of the probability that the reference gives to the token that is there, in nats
    candidate_nll: Floats  # [T]

    @property
    def num_tokens(self) -> int:
        """The length of the text."""
        return len(self.kl)

    @property
    def first_divergent_token(self) -> int | None:
        """Where the top tokens differ for the first time, from 0; None where they never do."""
        return None if self.same_top.all() else int(self.same_top.argmin())


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """What is kept of a reference's distributions over one text: log-probabilities of k tokens, and of all others."""

    ids: NDArray[np.integer[Any]]  # [T, k], the most probable token first; of equals the one that greedy decoding takes
    log_probs: NDArray[np.floating[Any]]  # [T, k], falling
    log_tail: NDArray[np.floating[Any]]  # [T], of all other tokens together; -inf where k is the whole vocabulary

    def __getitem__(self, tokens: slice) -> TopK:
        """Return the same of some of the tokens."""
        return TopK(ids=self.ids[tokens], log_probs=self.log_probs[tokens], log_tail=self.log_tail[tokens])

    @property
    def tail_mass(self) -> Floats:
        """The probability of all other tokens together, [T]."""
        mass: Floats = np.exp(self.log_tail, dtype=np.float64)
        return mass


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
        target_ids: [T], the tokens themselves.

    Raises:
        LiteError: shapes that do not fit each other, a token outside the vocabulary, or logits that are not finite.
    """
    _check_shape(reference, len(target_ids))
    _check_shape(candidate, len(target_ids), vocab_size=np.shape(reference)[1])
    targets = np.asarray(target_ids, dtype=np.int64)
    if targets.min() < 0 or targets.max() >= np.shape(reference)[1]:
        msg = (
            f"got token ids from {targets.min()} to {targets.max()} · expected 0 to {np.shape(reference)[1] - 1}, the "
            "columns of the logits · check that the text comes from the same tokenizer"
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


def top_k(logits: ArrayLike, k: int) -> TopK:
    """Keep the k most probable tokens of each of a reference's distributions, and the mass of the others.

    Args:
        logits: [T, V], what `FindingsModel.score` returns.
        k: at least 1; more than V are V.

    Raises:
        LiteError: logits that are not finite.
    """
    log_p = _log_softmax(logits, "reference")
    k = min(k, log_p.shape[1])
    # For [100, 32000] this takes 0.05 s, a stable sort of it all 1.3 s (one core of an AMD EPYC, November 2026).
    ids = np.sort(np.argpartition(log_p, -k, axis=1)[:, -k:], axis=1)
    order = np.argsort(-np.take_along_axis(log_p, ids, axis=1), axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    # It is there already, unless more than k tokens share the highest probability.
    ids[:, 0] = log_p.argmax(axis=1)
    log_probs, log_tail = _pool_others(log_p, ids)
    return TopK(ids=ids, log_probs=log_probs, log_tail=log_tail)


def compare_top_k(reference: TopK, candidate: ArrayLike, target_ids: Sequence[int]) -> StudyDivergence:
    """Compare a recorded reference with a candidate's logits: as `compare_logits`, but KL is a lower bound.

    What rounding has left of the reference is scaled to sum to 1.

    Raises:
        LiteError: as `compare_logits`, or a token is not among the reference's k.
    """
    _check_fits(reference, candidate, len(target_ids))
    log_q = _log_softmax(candidate, "candidate")
    targets = np.asarray(target_ids, dtype=np.int64)
    is_target = reference.ids == targets[:, None]
    if not (kept := is_target.any(axis=1)).all():
        position = int(kept.argmin())
        msg = (
            f"got token {targets[position]} at {position} · expected one of the {reference.ids.shape[1]} that the "
            "reference finds most probable there · compare along the reference's own greedy text"
        )
        raise LiteError(msg)
    same_top = reference.ids[:, 0] == log_q.argmax(axis=1)
    candidate_nll = -log_q[np.arange(len(targets)), targets]
    log_p, log_p_tail = _scaled(reference)
    log_q, log_q_tail = _pool_others(log_q, reference.ids)
    kl = np.einsum("tk,tk->t", np.exp(log_p), log_p - log_q)
    if np.isfinite(log_p_tail).all():  # there is a tail
        kl += np.exp(log_p_tail) * (log_p_tail - log_q_tail)
    return StudyDivergence(
        kl=np.maximum(kl, 0.0), same_top=same_top, reference_nll=-log_p[is_target], candidate_nll=candidate_nll
    )


def gap_limit(reference: TopK, candidate: ArrayLike) -> Floats:
    """Return, token by token, what the KL of `compare_top_k` is at most below that over the whole vocabulary.

    The worst reference there can be puts its tail on the tokens that the candidate finds least probable, each as
    probable as the k-th: KL is convex, so its maximum lies in such a corner.

    Returns:
        nats, [T]; 0 where k is the whole vocabulary.

    Raises:
        LiteError: shapes that do not fit each other, or logits that are not finite.
    """
    _check_fits(reference, candidate, len(reference.ids))
    log_p, log_p_tail = _scaled(reference)
    log_q = _log_softmax(candidate, "candidate")
    num_others = log_q.shape[1] - log_p.shape[1]
    if not num_others:
        return np.zeros(len(log_q))
    _, log_q_tail = _pool_others(log_q, reference.ids)
    # The k tokens are at -inf by now, so they come first.
    others = np.sort(log_q, axis=1)[:, -num_others:]
    cap, tail = np.exp(log_p[:, -1:]), np.exp(log_p_tail)
    # How much of the tail each token can take, those before it being full.
    taken = np.clip(tail[:, None] - cap * np.arange(num_others), 0.0, cap)
    log_taken = np.log(taken, out=np.zeros_like(taken), where=taken > 0)
    worst = np.einsum("tv,tv->t", taken, log_taken - others)
    gap: Floats = np.maximum(worst - tail * (log_p_tail - log_q_tail), 0.0)
    return gap


def _check_fits(reference: TopK, candidate: ArrayLike, num_tokens: int) -> None:
    _check_shape(reference.ids, num_tokens)
    _check_shape(candidate, num_tokens)
    if np.shape(candidate)[1] <= reference.ids.max():
        msg = f"got logits of {np.shape(candidate)[1]} tokens · expected more than {reference.ids.max()}, which is one"
        raise LiteError(f"{msg} of the reference's · score both models with one tokenizer")


def _check_shape(values: ArrayLike, num_tokens: int, *, vocab_size: int | None = None) -> None:
    shape = np.shape(values)
    if len(shape) != 2 or shape[0] != num_tokens or not num_tokens or shape[1] != (vocab_size or shape[1]):
        msg = (
            f"got logits {list(shape)} for {num_tokens} tokens · expected [T, {vocab_size or 'V'}], with T tokens, at "
            "least one · score both models on the same tokens, with one tokenizer"
        )
        raise LiteError(msg)


def _scaled(reference: TopK) -> tuple[Floats, Floats]:
    """Return the log-probabilities of the k tokens and of the tail, to float64's precision a distribution."""
    log_p = np.column_stack([reference.log_probs, reference.log_tail]).astype(np.float64)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    return log_p[:, :-1], log_p[:, -1]


def _pool_others(log_probs: Floats, ids: NDArray[np.integer[Any]]) -> tuple[Floats, Floats]:
    """Return the log-probabilities of `ids`, [T, k], and of all others together, [T]. Puts -inf in place of `ids`."""
    kept = np.take_along_axis(log_probs, ids, axis=1)
    if kept.shape == log_probs.shape:
        return kept, np.full(len(kept), -np.inf)
    np.put_along_axis(log_probs, ids, -np.inf, axis=1)
    highest = log_probs.max(axis=1)
    return kept, highest + np.log(np.exp(log_probs - highest[:, None]).sum(axis=1))


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


def summarise(studies: Sequence[StudyDivergence]) -> DivergenceSummary:
    """Put studies together, each figure with its bootstrap interval over studies.

    Studies are drawn again, all tokens of one together, the same ones for every figure and every candidate. Quantiles
    are the smallest value that is reached: of an even number of values the median is the lower middle one.

    Raises:
        LiteError: no studies.
    """
    if not studies:
        raise LiteError("got no studies · expected at least one · compare some first")
    num_studies, num_tokens = len(studies), sum(study.num_tokens for study in studies)
    owner = np.repeat(np.arange(num_studies), [study.num_tokens for study in studies])
    kl = np.concatenate([study.kl for study in studies])
    first = [study.first_divergent_token for study in studies]
    diverging = np.array([index for index, token in enumerate(first) if token is not None], dtype=np.int64)
    positions = np.array([token for token in first if token is not None], dtype=np.float64)

    def mean(of_study: Callable[[StudyDivergence], float], shown: Callable[[Floats], Floats] = np.array) -> Estimate:
        """Average sums over the tokens."""
        sums = np.array([(float(of_study(study)), study.num_tokens) for study in studies])
        return bootstrap_interval(sums, lambda s: shown(s[:, 0] / s[:, 1]), count=num_tokens)

    def quantile(values: Floats, owner: NDArray[np.int64], share: float) -> Estimate:
        """Take a quantile, which is a function of how often each study was drawn: the sum of the identity's rows."""
        return bootstrap_interval(np.eye(num_studies), _quantile_of_drawn(values, owner, share), count=len(values))

    return DivergenceSummary(
        num_studies=num_studies,
        num_tokens=num_tokens,
        mean_kl=mean(lambda study: study.kl.sum()),
        median_kl=quantile(kl, owner, 0.5),
        p99_kl=quantile(kl, owner, 0.99),
        same_top=mean(lambda study: study.same_top.sum()),
        perplexity_ratio=mean(lambda study: study.candidate_nll.sum() - study.reference_nll.sum(), np.exp),
        without_divergence=mean_estimate([bool(study.same_top.all()) for study in studies]),
        first_divergent_token=quantile(positions, diverging, 0.5),
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
