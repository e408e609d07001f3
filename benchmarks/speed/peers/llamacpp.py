"""llama.cpp through llama-cpp-python, on a GGUF that is written here of a Llama's or Gemma 3's 16 bits.

Linears are Q4_0 or Q8_0. The head is Q8_0 in both; llama.cpp's own Q4_0 files have it in Q6_K, which is 6.6 bits and
not 8.5. Norms are float32, the embedding table float16 where a token reads one row of it; Gemma's is its head, too.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.speed.peers.worker import Engine, NotHere
from lite.files import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from benchmarks.speed.peers.worker import Order

BATCH_SIZE: Final = 512  # tokens of a prompt at a time: its default


class LlamaCppEngine(Engine):
    """`llama_cpp.Llama`."""

    def __init__(self, order: Order, llama_cpp: Any, file: Path) -> None:  # noqa: ANN401 - a module without types
        kind, _, flash = order.form.partition(" ")
        config = json.loads((order.folder / "dense/decoder/config.json").read_text(encoding="utf-8"))
        self.vocab_size = config["vocab_size"]
        self.get_logits = llama_cpp.llama_get_logits_ith
        self.llama = llama_cpp.Llama(
            model_path=str(file),
            n_ctx=order.max_seq_len,
            n_batch=BATCH_SIZE,
            n_threads=order.threads,
            n_threads_batch=order.threads,
            flash_attn=bool(flash),
            n_gpu_layers=0 if order.device == "cpu" else -1,
            verbose=False,
        )
        self.computes_in = f"{kind[1]}-bit blocks × int8, cache float16"
        self.cache_bytes_per_token = (
            4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
        )
        # All of the file but the table of embeddings, in float16; what it says beside tensors is little.
        table = 0 if config["tie_word_embeddings"] else 2 * self.vocab_size * config["hidden_size"]
        self.weight_bytes = file.stat().st_size - table

    def reset(self) -> None:
        """Empty the cache."""
        self.llama.reset()

    def read(self, input_ids: list[int]) -> NDArray[np.float32]:
        """Run some tokens."""
        self.llama.eval(input_ids)
        pointer = self.get_logits(self.llama.ctx, -1)
        logits: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))
        return logits


def build(order: Order) -> LlamaCppEngine:
    """Write the file, unless another process of this run has, and load it.

    Raises:
        NotHere: the machine has a GPU that this build of llama.cpp cannot use.
    """
    llama_cpp: Any = importlib.import_module("llama_cpp")
    if order.device != "cpu" and not llama_cpp.llama_supports_gpu_offload():
        raise NotHere("this build has no GPU support")
    kind = order.form.partition(" ")[0]
    file = order.folder / f"{kind}.gguf"
    if not file.exists():
        # In a process of its own: rounding takes more memory than running.
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as process:
            process.submit(write_gguf, file, order.folder / "dense" / "decoder", kind).result()
    return LlamaCppEngine(order, llama_cpp, file)


def write_gguf(file: Path, decoder: Path, kind: str) -> None:
    """Write a folder of Hugging Face's Llama or Gemma 3 in float16, a tensor after the other, as GGUF.

    Args:
        file: where to.
        decoder: with config.json and safetensors.
        kind: "Q4_0" or "Q8_0".
    """
    gguf: Any = importlib.import_module("gguf")
    config = json.loads((decoder / "config.json").read_text(encoding="utf-8"))
    heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
    types, architectures, is_gemma = gguf.GGMLQuantizationType, gguf.MODEL_ARCH, config["model_type"] == "gemma3_text"
    places = gguf.get_tensor_name_map(
        architectures.GEMMA3 if is_gemma else architectures.LLAMA, config["num_hidden_layers"]
    )
    with whole_file(file) as partial:
        writer = gguf.GGUFWriter(partial, "gemma3" if is_gemma else "llama")
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(hidden_size)
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(heads)
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        if is_gemma:
            writer.add_key_length(config["head_dim"])
            writer.add_value_length(config["head_dim"])
            writer.add_sliding_window(config["sliding_window"])
            writer.add_rope_freq_base(config["rope_parameters"]["full_attention"]["rope_theta"])
        else:
            writer.add_rope_dimension_count(config["head_dim"])
            writer.add_rope_freq_base(config["rope_theta"])
        writer.add_vocab_size(config["vocab_size"])
        # Ids go in and come out: no text, no words.
        writer.add_tokenizer_model("no_vocab")
        for name, stored in _tensors(decoder):
            table = types.Q8_0 if config["tie_word_embeddings"] else types.F16
            kept = {"model.embed_tokens.weight": table, "lm_head.weight": types.Q8_0}.get(name, types[kind])
            kept = types.F32 if "norm" in name else kept
            values = stored.astype(np.float32)
            if is_gemma and "norm" in name:
                values += 1  # Hugging Face keeps what is above 1
            elif not is_gemma and ("q_proj" in name or "k_proj" in name):
                # llama.cpp's rotary embedding pairs neighbours, Hugging Face's components half a head apart.
                values = values.reshape(heads, 2, -1, hidden_size).swapaxes(1, 2).reshape(values.shape)
            writer.add_tensor(
                places.get_name(name, try_suffixes=(".weight",)), gguf.quants.quantize(values, kept), raw_dtype=kept
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _tensors(decoder: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    safetensors: Any = importlib.import_module("safetensors")
    for file in sorted(decoder.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                yield name, opened.get_tensor(name)
