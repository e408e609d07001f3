"""Taking a reference record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lite._version import __version__
from lite.bench.machine import machine, versions
from lite.errors import LiteError
from lite.eval.divergence import TopK, top_k
from lite.eval.record import (
    TOP_K,
    RecordedStudy,
    RecordInfo,
    ReferenceRecord,
    StageTimes,
    ids_type,
    settings_of,
)
from lite.studies.films import sha256_of_studies
from lite.studies.study import Study

if TYPE_CHECKING:
    from lite.model import FindingsModel
    from lite.studies.results import Findings


def take_record(
    model: FindingsModel,
    studies: Sequence[Study],
    *,
    name: str,
    on_progress: Callable[[int], object] | None = None,
) -> ReferenceRecord:
    """Draft each study, then score the model along its own text. The logits of one study are in memory at a time.

    Args:
        model: the reference, fp16 as a rule.
        studies: at least one. A film that cannot be read is an error: a record of the others would mislead.
        name: of the list of studies.
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
    manifest = model.artifact.manifest
    info = RecordInfo(
        created_by=f"llava-rad-lite {__version__}",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        notice=model.notice,
        artifact_id=model.artifact.id,
        model=manifest.model,
        decoder_format=manifest.parts.decoder.format,
        **{field: getattr(drafts[0], field) for field in ("device", "dtype", "provider", "engine")},
        settings=settings,
        data=name,
        data_sha256=sha256_of_studies(studies),
        machine=machine(),
        versions=versions(),
        studies=[_recorded(study, findings) for study, findings in zip(studies, drafts, strict=True)],
    )
    return ReferenceRecord(
        info=info,
        offsets=np.cumsum([0, *map(len, token_ids)], dtype=np.int32),
        all_token_ids=np.concatenate(token_ids),
        top=TopK(
            ids=np.concatenate([top.ids for top in tops]).astype(dtype),
            log_probs=np.concatenate([top.log_probs for top in tops]),
            log_tail=np.concatenate([top.log_tail for top in tops]),
        ),
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
