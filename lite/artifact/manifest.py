"""The manifest of an artifact: what each part is, and every file with its bytes and sha256."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Literal

from lite.config import (
    DecoderFormat,
    DecodingDefaults,
    Preprocessing,
    PromptTemplate,
    VisionFormat,
    from_json,
    to_json,
)
from lite.errors import ArtifactError

if TYPE_CHECKING:
    pass


FORMAT_VERSION: Final = 4
MANIFEST_NAME: Final = "manifest.json"
VISION_NAME: Final = "vision.onnx"
DECODER_CONFIG_NAME: Final = "decoder/config.json"
TOKENIZER_NAME: Final = "tokenizer.model"
ONNX_DATA_NAME: Final = "decoder.onnx.data"
ONNX_EMBEDDINGS_NAME: Final = "embed_tokens.npy"

OnnxFloat = Literal["float32", "float16"]
CacheDtype = Literal["float32", "float16", "int8"]
ONNX_GRAPH_NAMES: Final = {"float": "decoder.onnx", "int8": "decoder.int8_cache.onnx"}
"""The graphs by what their cache is: that of the activations, or int8."""

NOTICE: Final = (
    "Research draft, not for clinical use. Findings written by a language model can be wrong or incomplete: "
    "do not use them for diagnosis or care."
)
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """The size and the hash of one file."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TowerShape:
    """The vision transformer inside `vision.onnx`: what its memory and its arithmetic follow from."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int  # those that are run
    num_attention_heads: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VisionPart:
    """What `vision.onnx` is. Its input and output are float32 whatever it computes in."""

    format: VisionFormat
    image_size: int
    num_image_tokens: int
    hidden_size: int  # the decoder's: what the projector makes
    tower: TowerShape


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """What a decoder was calibrated on, and how."""

    data: str  # the list's file name
    sha256: str  # of the films and tokens that were used, those held out for a search included
    studies: int
    tokens: int
    image_weight: float  # what an image token counts in the Hessian; a findings token counts 1
    prompt_weight: float  # and a token of the prompt's text


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecoderPart:
    """What `decoder/` holds."""

    format: DecoderFormat
    group_size: int | None = None  # of GPTQ: inputs that share a scale, -1 for all
    method: Literal["gptq", "rtn"] | None = None  # how the integers of the GPTQ format were found
    lm_head: Literal["fp16", "int8"] = "fp16"
    calibration: CalibrationRecord | None = None

    def describe(self) -> str:
        """Say what the weights are, and how they came to be."""
        details: list[str] = []
        if self.group_size is not None:
            details.append("one group" if self.group_size == -1 else f"groups of {self.group_size}")
        if self.lm_head != "fp16":
            details.append(f"{self.lm_head} head")
        if self.method == "rtn":
            details.append("rounded to nearest")
        if self.calibration is not None:
            details.append(f"calibrated on {self.calibration.studies} studies of {self.calibration.data}")
        return f"{self.format} ({', '.join(details)})" if details else self.format


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CacheCalibration:
    """What the scales of an int8 cache were found on."""

    data: str  # the list's file name, or "built-in"
    sha256: str  # of the films and tokens that were used
    studies: int
    tokens: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OnnxPart:
    """What `decoder.onnx` is: the integers of `decoder/`, which has to be GPTQ."""

    dtype: OnnxFloat  # of the activations, and of a cache that is not int8
    accuracy_level: int  # of MatMulNBits; 4: its inputs are rounded to int8
    lm_head_bits: Literal[4, 8]
    cache_calibration: CacheCalibration | None = None  # None: there is no int8 cache

    @property
    def cache_dtypes(self) -> tuple[CacheDtype, ...]:
        """The caches that there are graphs for."""
        return (self.dtype,) if self.cache_calibration is None else (self.dtype, "int8")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an artifact is made of."""

    format_version: int = FORMAT_VERSION
    model: str
    created_by: str  # "llava-rad-lite X.Y.Z"
    sources: dict[str, str]  # source file -> sha256
    vision: VisionPart
    decoder: DecoderPart
    onnx: OnnxPart | None = None  # None: there is no decoder.onnx
    preprocessing: Preprocessing
    prompt: PromptTemplate = dataclasses.field(default_factory=PromptTemplate)
    decoding: DecodingDefaults = dataclasses.field(default_factory=DecodingDefaults)
    fidelity: dict[str, Any] = dataclasses.field(default_factory=dict)  # measured at export, by the exporter
    notice: str = NOTICE
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)  # filled in when the artifact is finished

    def to_json(self) -> str:
        """Write the manifest as JSON text, always the same text for the same manifest."""
        return json.dumps(to_json(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def parse(cls, text: str, *, where: str = MANIFEST_NAME) -> Manifest:
        """Read a manifest.

        Raises:
            ArtifactError: not JSON, written by a newer version, a key missing, unknown or of the wrong type, or a
                file name that leads out of the artifact.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets without end
            msg = f"{where}: got text that is not JSON ({error}) · expected a manifest · export the artifact again"
            raise ArtifactError(msg) from error
        version = value.get("format_version") if isinstance(value, dict) else None
        if type(version) is int and version != FORMAT_VERSION:
            newer = version > FORMAT_VERSION
            todo = "upgrade llava-rad-lite" if newer else "export the artifact again with this version"
            msg = f"{where}: got format_version {version} · this version reads {FORMAT_VERSION} · {todo}"
            raise ArtifactError(msg)
        if version is None:
            msg = f"{where}: got no format_version · expected the manifest of an artifact · export the artifact again"
            raise ArtifactError(msg)
        manifest = from_json(cls, value, where=where)
        for name, record in manifest.files.items():
            _check_file_record(name, record, where)
        return manifest


def _check_file_record(name: str, record: FileRecord, where: str) -> None:
    path = PurePosixPath(name)
    inside = path.parts and not path.is_absolute() and ".." not in path.parts and "\\" not in name and ":" not in name
    if not inside or str(path) != name or name == MANIFEST_NAME:
        msg = f"{where}: got the file name {name!r} · expected a path inside the artifact · do not use this artifact"
        raise ArtifactError(msg)
    if record.bytes < 0 or not _SHA256.fullmatch(record.sha256):
        msg = (
            f"{where}: got bytes={record.bytes} sha256={record.sha256!r} for {name} · expected a size and 64 hex "
            "digits · export the artifact again"
        )
        raise ArtifactError(msg)
