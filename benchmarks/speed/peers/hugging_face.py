"""transformers' Llama with SDPA and a static cache, not compiled; as it is, or with bitsandbytes' linears."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from benchmarks.speed.peers.weights import Model

DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class TransformersEngine:
    """`LlamaForCausalLM` and `StaticCache`."""

    fewest_layers = 0
    fills = True
    last_token_only = ()
    load_s = None

    def __init__(self, model: Any, *, max_seq_len: int, computes_in: str) -> None:  # noqa: ANN401 - a peer's model
        self.model = model
        self.layers = model.model.layers
        self.max_seq_len = max_seq_len
        self.computes_in = computes_in
        config, itemsize = model.config, model.model.embed_tokens.weight.element_size()
        self.cache_bytes_per_token = 2 * config.num_hidden_layers * config.hidden_size * itemsize
        # Magnitudes and tables of quantised linears are in the state dict as well.
        state = model.state_dict()
        self.weight_bytes = sum(tensor.nbytes for name, tensor in state.items() if "embed_tokens" not in name)

    def start(self, num_layers: int) -> None:
        """Keep the first layers, make a new cache."""
        from transformers import StaticCache

        self.model.model.layers = self.layers[:num_layers]
        self.model.config.num_hidden_layers = num_layers
        self.cache = StaticCache(config=self.model.config, max_cache_len=self.max_seq_len)
        self.position = 0

    def prefill(self, input_ids: list[int]) -> Tensor:
        """Run a prompt."""
        return self._run(input_ids)

    def decode_one_token(self, token_id: int) -> Tensor:
        """Run a token."""
        return self._run([token_id])

    @torch.inference_mode()
    def _run(self, input_ids: list[int]) -> Tensor:
        device = self.model.device
        positions = torch.arange(self.position, self.position + len(input_ids), device=device)
        self.position += len(input_ids)
        done = self.model(
            torch.tensor([input_ids], device=device),
            position_ids=positions.unsqueeze(0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = done.logits[0, -1].float()
        return logits

    @torch.inference_mode()
    def fill(self, num_tokens: int) -> None:
        """Draw keys and values. The cache makes its tensors when the first token comes: so one comes."""
        self._run([0])
        self.position = num_tokens
        layers: Any = self.cache.layers
        for layer in layers:
            layer.keys[:, :, :num_tokens].normal_()
            layer.values[:, :, :num_tokens].normal_()
            layer.cumulative_length.fill_(num_tokens)


def build(form: str, model: Model, *, device: str, threads: int, folder: Path) -> TransformersEngine:  # noqa: ARG001
    """Load a Llama as a user does, but for the weights, which come from memory."""
    torch.set_num_threads(threads)
    on_gpu = torch.device(device).type == "cuda"
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    dtype = DTYPES.get(form, torch.float16 if on_gpu else torch.float32)
    quantization: dict[str, dict[str, Any]] = {
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        },
        "int8": {"load_in_8bit": True},
    }
    make_config: Any = BitsAndBytesConfig
    options = {"quantization_config": make_config(**quantization[form])} if form in quantization else {}
    loaded: Any = LlamaForCausalLM.from_pretrained(
        None,
        config=LlamaConfig(**model.config),
        state_dict={name: torch.from_numpy(values) for name, values in model.tensors()},
        dtype=dtype,
        device_map={"": device},
        attn_implementation="sdpa",
        **options,
    )
    computes_in = str(dtype).removeprefix("torch.")
    return TransformersEngine(
        loaded.eval(),
        max_seq_len=model.max_seq_len,
        computes_in=f"int8, rest {computes_in}" if form == "int8" else computes_in,
    )
