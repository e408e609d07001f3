"""The parts of an artifact: what each is, the files it owns, and what it was measured to lose.

A part is a dataclass here and one line in `Parts`. It owns its files: every file of an artifact belongs to exactly one
part, and who wants a part reads the files that the part names, whatever they are called.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, Final, Literal

from lite.config import DecoderFormat, VisionFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

OnnxFloat = Literal["float32", "float16"]
CacheDtype = Literal["float32", "float16", "int8"]
PromptWeights = Literal["int8", "stored"]
"""What a prompt is read by: int8 weights of its own, or those that tokens are decoded by."""

UNHASHED = "0" * 64
ADAPTER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What an adapter may be called: its name is a folder's, a model's for clients, and stands between commas."""
PUBLISHED: Final = "published"
"""The checkpoint's own LoRA, where it was kept beside the base instead of merged into it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """The size and the hash of one file."""

    bytes: int
    sha256: str


def unhashed(*names: str) -> dict[str, FileRecord]:
    """Name the files of a part that is being written; `StagedArtifact.finish` fills in sizes and hashes."""
    return {name: FileRecord(bytes=0, sha256=UNHASHED) for name in names}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What every part has."""

    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)  # by path inside the artifact

    @property
    def nbytes(self) -> int:
        """The size of all its files."""
        return sum(record.bytes for record in self.files.values())

    def named(self) -> tuple[str, ...]:
        """Return the files that the part's own fields name, each of which it must own."""
        return ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OneFilePart(Part):
    """A part of a single file."""

    @property
    def file(self) -> str:
        """Its path inside the artifact."""
        (name,) = self.files
        return name


# -- Measured at export ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VisionFidelity:
    """How far the image features are from the checkpoint's."""

    data: str  # the list's file name, or "built-in"
    films: int
    max_abs: float
    relative_error: float  # the largest difference, relative to the features' root mean square
    mean_cosine: float
    min_cosine: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """How far the tokens' probabilities are from a yardstick's, along the findings of some studies."""

    studies: int
    tokens: int
    mean_kl: float  # nats per token
    max_kl: float
    same_top: float
    perplexity_ratio: float
    first_divergent_token: float | None  # the median over the studies where there is one
    studies_without_divergence: float

    def __str__(self) -> str:
        """Say it in a line."""
        return f"KL {self.mean_kl:.2g} nats/token, same top token {self.same_top:.2%}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecoderFidelity:
    """What a decoder loses."""

    data: str  # the list's file name, or "built-in"
    divergence: Divergence  # from what it was made of: the checkpoint, or `decoder/`
    int8_cache: Divergence | None  # from itself with a float cache


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalFidelity:
    """How far the embeddings are from the checkpoint's, and what that changes of who is found."""

    data: str  # the list's file name, or "built-in"
    films: int
    texts: int
    film_cosine: float  # the smallest
    text_cosine: float  # the smallest
    recall: dict[str, float] = dataclasses.field(default_factory=dict)  # "text to film @5": of pairs in that list
    source_recall: dict[str, float] = dataclasses.field(default_factory=dict)  # the checkpoint's own


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFidelity:
    """What an adapter loses beside the artifact's decoder, and what it is worth: all from the same yardstick.

    That is the adapter beside the checkpoint's own weights, in float32.
    """

    data: str  # the list's file name, or "built-in"
    divergence: Divergence  # of the artifact with the adapter
    without: Divergence  # of what a request gets that names none
    onnx: Divergence | None = None  # of decoder.onnx with the adapter, from `decoder/` with it
    int8_cache: Divergence | None = None  # of decoder.onnx's int8 cache with the adapter, from its float cache
    texts: int = 0  # that were drafted with the adapter
    same_texts: float = 0.0  # the share of these that the yardstick would write, token for token
    label_f1: float | None = None  # macro F1 of these texts against the reports; None: the list has none
    label_f1_without: float | None = None  # of the artifact's texts without the adapter


# -- The parts -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerPart(OneFilePart):
    """The SentencePiece model."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TowerShape:
    """The vision transformer inside `vision.onnx`: what its memory and its arithmetic follow from."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int  # those that are run
    num_attention_heads: int


ImageMethod = Literal["mean", "attention", "diverse", "random"]
"""How the tower's patches become fewer image tokens: see `lite.image_tokens`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VisionPart(Part):
    """Tower and projector, an ONNX graph each. What goes in and comes out is float32 whatever they compute in."""

    graph: str  # pixel_values → patch_features, class_attention
    projector: str  # patch_features → image_features
    format: VisionFormat
    image_size: int
    num_patches: int  # what the tower makes of a film
    num_image_tokens: int  # what the decoder reads: all patches, as published, or fewer where a caller asks for it
    image_method: ImageMethod = "diverse"  # how they became fewer
    hidden_size: int  # the decoder's: what the projector makes
    tower: TowerShape
    fidelity: VisionFidelity | None = None

    @property
    def reduction(self) -> ImageMethod | None:
        """How patches become fewer tokens; None: they do not."""
        return None if self.num_image_tokens == self.num_patches else self.image_method

    def named(self) -> tuple[str, ...]:
        """Return both graphs."""
        return self.graph, self.projector


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfigPart(OneFilePart):
    """The decoder's shape, as `config.json` of a Hugging Face folder: every engine reads it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """What a decoder was calibrated on, and how."""

    data: str  # the list's file name
    sha256: str  # of the films and tokens that were used
    films: tuple[str, ...] = ()  # of each film the first 16 hex digits of its sha256, sorted
    studies: int
    left_out: int = 0  # studies of the list that could not be used
    tokens: int
    token_weights: dict[str, float]  # what each kind of token counts, in the mean over layers; a findings token 1
    measured: bool = True  # whether they were measured, or given
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of each linear: the root mean square of its outputs' change over the calibration, relative to its outputs."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MergeRecord:
    """What merging LoRA into the weights rounded, of the tensors that stay in 16 bits."""

    lora_scale: float
    max_abs_rounding: float
    max_abs_rounding_tensor: str
    relative_rms_rounding: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecoderPart(Part):
    """The decoder's weights, in a Hugging Face Llama folder."""

    format: DecoderFormat
    weights: tuple[str, ...] = ()  # of its files those with tensors, safetensors
    group_size: int | None = None  # of GPTQ: inputs that share a scale, -1 for all
    method: Literal["gptq", "rtn"] | None = None  # how the integers of the GPTQ format were found
    lm_head: Literal["fp16", "int8"] = "fp16"
    merge: MergeRecord | None = None
    calibration: CalibrationRecord | None = None
    fidelity: DecoderFidelity | None = None

    def named(self) -> tuple[str, ...]:
        """Return the files with weights."""
        return self.weights

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
class Int8CacheGraph:
    """The graph with an int8 cache, and what the scales of that were found on."""

    graph: str
    data: str  # the list's file name, or "built-in"
    sha256: str  # of the films and tokens that were used
    studies: int
    tokens: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PromptGraphs:
    """Graphs for prompts alone, whose linears are int8, and what they lose."""

    graph: str
    int8_cache: str | None = None  # the one with an int8 cache
    data: str  # the int8 weights of both
    exactness: str  # a product that shows whether a CPU adds up exactly
    divergence: Divergence | None = None  # of texts behind such prompts, from those behind prompts by the stored bits


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OnnxPart(Part):
    """The decoder once more, for ONNX Runtime: the integers of `decoder/`, which has to be GPTQ."""

    graph: str  # with a cache of the activations' dtype
    data: str  # the weights of both graphs
    embeddings: str  # float16 [vocab_size, hidden_size], a .npy file
    dtype: OnnxFloat  # of the activations, and of a cache that is not int8
    accuracy_level: int  # of MatMulNBits; 4: its inputs are rounded to int8
    lm_head_bits: Literal[4, 8]
    int8_cache: Int8CacheGraph | None = None
    prompts: PromptGraphs | None = None
    fidelity: DecoderFidelity | None = None

    def named(self) -> tuple[str, ...]:
        """Return the graphs and what they read."""
        names = [self.graph, self.data, self.embeddings]
        if self.int8_cache is not None:
            names.append(self.int8_cache.graph)
        if (prompts := self.prompts) is not None:
            names += [
                prompts.graph,
                prompts.data,
                prompts.exactness,
                *([prompts.int8_cache] if prompts.int8_cache else []),
            ]
        return tuple(names)

    @property
    def cache_dtypes(self) -> tuple[CacheDtype, ...]:
        """The caches that there are graphs for."""
        return (self.dtype,) if self.int8_cache is None else (self.dtype, "int8")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalPart(Part):
    """The towers of retrieval: films and texts as vectors of one space."""

    text: str  # a graph: input_ids → text_embeds
    film: str  # what continues the graph of the part `vision`: its last hidden states → film_embeds
    vocabulary: str  # of BERT's WordPiece, a piece a line
    text_format: VisionFormat  # the film's is that of `vision`
    dim: int
    vocab_size: int
    max_tokens: int  # what a text is cut to
    fidelity: RetrievalFidelity | None = None

    def named(self) -> tuple[str, ...]:
        """Return the graphs and the vocabulary."""
        return self.text, self.film, self.vocabulary


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPart(Part):
    """A LoRA beside the decoder, and perhaps a projector of its own."""

    factors: str  # safetensors, float16: of each adapted linear lora_A [rank, in] and lora_B [out, rank]: + B (A x)
    projector: str | None = None  # in the place of the vision part's
    on: Literal["base", "published"]  # what it was trained on: the base model, or that with the published LoRA
    rank: int  # the largest of a linear, with what undoes the published LoRA and with the correction
    correction: int = 0  # of this rank what makes up for the rounding of the decoder
    is_default: bool = False  # what a request gets that names none
    sources: dict[str, str] = dataclasses.field(default_factory=dict)  # file of the adapter's folder -> sha256
    fidelity: AdapterFidelity | None = None

    def named(self) -> tuple[str, ...]:
        """Return the factors and the projector."""
        return (self.factors,) if self.projector is None else (self.factors, self.projector)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """All parts of an artifact, a field each; None is a part that it does without."""

    tokenizer: TokenizerPart
    vision: VisionPart
    decoder_config: DecoderConfigPart
    decoder: DecoderPart
    decoder_onnx: OnnxPart | None = None
    retrieval: RetrievalPart | None = None
    adapters: dict[str, AdapterPart] = dataclasses.field(default_factory=dict)  # by name

    def by_name(self) -> dict[str, Part]:
        """Return the parts that are there; an adapter is called adapters/NAME."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        adapters = {f"adapters/{name}": part for name, part in parts.pop("adapters").items()}
        return {name: part for name, part in (parts | adapters).items() if part is not None}

    def with_files(self, files: Callable[[Part], dict[str, FileRecord]]) -> Parts:
        """Return the parts with other records of their files."""
        parts: dict[str, Any] = {
            name: dataclasses.replace(part, files=files(part)) for name, part in self.by_name().items()
        }
        adapters = {name: parts.pop(f"adapters/{name}") for name in self.adapters}
        return dataclasses.replace(self, adapters=adapters, **parts)

    @property
    def default_adapter(self) -> str | None:
        """The adapter of a request that names none; None: the decoder as it is."""
        return next((name for name, part in self.adapters.items() if part.is_default), None)

    def read_by(self, engine: Literal["torch", "onnx"], adapters: Iterable[str] = ()) -> tuple[Part, ...]:
        """Return the parts that an engine reads, with these adapters."""
        weights = self.decoder if engine == "torch" else self.decoder_onnx
        shared = (self.tokenizer, self.vision, self.decoder_config, *(self.adapters[name] for name in adapters))
        return shared if weights is None else (*shared, weights)
