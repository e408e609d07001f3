"""Reference records: what a model did on a fixed set of studies, taken once, replayed without that model.

The fp16 decoder of a 7B model takes 14 GB; a record of it is taken where that fits, and elsewhere a 4-bit artifact is
compared with the record. Two files, N tokens in all studies together, EOS counted unless a text was cut:

    R.json              artifact, settings, data, machine, versions; each study's id, text and stage times;
                        bytes and sha256 of the other file
    R.safetensors       offsets        int32 [S + 1]     where each study's tokens begin; the last is N
                        token_ids      uint [N]          the smallest unsigned integers that hold the vocabulary
                        top_ids        uint [N, 64]      the most probable next tokens, the most probable first
                        top_log_probs  float32 [N, 64]
                        log_tail       float32 [N]       log of what all other tokens have together

That is 390 bytes a token for a vocabulary of 32,000, where its logits are 128,000. float32 moves a KL by less than
1e-8 nats; float16 would by some 1e-5, more than some candidates lose (random logits of that vocabulary, KL 0.003). The
KL of a replay is a lower bound: see `lite.eval.divergence`.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lite._version import __version__
from lite.artifact.open import Artifact
from lite.artifact.parts import FileRecord
from lite.config import DecodingDefaults, Preprocessing, PromptTemplate, from_json, to_json
from lite.errors import ArtifactError, BackendUnavailable, LiteError
from lite.eval.divergence import StudyDivergence, TopK, compare_logits, compare_top_k, gap_limit, top_k
from lite.eval.metrics import Floats
from lite.session.generate import FinishReason
from lite.studies.readers import sha256_of_studies
from lite.studies.study import Study

if TYPE_CHECKING:
    from lite.model import FindingsModel
    from lite.studies.results import Findings

RECORD_VERSION: Final = 1
TOP_K: Final = 64
_AGAIN: Final = "make it again with python -m lite.bench record"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What two artifacts must have in common for their distributions to be comparable."""

    tokenizer_sha256: str
    vocab_size: int
    prompt: PromptTemplate
    preprocessing: Preprocessing
    decoding: DecodingDefaults

    def by_name(self) -> dict[str, object]:
        """Return each setting under the name that messages use."""
        settings: dict[str, object] = {"tokenizer sha256": self.tokenizer_sha256, "vocab_size": self.vocab_size}
        for part in ("prompt", "preprocessing", "decoding"):
            values = dataclasses.asdict(getattr(self, part))
            settings |= {f"{part}.{key}": value for key, value in values.items()}
        return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Where the time of one study went, in seconds, as in `lite.Timings`."""

    image_s: float
    vision_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStudy:
    """What the model wrote about one study, run by itself."""

    id: str
    text: str
    finish_reason: FinishReason
    times: StageTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordInfo:
    """All of a record but its numbers."""

    created_by: str  # "llava-rad-lite X.Y.Z"
    date: str  # ISO 8601, UTC
    notice: str
    artifact_id: str
    model: str
    decoder_format: str
    device: str
    dtype: str
    provider: str  # of ONNX Runtime
    engine: str = "torch"  # what there was when records did not say it yet
    settings: Settings
    data: str  # the list's name
    data_sha256: str  # of `lite.studies.readers.sha256_of_studies`
    machine: str
    versions: dict[str, str]
    studies: list[RecordedStudy]


@dataclass(frozen=True, slots=True, kw_only=True)
class _RecordFile:
    """What R.json holds."""

    format_version: int
    tensors: FileRecord
    record: RecordInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRecord:
    """A record in memory. Made by `take_record` or `read_record`."""

    info: RecordInfo
    offsets: NDArray[np.int32]  # [S + 1]
    all_token_ids: NDArray[np.unsignedinteger[Any]]  # [N]
    top: TopK  # of all N tokens

    @property
    def texts(self) -> tuple[str, ...]:
        """What the model wrote about each study."""
        return tuple(study.text for study in self.info.studies)

    def token_ids(self, index: int) -> tuple[int, ...]:
        """Return a study's tokens, with EOS unless its text was cut."""
        return tuple(self.all_token_ids[self._tokens(index)].tolist())

    def compare(self, index: int, logits: ArrayLike) -> StudyDivergence:
        """Compare a candidate's logits on `token_ids(index)` with the record's; KL is a lower bound."""
        return compare_top_k(self._top(index), logits, self.token_ids(index))

    def gap_limit(self, index: int, logits: ArrayLike) -> Floats:
        """Return by how much each KL of `compare` is too low at most, in nats."""
        return gap_limit(self._top(index), logits)

    def describe(self) -> str:
        """Say in one line what was recorded, and where."""
        info = self.info
        return (
            f"{info.decoder_format} {info.model}, artifact {info.artifact_id}, {len(info.studies)} studies, made "
            f"{info.date[:10]} on {info.machine} by {info.created_by}, {info.engine} engine"
        )

    def describe_tail(self) -> str:
        """Say in one line how much probability the record knows only the sum of."""
        mass = self.top.tail_mass
        return (
            f"top {self.top.ids.shape[1]} of {self.info.settings.vocab_size} tokens; all others have {mass.mean():.2g} "
            f"of the probability in the mean over {len(mass)} tokens, {mass.max():.2g} at most"
        )

    def _tokens(self, index: int) -> slice:
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def _top(self, index: int) -> TopK:
        tokens = self._tokens(index)
        return TopK(ids=self.top.ids[tokens], log_probs=self.top.log_probs[tokens], log_tail=self.top.log_tail[tokens])


# -- Taking ----------------------------------------------------------------------------------------------------------


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
    ids_type = _ids_type(settings.vocab_size)
    drafts: list[Findings] = []
    token_ids: list[NDArray[np.unsignedinteger[Any]]] = []
    tops: list[TopK] = []
    for number, study in enumerate(studies, start=1):
        findings = model.findings(study.image, study.reason)
        # The decision to stop is one of the tokens, too; a text that was cut has none.
        end = () if findings.finish_reason == "length" else (settings.decoding.eos_token_id,)
        ids = (*findings.token_ids, *end)
        tops.append(_top_of(model.score(study.image, ids, study.reason), ids, study.id))
        drafts.append(findings)
        token_ids.append(np.array(ids, dtype=ids_type))
        if on_progress is not None:
            on_progress(number)
    first, manifest = drafts[0], model.artifact.manifest
    info = RecordInfo(
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
        settings=settings,
        data=name,
        data_sha256=sha256_of_studies(studies),
        machine=machine,
        versions=versions,
        studies=[_recorded(study, findings) for study, findings in zip(studies, drafts, strict=True)],
    )
    return ReferenceRecord(
        info=info,
        offsets=np.cumsum([0, *map(len, token_ids)], dtype=np.int32),
        all_token_ids=np.concatenate(token_ids),
        top=TopK(
            ids=np.concatenate([top.ids for top in tops]).astype(ids_type),
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


def _ids_type(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    return np.min_scalar_type(vocab_size - 1)


# -- Refusing --------------------------------------------------------------------------------------------------------


def settings_of(artifact: Artifact) -> Settings:
    """Return what a candidate must share with an artifact to be compared with it."""
    manifest = artifact.manifest
    return Settings(
        tokenizer_sha256=manifest.parts.tokenizer.files[manifest.parts.tokenizer.file].sha256,
        vocab_size=artifact.decoder_config().vocab_size,
        prompt=manifest.prompt,
        preprocessing=manifest.preprocessing,
        decoding=manifest.decoding,
    )


def check_belongs(candidate: Artifact, settings: Settings, *, reference: str) -> None:
    """Refuse a candidate that reads other tokens, other words or other pixels than the reference.

    Args:
        candidate: the artifact to compare.
        settings: the reference's.
        reference: what to call it in the message.

    Raises:
        ArtifactError: a setting differs; it is named.
    """
    ours = settings_of(candidate).by_name()
    for what, expected in settings.by_name().items():
        if (got := ours[what]) != expected:
            msg = (
                f"{candidate.path}: got {what} {got!r} · expected {expected!r}, as in the reference {reference} · "
                "only artifacts of one checkpoint can be compared: export both from the same one, with one version"
            )
            raise ArtifactError(msg)


def check_studies(record: ReferenceRecord, studies_sha256: str) -> None:
    """Refuse to replay a record on other studies than its own.

    Args:
        record: the reference.
        studies_sha256: of the studies to be replayed, from `lite.studies.readers.sha256_of_studies`.

    Raises:
        LiteError: the studies are others.
    """
    if studies_sha256 != record.info.data_sha256:
        msg = (
            f"got studies of sha256 {studies_sha256} · expected {record.info.data_sha256}, those of "
            f"{record.info.data} in the record {record.describe()} · give the list it was made with, all of it, and "
            "its films, or make a record for this one with python -m lite.bench record"
        )
        raise LiteError(msg)


def check_record(record: ReferenceRecord, artifact: Artifact, studies_sha256: str) -> None:
    """Refuse to compare an artifact with a record made of other studies or with other settings.

    Raises:
        LiteError: the studies are others.
        ArtifactError: a setting differs; it is named.
    """
    check_studies(record, studies_sha256)
    check_belongs(artifact, record.info.settings, reference=f"record {record.describe()}")


# -- On disk ---------------------------------------------------------------------------------------------------------


def record_paths(name: Path) -> tuple[Path, Path]:
    """Return the paths of the JSON and of the tensors for R, R.json or R.safetensors."""
    stem = name.name.removesuffix(".json").removesuffix(".safetensors")
    if not stem:
        msg = f"{name}: got no name for a record · expected one, such as references/fp16 · give one"
        raise LiteError(msg)
    return name.with_name(f"{stem}.json"), name.with_name(f"{stem}.safetensors")


def check_new(name: Path) -> None:
    """Refuse a name under which no record can be written: before anything is computed.

    Raises:
        LiteError: there is a record of this name, or its folder cannot be written.
    """
    json_path, _ = record_paths(name)
    if json_path.exists():
        msg = f"{json_path}: got a path that exists · expected a new one · remove the record there or choose a new name"
        raise LiteError(msg)
    try:
        json_path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(json_path, error) from error
    if not os.access(json_path.parent, os.W_OK):
        raise _unwritable(json_path, OSError(errno.EACCES, os.strerror(errno.EACCES)))


def write_record(record: ReferenceRecord, name: Path) -> Path:
    """Write a record: both files complete or, whenever it is interrupted, nothing that can be taken for a record.

    Args:
        record: what to write.
        name: R, R.json or R.safetensors.

    Returns:
        The JSON's path.

    Raises:
        LiteError: there is a record of this name, or its folder cannot be written.
    """
    check_new(name)
    json_path, tensors_path = record_paths(name)
    tensors = _safetensors().save(_tensors_of(record))
    file = _RecordFile(
        format_version=RECORD_VERSION,
        tensors=FileRecord(bytes=len(tensors), sha256=hashlib.sha256(tensors).hexdigest()),
        record=record.info,
    )
    text = json.dumps(to_json(file), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # The JSON last: it tells the hash of the tensors, so neither is taken for a record without the other.
    contents = {tensors_path: tensors, json_path: text.encode()}
    suffix = f".{secrets.token_hex(4)}.partial"
    partials = {path: path.with_name(f".{path.name}{suffix}") for path in contents}
    try:
        for path, content in contents.items():
            _write_through(partials[path], content)
        for path, partial in partials.items():
            partial.replace(path)
    except OSError as error:
        raise _unwritable(json_path, error) from error
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
    return json_path


def _write_through(path: Path, content: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _unwritable(path: Path, error: OSError) -> LiteError:
    return LiteError(f"{path}: got {error.strerror} · expected a folder that can be written · choose another place")


def read_record(name: Path) -> ReferenceRecord:
    """Read a record.

    Args:
        name: R, R.json or R.safetensors.

    Raises:
        LiteError: a file is missing, was changed or belongs to another record, or the record has another version.
        ArtifactError: a key of the JSON is missing, unknown or of the wrong type; it is named.
        BackendUnavailable: safetensors is not installed.
    """
    json_path, tensors_path = record_paths(name)
    file = _parse(_read_bytes(json_path), str(json_path))
    content = _read_bytes(tensors_path)
    got = len(content), hashlib.sha256(content).hexdigest()
    if got != (file.tensors.bytes, file.tensors.sha256):
        msg = (
            f"{tensors_path}: got {got[0]} bytes, sha256 {got[1]} · expected {file.tensors.bytes} bytes, sha256 "
            f"{file.tensors.sha256}, as {json_path.name} says · the file is damaged or of another record: copy both "
            f"files again, or {_AGAIN}"
        )
        raise LiteError(msg)
    tensors: dict[str, NDArray[Any]] = _safetensors().load(content)
    _check_tensors(tensors, file.record, tensors_path)
    return ReferenceRecord(
        info=file.record,
        offsets=tensors["offsets"],
        all_token_ids=tensors["token_ids"],
        top=TopK(ids=tensors["top_ids"], log_probs=tensors["top_log_probs"], log_tail=tensors["log_tail"]),
    )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        msg = (
            f"{path}: got {error.strerror} · expected a file of a reference record, R.json and R.safetensors side by "
            f"side · check the path, copy both files, or {_AGAIN}"
        )
        raise LiteError(msg) from error


def _parse(content: bytes, where: str) -> _RecordFile:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets without end
        msg = f"{where}: got text that is not JSON ({error}) · expected a reference record · {_AGAIN}"
        raise LiteError(msg) from error
    version = value.get("format_version") if isinstance(value, dict) else None
    if type(version) is not int:
        msg = f"{where}: got no format_version · expected a reference record · check the path, or {_AGAIN}"
        raise LiteError(msg)
    if version != RECORD_VERSION:
        todo = "upgrade llava-rad-lite" if version > RECORD_VERSION else _AGAIN
        msg = f"{where}: got a record of format_version {version} · this version reads {RECORD_VERSION} · {todo}"
        raise LiteError(msg)
    return from_json(_RecordFile, value, where=where)


def _tensors_of(record: ReferenceRecord) -> dict[str, NDArray[Any]]:
    return {
        "offsets": record.offsets,
        "token_ids": record.all_token_ids,
        "top_ids": record.top.ids,
        "top_log_probs": record.top.log_probs,
        "log_tail": record.top.log_tail,
    }


def _check_tensors(tensors: dict[str, NDArray[Any]], info: RecordInfo, path: Path) -> None:
    """Refuse tensors that are whole and yet not those of the studies beside them."""
    vocab_size, num_tokens = info.settings.vocab_size, len(tensors.get("token_ids", ()))
    k, ids_type = min(TOP_K, vocab_size), _ids_type(vocab_size)
    expected = {
        "offsets": (np.dtype(np.int32), (len(info.studies) + 1,)),
        "token_ids": (ids_type, (num_tokens,)),
        "top_ids": (ids_type, (num_tokens, k)),
        "top_log_probs": (np.dtype(np.float32), (num_tokens, k)),
        "log_tail": (np.dtype(np.float32), (num_tokens,)),
    }
    got = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | got.keys()):
        if got.get(name) != expected.get(name):
            raise _misshapen(path, f"{name} {got.get(name)} in place of {expected.get(name)}")
    offsets = tensors["offsets"]
    if offsets[0] != 0 or offsets[-1] != num_tokens or (np.diff(offsets) < 1).any():
        raise _misshapen(path, f"offsets {offsets[:4].tolist()} … {offsets[-1]} for {num_tokens} tokens")


def _misshapen(path: Path, what: str) -> LiteError:
    return LiteError(f"{path}: got {what} · expected the tensors of the record's studies · {_AGAIN}")


def _safetensors() -> Any:  # noqa: ANN401 - a module
    try:
        import safetensors.numpy
    except ImportError as error:
        msg = f'got no safetensors ({error}) · expected it for records · pip install "llava-rad-lite[torch]"'
        raise BackendUnavailable(msg) from error
    return safetensors.numpy


# -- The error of the bound ------------------------------------------------------------------------------------------


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
    check_record(record, candidate.artifact, sha256_of_studies(studies))
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
