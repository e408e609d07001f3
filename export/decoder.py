"""`decoder/`: a plain Hugging Face Llama folder, written one layer at a time.

    config.json, generation_config.json, NOTICE
    model.safetensors                                  up to MAX_SHARD_BYTES, else
    model-00001-of-0000N.safetensors, model.safetensors.index.json

A safetensors file is an 8-byte length, a JSON header with the place of every tensor, and the bytes. The header needs
shapes only, which are known before any weight is read; so the bytes are appended as layers are merged, and the
memory is that of one layer.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any, Final

import torch

from export.checkpoint import base_shapes
from lite.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

    from export.checkpoint import Checkpoint
    from lite.config import DecoderConfig, DecodingDefaults

MAX_SHARD_BYTES: Final = 2 * 10**9
_SAFETENSORS_NAMES: Final = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """The name, shape and dtype a tensor will have on disk."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(slots=True, kw_only=True)
class MergeReport:
    """What rounding the merged weights to 16 bit changed: the largest difference of any weight, and where."""

    max_abs: float = 0.0
    max_abs_tensor: str = ""
    squared_error: float = 0.0
    squared_norm: float = 0.0

    @property
    def relative_rms(self) -> float:
        """Root mean square of the rounding, relative to that of the weights; 16-bit rounding alone gives 2e-4."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0

    def add(self, name: str, exact: Tensor, rounded: Tensor) -> None:
        """Count one tensor's rounding."""
        difference = rounded.float() - exact
        largest = float(difference.abs().max())
        if largest >= self.max_abs:
            self.max_abs, self.max_abs_tensor = largest, name
        self.squared_error += float(difference.square().sum(dtype=torch.float64))
        self.squared_norm += float(exact.square().sum(dtype=torch.float64))


class SafetensorsWriter:
    """Write tensors to safetensors files in a planned order, keeping none of them.

    Use it as a context manager; leaving it with tensors still missing, other than by an exception, is an error.
    """

    def __init__(self, folder: Path, specs: list[TensorSpec], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Plan the files.

        Args:
            folder: Where they go; it exists.
            specs: All tensors, in the order they will be written.
            max_shard_bytes: Begin a new file before one passes this; a single tensor may pass it.
        """
        self.folder = folder
        self.shards = _shards(specs, max_shard_bytes)
        self._pending = iter(self._plan())
        self._next: tuple[str | None, TensorSpec] | None = next(self._pending, None)
        self._stream: Any = None

    def __enter__(self) -> SafetensorsWriter:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the current file, and write the index when there are several."""
        if self._stream is not None:
            self._stream.close()
        if kind is not None:
            return
        if self._next is not None:
            msg = f"got an end before {self._next[1].name} was written · expected all planned tensors · report this"
            raise CheckpointError(msg)
        if len(self.shards) > 1:
            weight_map = {spec.name: name for name, specs in self.shards.items() for spec in specs}
            total = sum(spec.nbytes for specs in self.shards.values() for spec in specs)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / "model.safetensors.index.json").write_text(
                json.dumps(index, indent=2) + "\n", encoding="utf-8"
            )

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next planned tensor.

        Raises:
            CheckpointError: It is not the planned one, or of another shape or dtype.
        """
        planned = self._next
        if planned is None or planned[1] != TensorSpec(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype):
            got = f"{name} {list(tensor.shape)} {tensor.dtype}"
            msg = f"got {got} to write · expected {planned and planned[1]} · report this"
            raise CheckpointError(msg)
        new_file, _ = planned
        if new_file is not None:
            if self._stream is not None:
                self._stream.close()
            self._stream = (self.folder / new_file).open("wb")
            self._stream.write(_header(self.shards[new_file]))
        self._stream.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        self._next = next(self._pending, None)

    def _plan(self) -> Iterator[tuple[str | None, TensorSpec]]:
        """Yield the tensors in order, the first of each file with the file's name."""
        for name, specs in self.shards.items():
            for position, spec in enumerate(specs):
                yield (name if position == 0 else None), spec


def _shards(specs: list[TensorSpec], max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    parts: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if parts[-1] and sum(other.nbytes for other in parts[-1]) + spec.nbytes > max_shard_bytes:
            parts.append([])
        parts[-1].append(spec)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts, start=1)}


def _header(specs: list[TensorSpec]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        place = [offset, offset + spec.nbytes]
        header[spec.name] = {"dtype": _SAFETENSORS_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": place}
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the bytes that follow are aligned for whoever maps the file
    return len(text).to_bytes(8, "little") + text


def fp16_specs(decoder: DecoderConfig) -> list[TensorSpec]:
    """Return what an fp16 decoder folder holds."""
    return [TensorSpec(name=name, shape=shape, dtype=torch.float16) for name, shape in base_shapes(decoder).items()]


def fp16_tensors(checkpoint: Checkpoint, report: MergeReport) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Merge and round the decoder part by part: the embeddings, each layer, the final norm, the head.

    Args:
        checkpoint: The source.
        report: Receives what the rounding changed.

    Yields:
        (what it is, its tensors in float16 under their full names), in the order of `fp16_specs`.
    """
    for name in ("model.embed_tokens.weight", None, "model.norm.weight", "lm_head.weight"):
        if name is not None:
            yield name, {name: _rounded(name, checkpoint.read_base(name).float(), report)}
            continue
        for index in range(checkpoint.decoder.num_hidden_layers):
            prefix = f"model.layers.{index}."
            merged = checkpoint.read_layer(index).merged()
            yield prefix[:-1], {prefix + key: _rounded(prefix + key, exact, report) for key, exact in merged.items()}


def _rounded(name: str, exact: Tensor, report: MergeReport) -> Tensor:
    rounded = exact.to(torch.float16)
    if not bool(torch.isfinite(rounded).all()):
        msg = f"{name}: got a merged weight of {float(exact.abs().max()):.3g} · expected one that fits float16 (65504)"
        raise CheckpointError(f"{msg} · the checkpoint is damaged, or of a model this exporter does not support")
    report.add(name, exact, rounded)
    return rounded


def write_configs(folder: Path, decoder: DecoderConfig, decoding: DecodingDefaults, *, notice: str) -> None:
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
    generation: dict[str, Any] = {"do_sample": False, "max_new_tokens": decoding.max_new_tokens, **token_ids}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)
    (folder / "NOTICE").write_text(notice + "\n", encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
