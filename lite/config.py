"""Plain settings: preprocessing, prompt, decoding defaults, the decoder's shape and how its weights are stored.

The first three travel in the artifact's manifest; the last is read from `decoder/config.json` and keeps Hugging Face's
field names. All are read strictly: a key nobody knows, or a value of another type, is an error that names it.
"""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lite.errors import ArtifactError

T = TypeVar("T")

OPENAI_CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)

DecoderFormat = Literal["fp16", "gptq-int4", "gptq-int8", "bnb-nf4", "bnb-int8"]
"""What the decoder's linears are stored as; embeddings and norms are 16-bit in each."""
VisionFormat = Literal["fp32", "fp16", "int8"]

IMAGE_TOKEN: Final = "<image>"  # noqa: S105 - a placeholder in a prompt, not a secret
IMAGE_TOKEN_ID: Final = -200


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How a film becomes pixel_values: shortest edge to image_size, centre crop, then (x / 255 - mean) / std."""

    image_size: int
    mean: tuple[float, float, float] = OPENAI_CLIP_MEAN
    std: tuple[float, float, float] = OPENAI_CLIP_STD


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """The words around the image, exactly as the model was trained with them.

    `conversation` holds `<image>` and `{question}`; `question_with_reason` holds `{reason}`.
    """

    conversation: str = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\n{question} ASSISTANT:"
    )
    question_with_reason: str = (
        "Provide a description of the findings in the radiology image given the following indication: {reason}"
    )
    question_without_reason: str = "Provide a description of the findings in the radiology image."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodingDefaults:
    """When decoding stops, and the special token ids. Decoding is greedy."""

    max_new_tokens: int = 256
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How the linears of a quantised decoder are stored: what matters of `quantization_config`.

    Source: the keys that transformers, AutoGPTQ and GPTQModel write; for GPTQ version 1 of the format, symmetric and
    without g_idx order (`desc_act` false), which is all that fast kernels read.
    """

    format: DecoderFormat
    group_size: int | None = None  # inputs that share a scale, -1 for all; None where the format has no choice
    lm_head_bits: int | None = None  # None: lm_head is 16-bit

    @property
    def bits(self) -> int:
        """The bits of a weight of the layers' linears."""
        return 8 if self.format.endswith("int8") else 4

    @property
    def lm_head(self) -> Quantization | None:
        """How the head is stored; None: in 16 bits."""
        if self.lm_head_bits is None:
            return None
        return Quantization(format="gptq-int4" if self.lm_head_bits == 4 else "gptq-int8", group_size=self.group_size)

    @classmethod
    def from_hf(cls, config: object, *, where: str) -> Quantization:
        """Read a `quantization_config`.

        Raises:
            ArtifactError: it asks for something this runtime does not compute.
        """
        if not isinstance(config, dict):
            msg = f"{where}: got quantization_config={_shown(config)} · expected an object · export the artifact again"
            raise ArtifactError(msg)
        if config.get("quant_method") == "gptq":
            return cls._from_gptq(config, where)
        if config.get("quant_method") == "bitsandbytes":
            four, eight = bool(config.get("load_in_4bit")), bool(config.get("load_in_8bit"))
            if eight and not four:
                return cls(format="bnb-int8")
            if four and not eight and config.get("bnb_4bit_quant_type") == "nf4":
                return cls(format="bnb-nf4")
        raise _unknown_quantization(config, where)

    @classmethod
    def _from_gptq(cls, config: dict[str, Any], where: str) -> Quantization:
        bits, group_size = config.get("bits"), config.get("group_size")
        expected = {"sym": True, "desc_act": False, "checkpoint_format": "gptq"}
        other = any(config.get(name, wanted) != wanted for name, wanted in expected.items())
        if bits not in (4, 8) or type(group_size) is not int or group_size < -1 or not group_size or other:
            raise _unknown_quantization(config, where)
        lm_head_bits = None
        if config.get("lm_head"):
            dynamic = config.get("dynamic") or {}
            overrides = dynamic.get("lm_head", {}) if isinstance(dynamic, dict) else None
            lm_head_bits = overrides.get("bits", bits) if isinstance(overrides, dict) else None
            if lm_head_bits not in (4, 8):
                raise _unknown_quantization(config, where)
        return cls(format="gptq-int4" if bits == 4 else "gptq-int8", group_size=group_size, lm_head_bits=lm_head_bits)


def _unknown_quantization(config: dict[str, Any], where: str) -> ArtifactError:
    names = ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "bnb_4bit_quant_type")
    got = ", ".join(f"{name}={_shown(config[name])}" for name in names if name in config)
    return ArtifactError(
        f"{where}: got a quantization_config of {got or _shown(config)} · expected GPTQ v1 (4 or 8 bits, symmetric, "
        "desc_act false) or bitsandbytes (NF4 or int8) · upgrade llava-rad-lite or export again"
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The shape of a Llama decoder, under the names `config.json` uses."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    dtype: Literal["float32", "float16", "bfloat16"]  # of the stored weights, those that are not quantised
    quantization: Quantization | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any], *, where: str = "config.json") -> DecoderConfig:
        """Read a Hugging Face Llama configuration.

        Keys that change nothing here are ignored, as every library that writes the file adds its own; the ones that
        would change the maths (another activation, biases, scaled rotary embeddings, an unknown quantisation) are
        refused.

        Args:
            config: the parsed `config.json`. transformers 5 writes rope_theta inside `rope_parameters` and the dtype
                as `dtype`; older versions write `rope_theta` and `torch_dtype`. Both are read.
            where: the file's name, for the error message.

        Raises:
            ArtifactError: a key is missing, has the wrong type, or asks for something this decoder does not do.
        """
        _refuse_other_maths(config, where)
        rope = config.get("rope_parameters") or {}  # an object: checked above
        values = {
            "num_key_value_heads": config.get("num_attention_heads"),
            "rms_norm_eps": 1e-6,
            "rope_theta": rope.get("rope_theta", 10000.0),
            "tie_word_embeddings": False,
            "dtype": config.get("torch_dtype") or "float32",
        }
        names = [field.name for field in dataclasses.fields(cls) if field.name != "quantization"]
        values |= {name: config[name] for name in names if config.get(name) is not None}
        hidden_size, heads = values.get("hidden_size"), values.get("num_attention_heads")
        if isinstance(hidden_size, int) and isinstance(heads, int) and heads > 0:
            values.setdefault("head_dim", hidden_size // heads)
        values.setdefault("head_dim", 0)  # refused below, after what it should have come from
        read = from_json(cls, values, where=where)
        positive = {name: getattr(read, name) for name in names if type(getattr(read, name)) in (int, float)}
        checks = [(f"{name}={value}", value > 0, "more than 0") for name, value in positive.items()]
        heads, kv_heads = read.num_attention_heads, max(read.num_key_value_heads, 1)
        checks += [
            (f"{heads} attention heads over {kv_heads} key/value heads", heads % kv_heads == 0, "a whole multiple"),
            (f"head_dim={read.head_dim}", read.head_dim % 2 == 0, "an even number: rotary embeddings turn pairs"),
        ]
        for got, fits, expected in checks:
            if not fits:
                raise ArtifactError(f"{where}: got {got} · expected {expected} · export the artifact again")
        if config.get("quantization_config") is None:
            return read
        quantization = Quantization.from_hf(config["quantization_config"], where=where)
        return dataclasses.replace(read, quantization=quantization)


def _refuse_other_maths(config: dict[str, Any], where: str) -> None:
    """Refuse settings that this decoder would silently compute wrongly."""
    expected: dict[str, tuple[Any, Any]] = {
        "model_type": (config.get("model_type", "llama"), "llama"),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(config.get("attention_bias")), False),
        "mlp_bias": (bool(config.get("mlp_bias")), False),
    }
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key) or {}
        if not isinstance(rope, dict):
            msg = f"{where}: got {key}={_shown(rope)} · expected an object or null · export the artifact again"
            raise ArtifactError(msg)
        expected[f"{key}.rope_type"] = rope.get("rope_type", rope.get("type", "default")), "default"
    for name, (got, wanted) in expected.items():
        if got != wanted:
            msg = (
                f"{where}: got {name}={_shown(got)} · expected {wanted!r} · this version computes plain "
                "Llama decoders: upgrade llava-rad-lite or export again"
            )
            raise ArtifactError(msg)


def from_json(cls: type[T], value: object, *, where: str) -> T:
    """Build a dataclass from parsed JSON; refuse unknown keys, missing keys and wrong types, naming them.

    Understands what the settings here are made of: int, float, str, bool, None, Literal, tuples, lists, dicts with
    string keys, unions, and dataclasses of these. An integer is taken for a float; nothing else is converted.
    """
    built: T = _read(cls, value, where)
    return built


def to_json(value: Any) -> Any:  # noqa: ANN401 - JSON is made of anything
    """Turn a dataclass into what `json.dumps` takes; `from_json` reads it back."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        # A text has a hundred numbers: of one kind, so that the first tells. `asdict` would copy each.
        plain = not value or type(value[0]) in _PLAIN
        return type(value)(value) if plain else type(value)(to_json(item) for item in value)
    return value


_PLAIN: Final = (int, float, str, bool, type(None))


def _read(hint: Any, value: Any, where: str) -> Any:  # noqa: ANN401 - see to_json
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _read_dataclass(hint, value, where)
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if hint in _PLAIN and hint is not float and type(value) is hint:
        return value
    if origin is Literal and value in arguments:
        return value
    if origin in (Union, types.UnionType):
        exact = [choice for choice in arguments if type(value) is choice]
        for choice in exact or arguments:
            whole = choice is float and type(value) is int  # 1.0, as JavaScript writes it
            if exact or whole or (choice not in _PLAIN and value is not None):
                return _read(choice, value, where)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        any_length = origin is list or arguments[1:] == (...,)
        hints = arguments[:1] * len(value) if any_length else arguments
        if len(hints) == len(value):
            return origin(_read(item, v, f"{where}[{i}]") for i, (item, v) in enumerate(zip(hints, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    name = "an object" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", None)
    expected = name if origin is None else str(hint).replace("typing.", "")
    msg = f"{where}: got {_shown(value)} · expected {expected} · the file is damaged or was edited: export it again"
    raise ArtifactError(msg)


def _read_dataclass(cls: Any, value: dict[str, Any], where: str) -> Any:  # noqa: ANN401 - see _read
    hints = get_type_hints(cls)
    for key in value:
        if key not in hints:
            msg = f"{where}: got an unknown key {key!r} · expected {', '.join(hints)} · remove it or export again"
            raise ArtifactError(msg)
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in value:
            msg = f"{where}: got no key {field.name!r} · expected one · the file is damaged: export it again"
            raise ArtifactError(msg)
    return cls(**{key: _read(hints[key], item, f"{where}.{key}") for key, item in value.items()})


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
