"""transformers' decoders with SDPA and a static cache, not compiled; as they are, or with bitsandbytes' linears."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any, Final

import torch

from benchmarks.speed.peers.worker import Engine

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.speed.peers.worker import Order

DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def quantization(form: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `BitsAndBytesConfig` takes; nothing for a form that is not bitsandbytes'."""
    nf4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return {"nf4": nf4 | {"bnb_4bit_compute_dtype": dtype}, "int8": {"load_in_8bit": True}}.get(form, {})


class TransformersEngine(Engine):
    """`AutoModelForCausalLM` and `StaticCache`."""

    def __init__(self, order: Order) -> None:
        """Open the decoder of our artifact in 16 bits, as a user does."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        dtype = DTYPES.get(order.form, torch.float32 if order.device == "cpu" else torch.float16)
        make_config: Any = BitsAndBytesConfig
        wanted = quantization(order.form, dtype)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            order.folder / "dense" / "decoder",
            dtype=dtype,
            device_map={"": order.device},
            attn_implementation="sdpa",
            **({"quantization_config": make_config(**wanted)} if wanted else {}),
        )
        self.model, self.max_seq_len = loaded.eval(), order.max_seq_len
        name = str(dtype).removeprefix("torch.")
        self.computes_in = f"int8, rest {name}" if order.form == "int8" else name
        config, itemsize = self.model.config, self.model.model.embed_tokens.weight.element_size()
        vector = config.num_key_value_heads * config.head_dim
        self.cache_bytes_per_token = 2 * config.num_hidden_layers * vector * itemsize
        # Magnitudes and tables of quantised linears are in the state dict as well.
        state = self.model.state_dict()
        self.weight_bytes = sum(tensor.nbytes for name, tensor in state.items() if "embed_tokens" not in name)

    def reset(self) -> None:
        """Make a new cache."""
        from transformers import StaticCache

        self.cache = StaticCache(config=self.model.config, max_cache_len=self.max_seq_len)
        self.position = 0

    @torch.inference_mode()
    def read(self, input_ids: list[int]) -> Tensor:
        """Run some tokens."""
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


class SiglipTower(Engine):
    """MedGemma's tower with some of its 27 layers, in float32."""

    def __init__(self, num_layers: int, image_size: int) -> None:
        """Draw it."""
        from transformers import SiglipVisionConfig, SiglipVisionModel

        config = SiglipVisionConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=num_layers, num_attention_heads=16,
            image_size=image_size, patch_size=14,
        )  # fmt: skip
        config.vision_use_head = False
        model: Any = SiglipVisionModel(config)
        self.model = model.eval()
        self.computes_in, self.weight_bytes, self.cache_bytes_per_token = "float32", 0, 0

    @torch.inference_mode()
    def tower(self) -> dict[str, float]:
        """Time a film."""
        size = self.model.config.image_size
        pixels = torch.randn(1, 3, size, size)
        started = time.perf_counter()
        self.model(pixel_values=pixels)
        return {"seconds": time.perf_counter() - started}


def build(order: Order) -> TransformersEngine | SiglipTower:
    """Load a decoder, without a word and without the network."""
    torch.set_num_threads(order.threads)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    name, *sizes = order.form.split()
    return SiglipTower(*map(int, sizes)) if name == "siglip" else TransformersEngine(order)
