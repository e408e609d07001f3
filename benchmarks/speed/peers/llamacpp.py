"""llama.cpp through llama-cpp-python, on a GGUF of the same shapes and weights that is written here.

Linears are Q4_0 or Q8_0. The head is Q8_0 in both; llama.cpp's own Q4_0 files have it in Q6_K, which is 6.6 bits and
not 8.5. Norms are float32, the embedding table (of which a token reads one row) float16.
"""

from __future__ import annotations

import importlib
import math
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.speed.peers.engine import Engine, NotHere, run_apart
from lite.files import whole_file

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from benchmarks.speed.peers.worker import Order
    from benchmarks.speed.weights import Model

BATCH_SIZE: Final = 512  # tokens of a prompt at a time: its default
_TENSORS: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OTHERS: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


class LlamaCppEngine(Engine):
    """`llama_cpp.Llama`. It has no depth that can be changed: there is a file for each."""

    fewest_layers = 1
    last_token_only = ("mlp.",)
    llama: Any = None
    num_layers = 0

    def __init__(self, order: Order) -> None:
        self.llama_cpp: Any = importlib.import_module("llama_cpp")
        model, on_gpu = order.model, order.device != "cpu"
        if on_gpu and not self.llama_cpp.llama_supports_gpu_offload():
            raise NotHere("this build has no GPU support")
        self.vocab_size = model.shapes.vocab_size
        kind, _, flash = order.form.partition(" ")
        self.options = {
            "n_ctx": order.max_seq_len,
            "n_batch": BATCH_SIZE,
            "n_threads": order.threads,
            "n_threads_batch": order.threads,
            "flash_attn": bool(flash),
            "n_gpu_layers": -1 if on_gpu else 0,
            "verbose": False,
        }
        self.computes_in = f"{kind[1]}-bit blocks × int8, cache float16"
        self.cache_bytes_per_token = 2 * model.num_layers * model.shapes.hidden_size * 2
        self.weight_bytes = _weight_bytes(model, kind)
        self.files = {
            layers: order.folder / f"{kind}-{layers}.gguf" for layers in (model.num_layers, self.fewest_layers)
        }
        for layers, file in self.files.items():
            if not file.exists():
                run_apart(write_gguf, file, model, kind, num_layers=layers)
        self.load_s = self._load(model.num_layers)

    def start(self, num_layers: int) -> None:
        """Load the file with so many layers, unless it is loaded; empty the cache."""
        if num_layers != self.num_layers:
            self._load(num_layers)
        self.llama.reset()

    def _load(self, num_layers: int) -> float:
        """Load a file; return how long it took."""
        if self.llama is not None:
            self.llama.close()
        started, self.num_layers = time.perf_counter(), num_layers
        self.llama = self.llama_cpp.Llama(model_path=str(self.files[num_layers]), **self.options)
        # The file is mapped: the first token pays for the reading.
        self.llama.eval([0])
        return time.perf_counter() - started

    def read(self, input_ids: list[int]) -> NDArray[np.float32]:
        """Run some tokens."""
        self.llama.eval(input_ids)
        pointer = self.llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
        logits: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))
        return logits


def build(order: Order) -> LlamaCppEngine:
    """Write the files, unless another process of this run has, and load that of the whole model.

    Raises:
        NotHere: the machine has a GPU that this build of llama.cpp cannot use.
    """
    return LlamaCppEngine(order)


def write_gguf(file: Path, model: Model, kind: str, *, num_layers: int) -> None:
    """Write the model with its first layers.

    Args:
        file: where to.
        model: the model.
        kind: "Q4_0" or "Q8_0".
        num_layers: at least 1.
    """
    gguf: Any = importlib.import_module("gguf")
    config = model.config
    heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
    with whole_file(file) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(hidden_size)
        writer.add_block_count(num_layers)
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(heads)
        writer.add_head_count_kv(heads)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_dimension_count(hidden_size // heads)
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_vocab_size(config["vocab_size"])
        # Ids go in and come out: no text, no words.
        writer.add_tokenizer_model("no_vocab")
        for name in model.tensor_shapes:
            if (place := gguf_name(name, num_layers)) is not None:
                values, stored = model.tensor(name), stored_type(name, kind)
                if "q_proj" in name or "k_proj" in name:
                    # llama.cpp's rotary embedding pairs neighbours, Hugging Face's components half a head apart.
                    values = values.reshape(heads, 2, -1, hidden_size).swapaxes(1, 2).reshape(values.shape)
                writer.add_tensor(place, gguf.quants.quantize(values, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def gguf_name(name: str, num_layers: int) -> str | None:
    """Translate a tensor's name; None where it belongs to a layer that is left out."""
    if name in _OTHERS:
        return _OTHERS[name]
    _, _, layer, rest = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_TENSORS[rest]}.weight" if int(layer) < num_layers else None


def stored_type(name: str, kind: str) -> Any:  # noqa: ANN401 - gguf's enumeration
    """Return what a tensor is stored as."""
    types: Any = importlib.import_module("gguf").GGMLQuantizationType
    if "norm" in name:
        return types.F32
    return {"model.embed_tokens.weight": types.F16, "lm_head.weight": types.Q8_0}.get(name, types[kind])


def _weight_bytes(model: Model, kind: str) -> int:
    """Add up what decoding a token reads."""
    sizes: Any = importlib.import_module("gguf").GGML_QUANT_SIZES
    total = 0
    for name, shape in model.tensor_shapes.items():
        if "embed_tokens" not in name:
            values, nbytes = sizes[stored_type(name, kind)]
            total += math.prod(shape) // values * nbytes
    return total
