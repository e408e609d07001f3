"""Taking a reference record, and measuring the error of the bound that it gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lite._version import __version__
from lite.errors import ArtifactError, LiteError
from lite.eval.divergence import TopK, compare_logits, top_k
from lite.eval.record import (
    TOP_K,
    RecordedStudy,
    RecordInfo,
    ReferenceRecord,
    StageTimes,
    check_record,
    ids_type,
    settings_of,
)
from lite.studies.readers import sha256_of_studies
from lite.studies.study import Study

if TYPE_CHECKING:
    from lite.model import FindingsModel
    from lite.studies.results import Findings


def take_record(
    model: FindingsModel,
    studies: Sequence[Study],
    *,
    name: str,
    machine: str,
    versions: dict[str, str],
    on_progress: Callable[[int], object] | None = None,
) -> ReferenceRecord:
    """Draft each study, then score the model along its own text. The logits of one study are in memory at a time.

    Args:
        model: the reference, fp16 as a rule.
        studies: at least one. A film that cannot be read is an error: a record of the others would mislead.
        name: of the list of studies.
        machine: what it runs on, in words.
        versions: of the packages that compute.
        on_progress: called after each study with the number of those done.

    Raises:
        LiteError: no studies, one that cannot be read or computed, or a model that contradicts itself: a token of its
            greedy text is not among those it finds most probable when it is asked again.
    """
    if not studies:
        raise LiteError("got no studies · expected at least one · check the list")
    settings = settings_of(model.artifact)
    dtype = ids_type(settings.vocab_size)
    drafts: list[Findings] = []
    token_ids: list[NDArray[np.unsignedinteger[Any]]] = []
    tops: list[TopK] = []
    for number, study in enumerate(studies, start=1):
        findings = model.findings(study.image, study.reason, reuse=False)
        # The decision to stop is one of the tokens, too; a text that was cut has none.
        end = () if findings.finish_reason == "length" else (settings.decoding.eos_token_id,)
        ids = (*findings.token_ids, *end)
        tops.append(_top_of(model.score(study.image, ids, study.reason), ids, study.id))
        drafts.append(findings)
        token_ids.append(np.array(ids, dtype=dtype))
        if on_progress is not None:
            on_progress(number)
    return ReferenceRecord(
        info=_info(model, drafts, studies, name=name, machine=machine, versions=versions),
        offsets=np.cumsum([0, *map(len, token_ids)], dtype=np.int32),
        all_token_ids=np.concatenate(token_ids),
        top=TopK(
            ids=np.concatenate([top.ids for top in tops]).astype(dtype),
            log_probs=np.concatenate([top.log_probs for top in tops]),
            log_tail=np.concatenate([top.log_tail for top in tops]),
        ),
    )


def _info(
    model: FindingsModel,
    drafts: Sequence[Findings],
    studies: Sequence[Study],
    *,
    name: str,
    machine: str,
    versions: dict[str, str],
) -> RecordInfo:
    first, manifest = drafts[0], model.artifact.manifest
    return RecordInfo(
        created_by=f"llava-rad-lite {__version__}",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        notice=model.notice,
        artifact_id=model.artifact.id,
        model=manifest.model,
        decoder_format=manifest.parts.decoder.format,
        device=first.device,
        dtype=first.dtype,
        provider=first.provider,
        engine=first.engine,
        settings=settings_of(model.artifact),
        data=name,
        data_sha256=sha256_of_studies(studies),
        machine=machine,
        versions=versions,
        studies=[_recorded(study, findings) for study, findings in zip(studies, drafts, strict=True)],
    )


def _top_of(logits: NDArray[np.float32], token_ids: Sequence[int], study_id: str) -> TopK:
    top = top_k(logits, TOP_K)
    kept = (top.ids == np.array(token_ids)[:, None]).any(axis=1)
    if not kept.all():
        position = int(kept.argmin())
        msg = (
            f"study {study_id}: got token {token_ids[position]} at {position} of a greedy text, and other logits when "
            f"asked again · expected it among the {TOP_K} most probable there · the device computes wrongly: record "
            "on another one, or with another dtype"
        )
        raise LiteError(msg)
    return TopK(ids=top.ids, log_probs=top.log_probs.astype(np.float32), log_tail=top.log_tail.astype(np.float32))


def _recorded(study: Study, findings: Findings) -> RecordedStudy:
    timings = findings.timings
    times = {field.name: round(getattr(timings, field.name), 6) for field in dataclasses.fields(StageTimes)}
    return RecordedStudy(
        id=study.id, text=findings.text, finish_reason=findings.finish_reason, times=StageTimes(**times)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundError:
    """How far the KL of a replay is from that over the whole vocabulary: means over all tokens, nats a token."""

    num_tokens: int
    bound: float  # from the record
    kl: float  # from both models' logits
    max_gap: float  # of a single token
    gap_limit: float  # what can be said without the reference's logits

    @property
    def gap(self) -> float:
        """By how much the bound is too low."""
        return self.kl - self.bound

    def describe(self) -> str:
        """Say it in one line."""
        return (
            f"KL from the record {self.bound:.6g} nats a token, over the whole vocabulary {self.kl:.6g}: too low by "
            f"{self.gap:.2g} in the mean over {self.num_tokens} tokens, by {self.max_gap:.2g} at one of them; the "
            f"record alone guarantees no more than {self.gap_limit:.2g} in the mean"
        )


def bound_error(
    record: ReferenceRecord, reference: FindingsModel, candidate: FindingsModel, studies: Sequence[Study]
) -> BoundError:
    """Measure the error of a record's KL, with the model it was taken of at hand; one study's logits at a time.

    On another device or dtype than the record's the reference computes a little else, and that is part of the error.

    Args:
        record: of `studies`.
        reference: the recorded artifact, loaded.
        candidate: what is compared with it.
        studies: those of the record.

    Raises:
        ArtifactError: `reference` is not the recorded artifact, or `candidate` does not belong to it.
        LiteError: other studies, or one that cannot be computed.
    """
    if reference.artifact.id != record.info.artifact_id:
        msg = (
            f"{reference.artifact.path}: got artifact {reference.artifact.id} · expected {record.info.artifact_id}, "
            "the recorded one · load that"
        )
        raise ArtifactError(msg)
    check_record(record, candidate.artifact, studies)
    bounds, kls, limits = [], [], []
    for index, study in enumerate(studies):
        token_ids = record.token_ids(index)
        logits = candidate.score(study.image, token_ids, study.reason)
        bounds.append(record.compare(index, logits).kl)
        limits.append(record.gap_limit(index, logits))
        kls.append(compare_logits(reference.score(study.image, token_ids, study.reason), logits, token_ids).kl)
    bound, kl, limit = np.concatenate(bounds), np.concatenate(kls), np.concatenate(limits)
    return BoundError(
        num_tokens=len(kl),
        bound=float(bound.mean()),
        kl=float(kl.mean()),
        max_gap=float((kl - bound).max()),
        gap_limit=float(limit.mean()),
    )
