"""What an export writes and how it is measured: the settings, and the only place that holds their defaults."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Final, Literal, get_args

from lite.artifact.parts import OnnxFloat, PromptWeights
from lite.config import DecoderFormat, VisionFormat
from lite.errors import ArtifactError

GroupSize = Literal[32, 64, 128, -1]
Method = Literal["gptq", "rtn"]
HeadFormat = Literal["fp16", "int8"]
ActivationOrder = Literal["none", "group"]
Clip = Literal["none", "mse"]
Signs = Literal["positive", "either"]
TrainedOn = Literal["base", "published"]

LARGEST_WEIGHT: Final = 1000
DEFAULT_ACTIVATIONS: Final[OnnxFloat] = "float32"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenWeights:
    """What the tokens before the findings count in the Hessian, where a findings token counts 1."""

    image: float
    prompt: float

    def __post_init__(self) -> None:
        """Refuse what is not a weight."""
        if not all(math.isfinite(weight) and 0 <= weight <= LARGEST_WEIGHT for weight in (self.image, self.prompt)):
            msg = f"got token weights {self.image}, {self.prompt} · expected numbers from 0 to {LARGEST_WEIGHT}"
            raise ArtifactError(f"{msg} · a findings token counts 1")

    def __str__(self) -> str:
        """Return them as the command line takes them."""
        return f"{self.image},{self.prompt}"

    @classmethod
    def parse(cls, text: str) -> TokenWeights:
        """Read "IMAGE,PROMPT"; a ValueError says that it is not two numbers."""
        image, _, prompt = text.partition(",")
        return cls(image=float(image), prompt=float(prompt))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GptqSettings:
    """How GPTQ finds the integers; each choice is explained in `export.quantize.gptq` and `export.quantize.folding`."""

    group_size: GroupSize = 128
    """Inputs that share a scale; -1 for all of them."""
    method: Method = "gptq"
    """"rtn" rounds each weight to its nearest value and does nothing else: the yardstick."""
    calibration_data: str | Path | None = None
    """JSON list of studies in the evaluation format; "gptq" needs one."""
    calibration_images: str | Path | None = None
    """Where its images are; its own folder by default."""
    calibration_studies: int = 128
    token_weights: TokenWeights | None = None
    """None measures them, by layer: see `export.quantize.importance`."""
    activation_order: ActivationOrder = "group"
    clip: Clip = "mse"
    signs: Signs = "either"
    """Of the scales."""
    through_attention: bool = True
    """Count for q, k and v what the attention makes of them; see `export.quantize.attention`."""
    refine: int = 2
    """Passes of coordinate descent over the rounded columns."""
    fold_scales: bool = True
    """Balance the channels of neighbouring linears before rounding."""
    lm_head: HeadFormat = "fp16"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParitySettings:
    """What every export is told: what it is measured on, and where it is computed.

    Raises:
        ArtifactError: Nothing would be measured, or films are looked for without a list.
    """

    verify_data: str | Path | None = None
    """JSON list of studies in the evaluation format to measure parity on; None takes built-in ones."""
    image_folder: str | Path | None = None
    """Where the images of `verify_data` are; its own folder by default."""
    verify_studies: int = 4
    verify_tokens: int = 64
    """Findings tokens scored per study, at most."""
    device: str = "auto"
    """Where torch computes: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"."""
    show_progress: bool = False
    """Draw progress bars on stderr."""

    def __post_init__(self) -> None:
        """Refuse values that no export can have."""
        for name, count in {"verify_studies": self.verify_studies, "verify_tokens": self.verify_tokens}.items():
            if count < 1:
                raise ArtifactError(f"got {name}={count} · expected at least 1 · an unmeasured export is not kept")
        _require_list(self, images="image_folder", data="verify_data")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OnnxSettings(ParitySettings):
    """How `decoder.onnx` is written into an artifact that is there."""

    activations: OnnxFloat = DEFAULT_ACTIVATIONS
    """What it computes in, beside its integers: float32 for CPUs, float16 for the providers of GPUs."""
    prompt_weights: PromptWeights = "stored"
    """What prompts are read by: int8 writes a second set of weights for them, a byte for each; for CPUs with VNNI."""
    calibration_data: str | Path | None = None
    """JSON list of studies to find the scales of the int8 cache on; None takes built-in ones."""
    calibration_images: str | Path | None = None
    """Where its images are; its own folder by default."""

    def __post_init__(self) -> None:
        """Refuse values that no export can have."""
        ParitySettings.__post_init__(self)
        _require_float32(self.prompt_weights, self.activations)
        _require_list(self, images="calibration_images", data="calibration_data")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings(ParitySettings):
    """How a hospital's adapter is added to an artifact that is there."""

    on: TrainedOn | None = None
    """What it was trained on: the base model, or that with the published LoRA. None reads it from its configuration."""
    correction: int = 0
    """Rank of what is added to make up for the rounding of the decoder; each costs what a rank of the adapter does."""
    tolerance: float | None = None
    """The most it may lose, in nats a token; None: what 4 bits usually lose, or twice what the decoder itself lost."""
    replace: bool = False
    """Take the place of an adapter of that name."""
    keep_anyway: bool = False
    """Keep it even if it measures worse than is tolerated; the artifact says so."""

    def __post_init__(self) -> None:
        """Refuse values that no adapter can have."""
        ParitySettings.__post_init__(self)
        if self.correction < 0 or not (self.tolerance is None or self.tolerance > 0):
            msg = f"got correction={self.correction} tolerance={self.tolerance} · expected a rank and nats a token"
            raise ArtifactError(f"{msg} · leave them out")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings(ParitySettings):
    """What to write, and how to measure it.

    Raises:
        ArtifactError: A value is none of those known, nothing would be measured, or two settings exclude each other.
    """

    decoder_format: DecoderFormat = "fp16"
    vision_format: VisionFormat = "fp32"
    """What the tower's linears are stored as and computed in; with int8 the projector and the rest stay 16-bit."""
    gptq: GptqSettings = GptqSettings()
    """Used by the formats gptq-int4 and gptq-int8."""
    onnx: bool = False
    """Write decoder.onnx too, with which a decoder in GPTQ runs without torch."""
    activations: OnnxFloat = DEFAULT_ACTIVATIONS
    """See `OnnxSettings`."""
    prompt_weights: PromptWeights = "stored"
    """See `OnnxSettings`."""
    keep_lora: bool = False
    """Round the base alone, and keep the published LoRA beside it in 16 bits, as the adapter of whoever names none."""
    retrieval: bool = False
    """Write the towers of retrieval too, with which films and texts are embedded."""
    text_vocab: str | Path | None = None
    """Folder with vocab.txt and config.json of the text tower's BERT, which the checkpoint lacks."""
    text_format: VisionFormat = "fp32"
    """What the text tower's linears are stored as and computed in."""
    other_base: bool = False
    """Take a base whose name is not the one that the adapter asks for."""
    overwrite: bool = False
    """Replace an artifact that is there, once the new one is complete."""
    keep_anyway: bool = False
    """Make the artifact even if it measures worse than is tolerated; its manifest says so."""

    def __post_init__(self) -> None:
        """Refuse values that no export can have."""
        ParitySettings.__post_init__(self)
        self._refuse_unknown()
        self._refuse_unused()
        gptq = self.gptq
        if gptq.calibration_studies < 1 or gptq.refine < 0:
            msg = f"got calibration_studies={gptq.calibration_studies} refine={gptq.refine} · expected 1 and 0 or more"
            raise ArtifactError(f"{msg} · choose other numbers")
        if self.calibrates and gptq.calibration_data is None:
            raise ArtifactError(
                "got no calibration data · expected a JSON list of studies in the evaluation format, with films and "
                "findings: GPTQ rounds weights by what the decoder sees · give --calibration-data LIST.json, or take "
                "--method rtn, which needs none and loses more"
            )

    def _refuse_unknown(self) -> None:
        gptq = self.gptq
        for what, chosen, known in (
            ("decoder format", self.decoder_format, DecoderFormat),
            ("vision format", self.vision_format, VisionFormat),
            ("text format", self.text_format, VisionFormat),
            ("activations", self.activations, OnnxFloat),
            ("prompt weights", self.prompt_weights, PromptWeights),
            ("group size", gptq.group_size, GroupSize),
            ("method", gptq.method, Method),
            ("lm_head format", gptq.lm_head, HeadFormat),
            ("activation order", gptq.activation_order, ActivationOrder),
            ("clip", gptq.clip, Clip),
            ("signs", gptq.signs, Signs),
        ):
            if chosen not in get_args(known):
                options = ", ".join(map(str, get_args(known)))
                raise ArtifactError(f"got {what} {chosen!r} · expected one of {options} · choose one of them")

    def _refuse_unused(self) -> None:
        """Refuse settings that exclude each other, and those that would change nothing."""
        gptq = self.gptq
        if self.onnx and not self.decoder_format.startswith("gptq"):
            msg = f"got the onnx engine for {self.decoder_format} · expected gptq-int4 or gptq-int8, whose integers it "
            raise ArtifactError(f"{msg}takes over · choose one of them, or leave it out")
        for name, default in (("activations", DEFAULT_ACTIVATIONS), ("prompt_weights", "stored")):
            if (got := getattr(self, name)) != default and not self.onnx:
                msg = f"got {name} {got} without the onnx engine · expected it with that, as only decoder.onnx"
                raise ArtifactError(f"{msg} has a choice of them · give --engine onnx, or leave it out")
        _require_float32(self.prompt_weights, self.activations)
        if self.retrieval and self.text_vocab is None:
            msg = "got retrieval without text_vocab · expected the folder with vocab.txt and config.json of the text "
            raise ArtifactError(f"{msg}tower's BERT, which the checkpoint lacks · give --text-vocab DIR")
        if not self.retrieval and (self.text_vocab is not None or self.text_format != "fp32"):
            msg = "got text_vocab or a text format without retrieval · expected them with it, as only its text tower "
            raise ArtifactError(f"{msg}has them · give --retrieval, or leave them out")
        used = {field.name for field in dataclasses.fields(gptq)}
        if not self.decoder_format.startswith("gptq"):
            used, where = set(), "with gptq-int4 or gptq-int8 only"
        elif gptq.method == "rtn":
            used, where = {"group_size", "method", "lm_head"}, "with --method gptq only: rtn does nothing but round"
        for field in dataclasses.fields(gptq):
            if field.name not in used and getattr(gptq, field.name) != field.default:
                msg = f"got {field.name} for {self.decoder_format} · expected it {where} · leave it out, or choose one"
                raise ArtifactError(msg)
        _require_list(gptq, images="calibration_images", data="calibration_data")

    @property
    def bits(self) -> int:
        """The bits of a weight of the decoder's linears."""
        return {"fp16": 16, "gptq-int4": 4, "bnb-nf4": 4}.get(self.decoder_format, 8)

    @property
    def calibrates(self) -> bool:
        """Whether the decoder is rounded by what it sees, which takes studies and goes layer after layer."""
        return self.decoder_format.startswith("gptq") and self.gptq.method == "gptq"


def _require_float32(prompt_weights: PromptWeights, activations: OnnxFloat) -> None:
    if prompt_weights == "int8" and activations != "float32":
        msg = f"got prompt_weights int8 with activations {activations} · expected float32: they are for CPUs"
        raise ArtifactError(f"{msg} · leave one of them out")


def _require_list(settings: object, *, images: str, data: str) -> None:
    if getattr(settings, images) is not None and getattr(settings, data) is None:
        raise ArtifactError(f"got {images} without {data} · expected a list of studies too · give one")


DEFAULTS: Final = ExportSettings()
