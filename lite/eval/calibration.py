"""From signals to a probability, learned on studies with references, and how good that probability is.

    what is stated, signals, agreement ──► logistic model ──► score ──► isotonic levels ──► probability

The logistic model looks at how often statements of a label were false, at the contrast, and by whether a sentence
denies or affirms at the least probability of its tokens, their product and, with samples, the agreement. The levels are
fitted to scores of studies that the model had not learned from: a fifth of the studies at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lite.artifact.open import read_json_object
from lite.config import from_json, to_json
from lite.errors import ArtifactError, LiteError
from lite.eval.confidence import Stated, stated
from lite.studies.results import Sentence

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lite.eval.figures import Floats
    from lite.model import FindingsModel
    from lite.prompt import Tokenizer
    from lite.studies.results import Findings

_LOG: Final = logging.getLogger(__name__)
SETTINGS: Final = ("artifact_id", "engine", "cache_dtype", "prompt_weights", "num_image_tokens", "image_method")
"""What a calibration is of: fields of `Findings`."""
FOLDS: Final = 5
_PRIOR: Final = 20  # sentences: the weight of all such statements beside those of a label
_TODO: Final = "make it again: python -m lite confidence"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A logistic model and the levels behind it."""

    with_samples: bool
    weights: tuple[float, ...]  # of a constant and each feature: they add up to the log-odds of a true sentence
    levels: tuple[tuple[float, float], ...]  # score and probability, both rising: linear between them

    def score(self, features: Floats) -> Floats:
        """Return scores from 0 to 1, [n], of features [n, k]."""
        score: Floats = 1 / (1 + np.exp(-(self.weights[0] + features @ np.array(self.weights[1:]))))
        return score

    def probability(self, scores: Floats) -> Floats:
        """Return the probabilities that nothing is false."""
        probability: Floats = np.interp(scores, *np.array(self.levels).T)
        return probability


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What turns the signals of one artifact, computed in one way, into probabilities."""

    artifact_id: str
    engine: str
    cache_dtype: str
    prompt_weights: str | None
    num_image_tokens: int | None
    image_method: str | None
    adapter: str | None = None  # of the drafts that it was learned from
    data: str
    num_studies: int
    rates: dict[
        str, tuple[int, int]
    ]  # sentences that state a label and status, or a status, and the false ones of them
    scales: tuple[Scale, Scale]  # of one pass; with samples, or the same again

    @property
    def id(self) -> str:
        """The first 16 hex digits of its hash."""
        return _hash(self)[:16]

    def numbers(self, found: Sequence[Stated]) -> list[tuple[float | None, float | None]]:
        """Return score and probability of each sentence; None of one that states nothing."""
        known = [one for one in found if one.contrast is not None]
        if not known:
            return [(None, None)] * len(found)
        scale = self.scales[all(one.agreement is not None for one in known)]
        scores = scale.score(features(known, self.rates, with_samples=scale.with_samples))
        pairs = iter(zip(scores.tolist(), scale.probability(scores).tolist(), strict=True))
        return [(None, None) if one.contrast is None else next(pairs) for one in found]

    def check(self, settings: Mapping[str, Any], where: object) -> None:
        """Refuse another artifact or other settings.

        Raises:
            LiteError: they are others.
        """
        for name in SETTINGS:
            if settings[name] != getattr(self, name):
                got = f"{where}: got a calibration of {name} {getattr(self, name)} · expected {settings[name]}"
                raise LiteError(f"{got} · {_TODO}, or leave it out")

    def to_json(self) -> str:
        """Return what `read_calibration` reads."""
        return json.dumps(to_json(self) | {"sha256": _hash(self)}, indent=1, allow_nan=False) + "\n"


def _hash(calibration: Calibration) -> str:
    return hashlib.sha256(json.dumps(to_json(calibration), sort_keys=True).encode()).hexdigest()


def find_calibration(
    which: str | os.PathLike[str], model: FindingsModel, adapter: str | None = None
) -> Calibration | None:
    """Return the calibration to use.

    Args:
        which: its file; or "auto": the one beside the artifact, if there is one that is of this artifact and settings.
        model: what drafts.
        adapter: by which; each has a calibration of its own. None: the artifact's default.

    Raises:
        LiteError: it cannot be read, or is not of this artifact and settings.
    """
    adapter = adapter or model.artifact.manifest.parts.default_adapter
    file = beside(model.artifact.path, adapter) if which == "auto" else Path(which)
    if which == "auto" and not file.is_file():
        return None
    calibration = read_calibration(file)
    try:
        calibration.check(model.settings, file)
    except LiteError as error:
        if which != "auto":
            raise
        _LOG.warning("sentences are uncalibrated: %s", error)
        return None
    return calibration


def beside(artifact: Path, adapter: str | None = None) -> Path:
    """Return where a calibration is looked for: no file of the artifact, as it is made after it."""
    own = "" if adapter is None else f".{adapter}"
    return artifact.resolve().with_name(f"{artifact.resolve().name}{own}.confidence.json")


def read_calibration(file: Path) -> Calibration:
    """Read a calibration.

    Raises:
        LiteError: it is none, or not as it was written.
    """
    try:
        value = read_json_object(file)
        sealed = value.pop("sha256", None)
        read = from_json(Calibration, value, where=str(file))
    except ArtifactError as error:
        raise LiteError(f"{str(error).rpartition(' · ')[0]} · {_TODO}") from error
    if sealed != _hash(read):
        raise LiteError(f"{file}: got a calibration that was changed · expected it as it was written · {_TODO}")
    return read


def with_sentences(findings: Findings, tokenizer: Tokenizer, calibration: Calibration | None) -> Findings:
    """Return findings that say how sure the model was of each of their sentences.

    Args:
        findings: with `token_logprobs` and the `TOP` most probable tokens; perhaps with samples.
        tokenizer: the one that made them.
        calibration: of the same artifact and settings; None: the scores are contrasts, and mean nothing by themselves.
            One of another adapter is not used.
    """
    if calibration is not None and calibration.adapter != findings.adapter:
        _tell_of_other(calibration.id, calibration.adapter, findings.adapter)
        calibration = None
    found = stated(findings, tokenizer)
    numbers = [(one.contrast, None) for one in found] if calibration is None else calibration.numbers(found)
    parts = (
        Sentence(
            text=one.text,
            mean_probability=_rounded(_mean([math.exp(token.logprob) for token in one.tokens])),
            score=_rounded(score),
            probability=_rounded(probability),
            agreement=_rounded(one.agreement),
        )
        for one, (score, probability) in zip(found, numbers, strict=True)
    )
    return dataclasses.replace(
        findings, sentences=tuple(parts), calibration=None if calibration is None else calibration.id
    )


@functools.cache
def _tell_of_other(calibration: str, *adapters: str | None) -> None:
    """Say it once of each."""
    of, expected = (f"the adapter {name}" if name else "no adapter" for name in adapters)
    _LOG.warning("sentences are uncalibrated: got calibration %s of %s · expected %s", calibration, of, expected)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


# -- Learning --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Judged:
    """A sentence that states something, of a study that has a reference."""

    sentence: Stated
    study: int
    is_false: bool


def features(found: Sequence[Stated], rates: Mapping[str, tuple[int, int]], *, with_samples: bool) -> Floats:
    """Return what the logistic model looks at, [n, k]: of sentences that state something."""
    rows = []
    for one in found:
        logprobs = [token.logprob for token in one.tokens]
        signals = [min(logprobs), sum(logprobs), *([one.agreement or 0.0] if with_samples else [])]
        by_kind = [value * (one.denies == kind) for kind in (True, False) for value in signals]
        rows.append([_usual(one, rates), math.log(one.contrast or 1.0), *by_kind])
    return np.array(rows)


def _keys(one: Stated) -> set[str]:
    return {key for mention in one.mentions for key in (mention.status, f"{mention.label} {mention.status}")}


def _usual(one: Stated, rates: Mapping[str, tuple[int, int]]) -> float:
    """Return the log-odds that all such statements are true, by how often each has been."""
    true = 1.0
    for label, status in {(mention.label, mention.status) for mention in one.mentions}:
        (count, wrong), (all_count, all_wrong) = (rates.get(key, (0, 0)) for key in (f"{label} {status}", status))
        true *= 1 - (wrong + _PRIOR * (all_wrong + 1) / (all_count + 2)) / (count + _PRIOR)
    return math.log(true / (1 - true))


def _rates(judged: Sequence[Judged]) -> dict[str, tuple[int, int]]:
    counts = Counter(key for one in judged for key in _keys(one.sentence))
    wrong = Counter(key for one in judged if one.is_false for key in _keys(one.sentence))
    return {key: (counts[key], wrong[key]) for key in sorted(counts)}


def logistic(raw: Floats, true: Floats) -> tuple[float, ...]:
    """Fit by Newton's method; weights of features of one spread are drawn towards 0."""
    means, spreads = raw.mean(axis=0), raw.std(axis=0) + 1e-9
    table = np.column_stack([np.ones(len(raw)), (raw - means) / spreads])
    weights, decay = np.zeros(table.shape[1]), np.diag([1e-6, *[1.0] * raw.shape[1]])
    for _ in range(30):
        p = 1 / (1 + np.exp(-table @ weights))
        weights -= np.linalg.solve((table.T * (p * (1 - p))) @ table + decay, table.T @ (p - true) + decay @ weights)
    slopes = weights[1:] / spreads
    return (float(weights[0] - slopes @ means), *slopes.tolist())


def _fit(judged: Sequence[Judged], *, with_samples: bool) -> tuple[Scale, dict[str, tuple[int, int]]]:
    rates = _rates(judged)
    table = features([one.sentence for one in judged], rates, with_samples=with_samples)
    weights = logistic(table, np.array([not one.is_false for one in judged], float))
    return Scale(with_samples=with_samples, weights=weights, levels=()), rates


def held_out_scores(judged: Sequence[Judged], *, with_samples: bool) -> Floats:
    """Score each sentence by a model that has not seen its study."""
    parts, scores = np.array([one.study % FOLDS for one in judged]), np.empty(len(judged))
    for part in np.unique(parts):
        scale, rates = _fit([one for one in judged if one.study % FOLDS != part], with_samples=with_samples)
        mine = [one.sentence for one in judged if one.study % FOLDS == part]
        scores[parts == part] = scale.score(features(mine, rates, with_samples=with_samples))
    return scores


def learn(judged: Sequence[Judged], *, with_samples: bool, settings: Mapping[str, Any], data: str) -> Calibration:
    """Learn a calibration, of one pass and with samples if there are any.

    Raises:
        LiteError: there are too few sentences, or too few false ones, to learn from.
    """
    true, studies = np.array([not one.is_false for one in judged], float), {one.study for one in judged}
    if min(true.sum(), len(true) - true.sum()) < FOLDS or len({study % FOLDS for study in studies}) < FOLDS:
        msg = f"{data}: got {len(true)} sentences that state something, {len(true) - true.sum():.0f} of them false"
        raise LiteError(f"{msg} · expected at least {FOLDS} of both kinds, of {FOLDS} studies · give more studies")
    scales = []
    for samples in (False, with_samples):
        scale, rates = _fit(judged, with_samples=samples)
        scores = held_out_scores(judged, with_samples=samples)
        scales.append(dataclasses.replace(scale, levels=isotonic(scores, true)))
    own = {name: settings[name] for name in SETTINGS}
    own |= {"adapter": settings.get("adapter")}
    return Calibration(**own, data=data, num_studies=len(studies), rates=rates, scales=(scales[0], scales[1]))


def isotonic(scores: Floats, true: Floats) -> tuple[tuple[float, float], ...]:
    """Fit rising probabilities by pooling adjacent violators: where each level begins and ends.

    No probability is nearer to 0 or 1 than so many cases can tell: 1 / (n + 2).
    """
    blocks: list[tuple[float, int, float, float]] = []  # sum of outcomes, count, first and last score
    for score in np.unique(scores):
        same = true[scores == score]
        blocks.append((float(same.sum()), len(same), float(score), float(score)))
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            (total, count, first, _), (more, others, _, last) = blocks[-2:]
            blocks[-2:] = [(total + more, count + others, first, last)]
    least = 1 / (len(scores) + 2)
    levels = [(min(max(total / count, least), 1 - least), first, last) for total, count, first, last in blocks]
    return tuple(step for level, first, last in levels for step in dict.fromkeys(((first, level), (last, level))))
