"""`decoder/`: a plain Hugging Face Llama folder, written one layer at a time.

    config.json, generation_config.json, NOTICE        (quantize_config.json too for GPTQ: AutoGPTQ reads that one)
    model-00001-of-0000N.safetensors                   the embeddings
    model-00002-of-0000N.safetensors …                 a decoder layer each
    model-0000N-of-0000N.safetensors                   the final norm and the head
    model.safetensors.index.json

A file a layer: whatever ends an export, the files that are there are finished ones, and the next export goes on behind
them. Tools that read shards do not mind how many there are.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import save

from export.quantize.bnb import quantization_config as bnb_quantization_config
from export.quantize.bnb import quantize_int8, quantize_nf4
from export.quantize.gptq import FIRST_DAMPING, Grid, Quantized, round_to_nearest
from kernels.bnb import NF4_BLOCK_SIZE
from kernels.gptq import to_tensors
from kernels.packing import pack_factor
from lite.errors import CheckpointError
from lite.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from export.settings import ExportSettings
    from export.source.checkpoint import Checkpoint
    from lite.config import DecoderConfig, DecodingDefaults

CONFIG_NAME: Final = "decoder/config.json"
HEAD: Final = "lm_head"
HEAD_BITS: Final = 8


@dataclasses.dataclass(slots=True, kw_only=True)
class PartReport:
    """What storing a part of the decoder changed.

    The rounding is that of what stays in 16 bit: the largest difference of any weight, and where. The errors are those
    of calibrated linears.
    """

    max_abs: float = 0.0
    max_abs_tensor: str = ""
    squared_error: float = 0.0
    squared_norm: float = 0.0
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of each linear: the root mean square of its outputs' change over the calibration, relative to its outputs."""

    @property
    def relative_rms(self) -> float:
        """Root mean square of the rounding, relative to that of the weights; 16-bit rounding alone gives 2e-4."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0

    def add(self, name: str, exact: Tensor, rounded: Tensor) -> None:
        """Count one tensor's rounding."""
        difference = rounded.float() - exact
        tensor = PartReport(
            max_abs=float(difference.abs().max()),
            max_abs_tensor=name,
            squared_error=float(difference.square().sum(dtype=torch.float64)),
            squared_norm=float(exact.square().sum(dtype=torch.float64)),
        )
        self.merge(tensor)

    def merge(self, other: PartReport) -> None:
        """Count another part as well."""
        if other.max_abs >= self.max_abs:
            self.max_abs, self.max_abs_tensor = other.max_abs, other.max_abs_tensor
        self.squared_error += other.squared_error
        self.squared_norm += other.squared_norm
        self.errors |= other.errors


class DecoderFolder:
    """`decoder/` while it is written: numbered parts, each a file that is there whole or not at all."""

    def __init__(self, folder: Path, num_hidden_layers: int) -> None:
        """Describe it; it need not exist. Part 0 is the embeddings, part i + 1 layer i, the last the head."""
        self.folder = folder
        self.num_parts = num_hidden_layers + 2

    def path(self, part: int) -> Path:
        """Return the file of a part."""
        return self.folder / f"model-{part + 1:05d}-of-{self.num_parts:05d}.safetensors"

    @property
    def weights(self) -> tuple[str, ...]:
        """The files of all parts, as the manifest names them."""
        return tuple(f"decoder/{self.path(part).name}" for part in range(self.num_parts))

    def files(self) -> list[str]:
        """Return the files that are there, but for config.json, as the manifest names them."""
        names = sorted(f"decoder/{file.name}" for file in self.folder.iterdir() if file.suffix != ".partial")
        return [name for name in names if name != CONFIG_NAME]

    def num_finished(self) -> int:
        """Return how many parts are there without a gap."""
        part = 0
        while part < self.num_parts and self.path(part).is_file():
            part += 1
        return part

    def write(self, part: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a part, and be sure that it is on disk before it has its name."""
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
        write_whole(self.path(part), content)

    def write_index(self) -> None:
        """Write the index of the finished parts."""
        total = 0
        weight_map: dict[str, str] = {}
        for part in range(self.num_parts):
            file = self.path(part)
            with file.open("rb") as stream:
                header_bytes = int.from_bytes(stream.read(8), "little")
                names = json.loads(stream.read(header_bytes)).keys() - {"__metadata__"}
            total += file.stat().st_size - 8 - header_bytes
            weight_map |= dict.fromkeys(names, file.name)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(self.folder / "model.safetensors.index.json", index)


def plain_part(checkpoint: Checkpoint, part: int, settings: ExportSettings, report: PartReport) -> dict[str, Tensor]:
    """Return the tensors of a part in the forms that take no calibration: fp16, bitsandbytes, rounding to nearest."""
    tensors: dict[str, Tensor] = {}
    for name, exact in checkpoint.read_part(part).items():
        require_float16(name, exact)
        bits, owner = _bits(name, settings), name.removesuffix(".weight")
        if bits == 16:
            tensors[name] = exact.half()
            report.add(name, exact, tensors[name])
        elif settings.decoder_format.startswith("gptq"):
            grid = grid_of(settings, exact.shape[1], bits=bits)
            tensors |= gptq_tensors(owner, round_to_nearest(exact, grid, clip="mse" if owner == HEAD else "none"))
        else:
            parts = quantize_nf4(exact.half()) if settings.decoder_format == "bnb-nf4" else quantize_int8(exact)
            tensors |= {f"{owner}.{key}": tensor for key, tensor in parts.items()}
    return tensors


def calibrated_part(layer: str, norms: Mapping[str, Tensor], linears: Mapping[str, Quantized]) -> dict[str, Tensor]:
    """Return the tensors of a layer that GPTQ has rounded."""
    tensors = {f"{layer}.{name}": norm.cpu() for name, norm in norms.items()}
    for linear, rounded in linears.items():
        tensors |= gptq_tensors(f"{layer}.{linear}", rounded)
    return tensors


def gptq_tensors(name: str, rounded: Quantized) -> dict[str, Tensor]:
    """Return a rounded linear as GPTQ v1 stores it, under full names."""
    stored = to_tensors(rounded.values, rounded.scales, bits=rounded.grid.bits)
    return {f"{name}.{part}": tensor for part, tensor in stored.items()}


def grid_of(settings: ExportSettings, in_features: int, *, bits: int) -> Grid:
    """Return the values a linear of so many inputs is rounded to."""
    size = settings.gptq.group_size
    return Grid(bits=bits, group_size=in_features if size == -1 else size)


def require_divisible(shapes: Mapping[str, tuple[int, ...]], settings: ExportSettings) -> None:
    """Refuse, before the work, a group size or a format that does not fit tensors of these names and shapes.

    Raises:
        CheckpointError: A linear's inputs are not whole groups or blocks, or do not fill whole words.
    """
    quantized = {name: shape for name, shape in shapes.items() if _bits(name, settings) < 16}
    size, nf4 = settings.gptq.group_size, settings.decoder_format == "bnb-nf4"
    for name, (out_features, in_features) in quantized.items():
        head, factor = name == f"{HEAD}.weight", pack_factor(_bits(name, settings))
        fits = [str(other) for other in (32, 64, 128) if all(shape[1] % other == 0 for shape in quantized.values())]
        if nf4 and in_features % NF4_BLOCK_SIZE:
            wrong = f"{in_features} inputs · expected a multiple of {NF4_BLOCK_SIZE}, the block of NF4"
            todo = "choose bnb-int8 or fp16"
        elif settings.decoder_format.startswith("bnb"):
            continue
        elif out_features % factor:
            wrong = f"{out_features} outputs · expected a multiple of {factor}"
            todo = "choose --lm-head fp16" if head else "choose a bnb format"
        elif in_features % (factor if size == -1 else size):
            wrong = f"{in_features} inputs · expected whole groups of {'words' if size == -1 else size}"
            todo = f"choose --group-size {', '.join([*fits, '-1'])}, or a bnb format"
        else:
            continue
        raise CheckpointError(f"{name}: got {wrong} · {todo}")


def decoder_bytes(shapes: Mapping[str, tuple[int, ...]], settings: ExportSettings) -> int:
    """Return about how many bytes `decoder/` will take."""
    total, size = 0.0, settings.gptq.group_size
    for name, shape in shapes.items():
        bits: float = _bits(name, settings)
        if bits < 16:
            bits += (16 + bits) / (shape[1] if size == -1 else size)  # scales and zeros of a group
        total += math.prod(shape) * bits / 8
    return int(total)


def _bits(name: str, settings: ExportSettings) -> int:
    """Return the bits of a tensor's values."""
    if name == f"{HEAD}.weight":
        return HEAD_BITS if settings.gptq.lm_head == "int8" else 16
    return settings.bits if "_proj." in name else 16


def require_float16(name: str, exact: Tensor) -> None:
    """Refuse a weight that float16 cannot hold, or NaN: no model that was trained in 16 bit has one."""
    if not bool(exact.half().isfinite().all()):
        msg = f"{name}: got a merged weight of {float(exact.abs().max()):.3g} · expected one that fits float16 (65504)"
        raise CheckpointError(f"{msg} · the checkpoint is damaged, or of a model this exporter does not support")


def quantization_config(settings: ExportSettings) -> dict[str, Any] | None:
    """Return what config.json says under `quantization_config`; None for fp16."""
    if settings.decoder_format == "fp16":
        return None
    if settings.decoder_format in ("bnb-nf4", "bnb-int8"):
        return bnb_quantization_config(settings.decoder_format)
    gptq = settings.gptq
    config: dict[str, Any] = {
        "bits": settings.bits,
        "checkpoint_format": "gptq",
        "desc_act": False,
        "group_size": gptq.group_size,
        "lm_head": gptq.lm_head == "int8",
        "quant_method": "gptq",
        "sym": True,
    }
    if gptq.method == "gptq":
        config |= {"damp_percent": FIRST_DAMPING, "true_sequential": True}
    if gptq.lm_head == "int8":
        config["dynamic"] = {HEAD: {"bits": HEAD_BITS, "group_size": gptq.group_size}}
    return config


def write_configs(
    folder: Path,
    decoder: DecoderConfig,
    decoding: DecodingDefaults,
    *,
    notice: str,
    quantization: dict[str, Any] | None = None,
) -> None:
    """Write config.json and generation_config.json as transformers reads them, and the notice.

    Written from the values that were checked, not copied: the source's sampling defaults and whatever else lies in its
    files do not travel.
    """
    token_ids = {
        "bos_token_id": decoding.bos_token_id,
        "eos_token_id": decoding.eos_token_id,
        "pad_token_id": decoding.pad_token_id,
    }
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": decoder.head_dim,
        "hidden_act": "silu",
        "hidden_size": decoder.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": decoder.intermediate_size,
        "max_position_embeddings": decoder.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": decoder.num_attention_heads,
        "num_hidden_layers": decoder.num_hidden_layers,
        "num_key_value_heads": decoder.num_key_value_heads,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": decoder.vocab_size,
        **token_ids,
    }
    if quantization is not None:
        config["quantization_config"] = quantization
        if quantization["quant_method"] == "gptq":
            _write_json(folder / "quantize_config.json", quantization)
    generation: dict[str, Any] = {"do_sample": False, "max_new_tokens": decoding.max_new_tokens, **token_ids}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)
    write_whole(folder / "NOTICE", f"{notice}\n")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, f"{json.dumps(content, indent=2)}\n")
