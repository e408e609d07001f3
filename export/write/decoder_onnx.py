"""`decoder.onnx`: the integers of `decoder/` once more, as a graph that ONNX Runtime computes without torch.

    inputs_embeds [B,T,C] ─norm─ qkv ─ GroupQueryAttention ─ o ─▶ + ─norm─ gate·up ─ silu(gate)·up ─ down ─▶ + …
                                            │      ▲                            × num_hidden_layers
                     present.i.key, .value ◀┘      └ past_key_values.i.key, .value: one buffer for both
    … ─ the rows of logits_at ─ norm ─ lm_head ─▶ logits [B,n,V]

    decoder.onnx              the graph, the cache in float
    decoder.int8_cache.onnx   the same graph, the cache in int8
    decoder.onnx.data         the weights of both: mapped into memory, each linear once
    embed_tokens.npy          the embeddings, float16; a prompt's rows are read from it, and the image put between

All operators are ones that ONNX Runtime's CUDA provider has, too. (DirectML has their names, but its attention takes
neither packed inputs nor a rotary embedding.) The graph is written node by node, and its weights go to the disk one
linear at a time: the memory it takes is that of the largest.

- *MatMulNBits* multiplies by the GPTQ integers as they are. With accuracy_level 4 it rounds its inputs to int8, a scale
  for each block: that is what makes it fast on a CPU, and the one thing it does less exactly than torch's decoder.
- *GroupQueryAttention* turns queries and keys, writes the cache in place and attends over it.
- Behind the last layer's attention only the tokens that logits are wanted of go on: one of a prompt, and of a layer
  that is a quarter, as of a 7B model's, a third of what is left to do.
- The head is 8-bit: as `decoder/` has it, or rounded to nearest if it is 16-bit there.

`export.write.int8_cache_graph` writes the second graph, whose cache is int8.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from safetensors import safe_open

from export.quantize.gptq import Grid, round_to_nearest
from export.write.decoder import HEAD, HEAD_BITS
from export.write.onnx_graph import CONTRIB, Graph
from kernels.gptq import TENSORS, GptqWeight
from kernels.packing import to_blocks
from kernels.reference import rotary_table
from lite.errors import ArtifactError
from lite.memory.counts import onnx_block_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from lite.artifact.parts import OnnxFloat
    from lite.config import DecoderConfig

    Array = np.ndarray[Any, np.dtype[Any]]

GRAPH_NAME: Final = "decoder.onnx"
DATA_NAME: Final = "decoder.onnx.data"
EMBEDDINGS_NAME: Final = "embed_tokens.npy"
LM_HEAD: Final = "lm_head"
ACCURACY_LEVEL: Final = 4
"""Inputs of MatMulNBits are rounded to int8. Without it (level 0 or 1) a 4-bit product of one row takes four times as
long (2 cores, AVX2, ONNX Runtime 1.32, November 2026)."""
_ALIGNMENT: Final = 1 << 16
"""Where a tensor begins in the data file: Windows maps files in steps of 64 KiB."""
_HEAD_ROWS: Final = 4096
"""Of the head, rounded at a time."""
_NUMPY: Final[Mapping[OnnxFloat, Any]] = {"float32": np.float32, "float16": np.float16}
_HEAD_DIM_FACTOR: Final = 16
_ONNX: Final[Mapping[str, int]] = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def write_decoder_onnx(folder: Path, files: Sequence[Path], config: DecoderConfig, *, dtype: OnnxFloat) -> None:
    """Write decoder.onnx, its data and the embeddings from the safetensors of `decoder/`.

    Raises:
        ArtifactError: the decoder is not GPTQ, or a tensor is missing or damaged.
    """
    require_gptq(config)
    source = _Source(files, config)
    np.save(folder / EMBEDDINGS_NAME, source.read("model.embed_tokens.weight").numpy())
    with (folder / DATA_NAME).open("wb") as data:
        graph = _Graph(data, dtype)
        _decoder(graph, source, config)
    model = _model(graph, config)
    (folder / GRAPH_NAME).write_bytes(model.SerializeToString())


def require_head_dim(config: DecoderConfig) -> None:
    """Raise ArtifactError for heads that ONNX Runtime's GroupQueryAttention, with rotary embeddings, does not take."""
    if config.head_dim % _HEAD_DIM_FACTOR:
        msg = f"got head_dim={config.head_dim} · expected a multiple of {_HEAD_DIM_FACTOR}, as ONNX Runtime's attention"
        raise ArtifactError(f"{msg} takes no other · use the torch engine: leave out --engine onnx")


def require_gptq(config: DecoderConfig) -> None:
    """Raise ArtifactError for a decoder that has no integers for decoder.onnx."""
    if config.quantization is None or not config.quantization.format.startswith("gptq"):
        stored = config.quantization.format if config.quantization else "fp16"
        msg = f"got a decoder in {stored} · expected gptq-int4 or gptq-int8, whose integers decoder.onnx takes over"
        raise ArtifactError(f"{msg} · export with --decoder gptq-int4")


# -- The graph -------------------------------------------------------------------------------------------------------


def _decoder(graph: _Graph, source: _Source, config: DecoderConfig) -> None:
    """Add all nodes, from inputs_embeds to logits."""
    cos, sin = rotary_table(torch.arange(config.max_position_embeddings), config.head_dim, config.rope_theta)
    rotary = graph.constant("cos_cache", cos.numpy()), graph.constant("sin_cache", sin.numpy())
    norm = functools.partial(graph.skip_norm, epsilon=config.rms_norm_eps)
    weight = graph.constant("layers.0.input_layernorm", source.vector("model.layers.0.input_layernorm.weight"))
    x = graph.add("SimplifiedLayerNormalization", "inputs_embeds", weight, epsilon=config.rms_norm_eps, axis=-1)
    residual = "inputs_embeds"
    for layer in range(config.num_hidden_layers):
        name, stored, last = f"layers.{layer}", f"model.layers.{layer}", layer + 1 == config.num_hidden_layers
        qkv = graph.linear(x, f"{name}.qkv", [source.linear(f"{stored}.self_attn.{part}_proj") for part in "qkv"])
        x = _attention(graph, qkv, rotary, config, layer)
        if last:
            x = graph.add("Gather", x, "logits_at", axis=1, name=f"{name}.attended_at")
            residual = graph.add("Gather", residual, "logits_at", axis=1, name=f"{name}.residual_at")
        x = graph.linear(x, f"{name}.o", [source.linear(f"{stored}.self_attn.o_proj")])
        after = source.vector(f"{stored}.post_attention_layernorm.weight")
        x, residual = norm(x, residual, f"{name}.post_attention_layernorm", after)
        parts = [source.linear(f"{stored}.mlp.{part}_proj") for part in ("gate", "up")]
        gate_up = graph.linear(x, f"{name}.gate_up", parts)
        halves = [f"{name}.gate_up.first", f"{name}.gate_up.second"]
        gate, up = graph.split(gate_up, halves, axis=-1, name=f"{name}.gate_up.split")
        silu = graph.add("QuickGelu", gate, domain=CONTRIB, alpha=1.0, name=f"{name}.silu")
        x = graph.linear(
            graph.add("Mul", silu, up, name=f"{name}.gated"), f"{name}.down", [source.linear(f"{stored}.mlp.down_proj")]
        )
        following = "model.norm.weight" if last else f"model.layers.{layer + 1}.input_layernorm.weight"
        following_name = "norm" if last else f"layers.{layer + 1}.input_layernorm"
        x, residual = norm(x, residual, following_name, source.vector(following))
    logits = graph.linear(x, LM_HEAD, [source.head()])
    graph.add("Cast", logits, to=TensorProto.FLOAT, outputs=["logits"])


def _attention(graph: _Graph, qkv: str, rotary: tuple[str, str], config: DecoderConfig, layer: int) -> str:
    name, past, present = f"layers.{layer}.attention", f"past_key_values.{layer}", f"present.{layer}"
    return graph.add(
        "GroupQueryAttention",
        # Keys and values come with the queries: two inputs stay empty.
        *[qkv, "", "", f"{past}.key", f"{past}.value", "seqlens_k", "total_sequence_length", *rotary],
        name=name,
        outputs=[f"{name}.out", f"{present}.key", f"{present}.value"],
        domain=CONTRIB,
        num_heads=config.num_attention_heads,
        kv_num_heads=config.num_key_value_heads,
        do_rotary=1,
        rotary_interleaved=0,
    )


class _Graph(Graph):
    """The decoder's, whose constants go to the data file as they are added."""

    def __init__(self, data: BinaryIO, dtype: OnnxFloat) -> None:
        super().__init__()
        self.data = data
        self.dtype = dtype

    def skip_norm(self, x: str, residual: str, name: str, weight: Array, *, epsilon: float) -> tuple[str, str]:
        """Add x to the residual stream and norm that; return the normed and the sum."""
        outputs = [f"{name}.out", "", "", f"{name}.sum"]
        inputs = [x, residual, self.constant(name, weight)]
        operator = "SkipSimplifiedLayerNormalization"
        self.add(operator, *inputs, name=f"{name}.norm", outputs=outputs, domain=CONTRIB, epsilon=epsilon)
        return outputs[0], outputs[3]

    def linear(self, x: str, name: str, parts: list[_Blocks]) -> str:
        """Add x Wᵀ, with the outputs of all parts side by side."""
        first = parts[0]
        values = self.external(f"{name}.values", np.concatenate([part.values for part in parts]))
        scales = self.constant(f"{name}.scales", np.concatenate([part.scales.reshape(-1) for part in parts]))
        return self.add(
            "MatMulNBits",
            x,
            values,
            scales,
            name=name,
            domain=CONTRIB,
            K=first.values.shape[1] * first.block_size,
            N=sum(len(part.values) for part in parts),
            bits=first.bits,
            block_size=first.block_size,
            accuracy_level=ACCURACY_LEVEL,
        )

    def constant(self, name: str, values: Array) -> str:
        """Add a constant in the dtype of the activations."""
        with np.errstate(over="ignore"):
            rounded = values.astype(_NUMPY[self.dtype])
        if not np.isfinite(rounded).all():
            msg = f"decoder.onnx: got {name} up to {np.abs(values).max():.3g} · expected values that fit {self.dtype}"
            raise ArtifactError(f"{msg} · the artifact is damaged: export it again")
        return self.external(name, rounded)

    def external(self, name: str, values: Array) -> str:
        """Write values to the data file, and add a constant that says where they are."""
        self.constants.append(external_tensor(self.data, name, values, location=DATA_NAME))
        return name


def external_tensor(data: BinaryIO, name: str, values: Array, *, location: str) -> TensorProto:
    """Write values to a data file of a graph; return the constant that says where they are."""
    data.write(b"\0" * (-data.tell() % _ALIGNMENT))
    tensor = TensorProto(
        name=name,
        data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
        dims=values.shape,
        data_location=TensorProto.EXTERNAL,
    )
    place = {"location": location, "offset": str(data.tell()), "length": str(values.nbytes)}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    data.write(np.ascontiguousarray(values).data)
    return tensor


def _model(graph: _Graph, config: DecoderConfig) -> onnx.ModelProto:
    value, dtype = helper.make_tensor_value_info, _ONNX[graph.dtype]
    inputs = [
        value("inputs_embeds", dtype, ["batch", "length", config.hidden_size]),
        value("seqlens_k", TensorProto.INT32, ["batch"]),
        value("total_sequence_length", TensorProto.INT32, []),
        value("logits_at", TensorProto.INT64, ["num_logits"]),
    ]
    outputs = [value("logits", TensorProto.FLOAT, ["batch", "num_logits", config.vocab_size])]
    shape: list[str | int | None] = ["batch", config.num_key_value_heads, "max_seq_len", config.head_dim]
    for layer in range(config.num_hidden_layers):
        for kind in ("key", "value"):
            inputs.append(value(f"past_key_values.{layer}.{kind}", dtype, shape))
            outputs.append(value(f"present.{layer}.{kind}", dtype, shape))
    return graph.model("decoder", inputs, outputs, ("", CONTRIB))


# -- The weights -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Blocks:
    """A linear as MatMulNBits takes it."""

    values: Array  # uint8 [N, K / block_size, block_size * bits / 8]
    scales: Array  # float32 [N, K / block_size]
    bits: int
    block_size: int


class _Source:
    """The tensors of `decoder/`, read one at a time."""

    def __init__(self, files: Sequence[Path], config: DecoderConfig) -> None:
        self.config = config
        self.files: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                self.files |= dict.fromkeys(tensors.keys(), file)

    def read(self, name: str) -> Tensor:
        """Read a tensor, and close the file: a mapping that stayed open would keep what was read in memory."""
        if name not in self.files:
            msg = f"decoder/: got no tensor {name} · expected those of its config.json · export the artifact again"
            raise ArtifactError(msg)
        with safe_open(self.files[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor

    def vector(self, name: str) -> Array:
        values: Array = self.read(name).float().numpy()
        return values

    def linear(self, name: str, bits: int | None = None) -> _Blocks:
        """Read a GPTQ linear."""
        quantization = self.config.quantization
        bits = bits or (quantization.bits if quantization else 4)
        try:
            weight = GptqWeight.from_tensors({part: self.read(f"{name}.{part}") for part in TENSORS}, bits=bits)
        except ValueError as error:
            raise ArtifactError(f"decoder/: {name}: {error} · export the artifact again") from error
        block_size = self.block_size(weight.shape[1])
        scales = weight.scales.t().float().repeat_interleave(weight.group_size // block_size, dim=1)
        values = to_blocks(weight.qweight, bits, block_size)
        return _Blocks(values=values.numpy(), scales=scales.numpy(), bits=bits, block_size=block_size)

    def head(self) -> _Blocks:
        """Read the head, or round it to 8 bits."""
        quantization = self.config.quantization
        if quantization is not None and quantization.lm_head is not None:
            return self.linear(HEAD, quantization.lm_head.bits)
        tied = self.config.tie_word_embeddings
        weight = self.read("model.embed_tokens.weight" if tied else f"{HEAD}.weight")
        block_size = self.block_size(weight.shape[1])
        grid = Grid(bits=HEAD_BITS, group_size=block_size)
        rounded = [round_to_nearest(rows.float(), grid, clip="mse") for rows in torch.split(weight, _HEAD_ROWS)]
        values = torch.cat([part.values for part in rounded]).to(torch.int16).add_(128).to(torch.uint8)
        scales = torch.cat([part.scales for part in rounded]).float()
        return _Blocks(
            values=values.view(len(values), -1, block_size).numpy(),
            scales=scales.numpy(),
            bits=HEAD_BITS,
            block_size=block_size,
        )

    def block_size(self, in_features: int) -> int:
        """Return the inputs of a block: a group, or of a whole row as many as fit."""
        quantization = self.config.quantization
        size = onnx_block_size(in_features, quantization.group_size if quantization is not None else None)
        if size is not None:
            return size
        msg = f"got a linear of {in_features} inputs · expected a multiple of 16, for the blocks of MatMulNBits"
        raise ArtifactError(f"{msg} · this decoder has no decoder.onnx")
