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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lite.artifact.open import Artifact
from lite.config import DecodingDefaults, Preprocessing, PromptTemplate
from lite.errors import ArtifactError, LiteError
from lite.eval.divergence import StudyDivergence, TopK, compare_top_k, gap_limit
from lite.eval.figures import Floats
from lite.studies.films import sha256_of_studies
from lite.studies.study import Study

TOP_K: Final = 64


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
    finish_reason: Literal["eos", "length"]
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
    engine: str
    settings: Settings
    data: str  # the list's name
    data_sha256: str  # of `lite.studies.films.sha256_of_studies`
    machine: str
    versions: dict[str, str]
    studies: list[RecordedStudy]


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
        return compare_top_k(self.top[self._tokens(index)], logits, self.token_ids(index))

    def gap_limit(self, index: int, logits: ArrayLike) -> Floats:
        """Return by how much each KL of `compare` is too low at most, in nats."""
        return gap_limit(self.top[self._tokens(index)], logits)

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
        return slice(*self.offsets[index : index + 2])


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
    """Refuse a candidate that reads other tokens, other words or other pixels than the reference, which has a name.

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


def studies_of(record: ReferenceRecord, listed: Sequence[Study]) -> Sequence[Study]:
    """Return the first studies of a list, as many as a record was made of, where the list begins with those."""
    recorded = [study.id for study in record.info.studies]
    first = listed[: len(recorded)]
    return first if [study.id for study in first] == recorded else listed


def check_studies(record: ReferenceRecord, studies: Sequence[Study]) -> None:
    """Refuse to replay a record on other studies than its own.

    Raises:
        LiteError: the studies are others, or a film is missing.
    """
    if (got := sha256_of_studies(studies)) == record.info.data_sha256:
        return
    recorded, ids = [study.id for study in record.info.studies], [study.id for study in studies]
    missing = [study.path for study in studies if not study.path.is_file()]
    num, what = len(recorded), record.describe()
    if ids != recorded and (ids[:num] == recorded or ids == recorded[: len(ids)]):
        msg = f"got {len(ids)} studies · expected the first {num}, of which {what} is · give --limit {num}"
    elif missing:
        msg = (
            f"got {len(missing)} of {len(ids)} studies without their film, the first {missing[0]} · expected all that "
            f"the record was made with ({what}) · name the films' folder with --image-folder, or bench without "
            "--reference"
        )
    else:
        msg = (
            f"got studies of sha256 {got} · expected {record.info.data_sha256}, the first {num} of {record.info.data} "
            f"in the record {what} · give that list and its films, with --limit {num} where it is longer, or make a "
            "record for this one with python -m lite.bench record"
        )
    raise LiteError(msg)


def check_record(record: ReferenceRecord, artifact: Artifact, studies: Sequence[Study]) -> None:
    """Refuse to compare an artifact with a record made of other studies or with other settings.

    Raises:
        LiteError: the studies are others.
        ArtifactError: a setting differs; it is named.
    """
    check_studies(record, studies)
    check_belongs(artifact, record.info.settings, reference=f"record {record.describe()}")


def ids_type(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the smallest unsigned integers that hold a vocabulary."""
    return np.min_scalar_type(vocab_size - 1)
