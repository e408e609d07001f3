"""The small files of LLaVA-Rad's published layout, as the phantom and the synthetic checkpoints write them.

They are those of the committed checkpoint, which has the published files' keys and values; what depends on the model is
an argument.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _published(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(__file__).parent / "checkpoint" / name).read_text(encoding="utf-8"))
    return content


GENERATION_CONFIG = _published("base/generation_config.json")
SPECIAL_TOKENS_MAP = _published("base/special_tokens_map.json")


def llama_config_json(llama_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base model's config.json: a plain Llama of these shapes."""
    plain = _published("base/config.json")
    del plain["_name_or_path"]
    return plain | dict(llama_config)


def llava_config_json(
    config: Mapping[str, Any], *, image_size: int, mm_hidden_size: int, rank: int, base_name: str
) -> dict[str, Any]:
    """Return the checkpoint's config.json: the decoder's fields and LLaVA's own."""
    published = _published("llava-rad-phantom/config.json")
    return {
        **published,
        **config,
        "_name_or_path": base_name,
        "architectures": published["architectures"],
        "model_type": published["model_type"],
        "lora_alpha": 2 * rank,
        "lora_r": rank,
        "mm_hidden_size": mm_hidden_size,
        "mm_vision_tower": f"biomedclip_cxr_{image_size}",
        "mm_vision_tower_checkpoint": f"biomedclipcxr_{image_size}_checkpoint.pt",
        # As in the real one, this names a file that is not there: the json beside it has another name.
        "mm_vision_tower_config": f"biomedclip_cxr_{image_size}_config.json",
    }


def adapter_config_json(rank: int, base_name: str) -> dict[str, Any]:
    """Return PEFT's adapter_config.json: LoRA on all seven linears, with twice the rank as alpha."""
    published = _published("llava-rad-phantom/adapter_config.json")
    return published | {"base_model_name_or_path": base_name, "lora_alpha": 2 * rank, "r": rank}


def tower_config_json(image_size: int) -> dict[str, Any]:
    """Return open_clip's model configuration, which holds the tower's name and its image size."""
    published = _published("llava-rad-phantom/biomedclipcxr_112.json") | {"embed_dim": 512}
    published["vision_cfg"]["image_size"] = image_size
    return published


def tokenizer_config_json(model_max_length: int) -> dict[str, Any]:
    """Return tokenizer_config.json: Llama's slow tokenizer."""
    return _published("base/tokenizer_config.json") | {"model_max_length": model_max_length}


def training_checkpoint(trunk: Mapping[str, Tensor]) -> dict[str, Any]:
    """Dress the trunk as an open_clip training checkpoint: text tower, logit scale, optimizer, numpy scalars."""
    import torch  # the peers' own environment, which needs the small files, has none

    dim = int(trunk["cls_token"].shape[-1])
    state = {f"module.visual.trunk.{name}": tensor for name, tensor in trunk.items()}
    text = "module.text.transformer"
    state |= {
        "module.logit_scale": torch.tensor(4.6052),
        "module.visual.head.proj.weight": torch.zeros(8, dim),
        f"{text}.embeddings.word_embeddings.weight": torch.zeros(16, 8),
        f"{text}.encoder.layer.0.attention.self.query.weight": torch.zeros(8, 8),
        f"{text}.pooler.dense.weight": torch.zeros(8, 8),
        f"{text}.pooler.dense.bias": torch.zeros(8),
        "module.text.proj.0.weight": torch.zeros(8, 8),
    }
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(8), "exp_avg_sq": torch.zeros(8)}
    group = {"lr": np.float64(1e-5), "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": np.float64(0.2), "params": [0]}
    return {
        "epoch": 40,
        "name": "phantom",
        "state_dict": state,
        "optimizer": {"state": {0: moments}, "param_groups": [group]},
        "best_loss": np.float32(0.5),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as the published files have it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
