"""How well signals tell false sentences from true ones, and how right the probabilities are: a table and a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lite.artifact.manifest import NOTICE
from lite.bench.report import render
from lite.eval.calibration import Calibration, Judged, features, held_out_scores
from lite.eval.confidence import Stated, Token
from lite.eval.figures import RESAMPLES, Estimate, Floats
from lite.eval.labels import read_mentions
from lite.eval.labels.vocabulary import table as words

_PLACES: Final = [pattern for name in ("sides", "zones", "sizes") for pattern in words(name).values()]
_REJECTED: Final = 0.2
Measure: TypeAlias = Callable[[Floats, NDArray[np.bool_]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What is said of each sentence, the more the surer."""

    name: str
    scores: Floats
    probabilities: Floats | None = None  # None: it is none that was calibrated


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Signals beside what is true."""

    what: str
    signals: Sequence[Signal]
    false: NDArray[np.bool_]
    table: tuple[Sequence[str], Sequence[Sequence[str]]]


def measure(calibration: Calibration, learned: Sequence[Judged], tested: Sequence[Judged] | None) -> Measured:
    """Measure all signals.

    Args:
        calibration: what was learned.
        learned: from these.
        tested: others; None takes the same, each scored without its study, by levels that have seen it.
    """
    judged = learned if tested is None else tested
    sentences, false = [one.sentence for one in judged], np.array([one.is_false for one in judged])
    raw = [_signals(one) for one in sentences]
    signals = [Signal(name=name, scores=np.array([of[name] for of in raw])) for name in raw[0]]
    for scale in calibration.scales[: 1 + calibration.scales[1].with_samples]:
        if scale.with_samples:
            agreement = np.array([one.agreement or 0.0 for one in sentences])
            signals.append(Signal(name="agreement of samples", scores=agreement))
        scores = scale.score(features(sentences, calibration.rates, with_samples=scale.with_samples))
        if tested is None:
            scores = held_out_scores(learned, with_samples=scale.with_samples)
        name = f"calibrated, {'with samples' if scale.with_samples else 'one pass'}"
        signals.append(Signal(name=name, scores=scores, probabilities=scale.probability(scores)))
    studies = np.array([one.study for one in judged])
    header = ("signal", "AUROC", "95 %", f"false removed with {_REJECTED:.0%}", "95 %", "ECE", "Brier")
    rows = [_row(signal, false, studies) for signal in signals]
    what = f"{len(judged)} sentences that state something, of {len(set(studies.tolist()))} studies, {false.sum()} false"
    return Measured(what=what, signals=signals, false=false, table=(header, rows))


def _row(signal: Signal, false: NDArray[np.bool_], studies: NDArray[np.int64]) -> tuple[str, ...]:
    sure = signal.scores if signal.probabilities is None else signal.probabilities
    found = [interval(of, signal.scores, false, studies) for of in (auroc, removed)]
    cells = [cell for one in found for cell in (f"{one.value:.3f}", f"{one.low:.3f} – {one.high:.3f}")]
    return (signal.name, *cells, f"{calibration_error(sure, false):.3f}", f"{np.mean((sure - ~false) ** 2):.4f}")


def _signals(one: Stated) -> dict[str, float]:
    """Return signals from 0 to 1, of all tokens and of those of words that say where and how large, if there are."""
    spans = [match.span() for pattern in _PLACES for match in pattern.finditer(one.text.lower())]
    spans += [(mention.start, mention.end) for mention in read_mentions(one.text)]
    carry = [token for token in one.tokens if any(start <= token.start < end for start, end in spans)]
    signals: dict[str, float] = {}
    for suffix, tokens in (("", one.tokens), (", words of findings", carry or one.tokens)):
        likely = [math.exp(token.logprob) for token in tokens]
        signals |= {f"mean{suffix}": sum(likely) / len(likely), f"min{suffix}": min(likely)}
        signals |= {f"product{suffix}": math.prod(likely), f"margin{suffix}": min(map(_margin, tokens))}
        signals[f"entropy{suffix}"] = math.exp(-max(map(_entropy, tokens)))
    return signals | {"contrast": one.contrast or 0.0}


def _margin(token: Token) -> float:
    return math.exp(token.top[0][1]) - math.exp(token.top[1][1])


def _entropy(token: Token) -> float:
    """Return the entropy in nats, what is not among the most probable tokens taken as one."""
    known = [math.exp(logprob) for _, logprob in token.top]
    return -sum(p * math.log(p) for p in (*known, 1 - sum(known)) if p > 0)


# -- Measures --------------------------------------------------------------------------------------------------------


def auroc(scores: Floats, false: NDArray[np.bool_]) -> float:
    """Return how often a true sentence scores above a false one, ties half; NaN without both."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    num_true, pairs = int((~false).sum()), int(false.sum()) * int((~false).sum())
    return float(ranks[~false].sum() - num_true * (num_true + 1) / 2) / pairs if pairs else math.nan


def removed(scores: Floats, false: NDArray[np.bool_], share: float = _REJECTED) -> float:
    """Return which share of the false sentences is among the least certain `share` of all; of ties, their part."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    gone = np.cumsum(np.bincount(places, weights=false))
    rejected = np.interp(share * len(scores), [0, *np.cumsum(counts)], [0, *gone])
    return float(rejected / gone[-1]) if false.any() else math.nan


def risk_coverage(scores: Floats, false: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Return coverage and risk: the share that is false of the most certain 1, 2, … n sentences."""
    kept = np.arange(1, len(scores) + 1)
    return kept / len(scores), np.cumsum(false[np.argsort(-scores, kind="stable")]) / kept


def bins(probabilities: Floats, false: NDArray[np.bool_], count: int = 10) -> list[tuple[float, float, int]]:
    """Return mean probability, share of true sentences and number of as many sentences each, from the least certain."""
    parts = np.array_split(np.argsort(probabilities, kind="stable"), count)
    return [(float(probabilities[part].mean()), float((~false[part]).mean()), len(part)) for part in parts if len(part)]


def calibration_error(probabilities: Floats, false: NDArray[np.bool_]) -> float:
    """Return the expected calibration error: how far the bins' probabilities are from their shares, on average."""
    return sum(abs(said - share) * count for said, share, count in bins(probabilities, false)) / len(false)


def interval(of: Measure, scores: Floats, false: NDArray[np.bool_], studies: NDArray[np.int64]) -> Estimate:
    """Measure, with the middle 95 % of what studies drawn again give."""
    rows = [np.flatnonzero(studies == study) for study in np.unique(studies)]
    rng, values = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([rows[index] for index in rng.integers(len(rows), size=len(rows))])
        values.append(of(scores[drawn], false[drawn]))
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return Estimate(value=of(scores, false), low=float(low), high=float(high), count=len(scores))


def render_page(measured: Measured, calibration: Calibration) -> str:
    """Return the page: the table, reliability diagrams and curves of risk and coverage.

    Raises:
        BackendUnavailable: Jinja2 is not installed.
    """
    shown = []
    for signal in measured.signals:
        if signal.probabilities is None and signal.name not in ("mean", "contrast", "agreement of samples"):
            continue
        sure = signal.scores if signal.probabilities is None else signal.probabilities
        curve = [axis[:: max(1, len(axis) // 100)] for axis in risk_coverage(signal.scores, measured.false)]
        shown.append((signal.name, bins(sure, measured.false), list(zip(*map(np.ndarray.tolist, curve), strict=True))))
    risk = float(measured.false.mean())
    return render(
        "confidence.html.j2",
        filters=(),
        measured=measured,
        calibration=calibration,
        shown=shown,
        risk=risk,
        notice=NOTICE,
    )
