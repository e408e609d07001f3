"""The small files of LLaVA-Rad's published layout, as the phantom and the synthetic checkpoints write them.

Values that depend on the model are arguments; all others are those of the published files.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama_config_json(llama_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base model's config.json: a plain Llama of these shapes."""
    plain = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_cache": True,
    }
    return {**plain, **llama_config}


def llava_config_json(
    config: Mapping[str, Any], *, image_size: int, mm_hidden_size: int, rank: int, base_name: str
) -> dict[str, Any]:
    """Return the checkpoint's config.json: the decoder's fields and LLaVA's own."""
    return {
        **config,
        "_name_or_path": base_name,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "square",
        "image_grid_pinpoints": None,
        "lora_alpha": 2 * rank,
        "lora_r": rank,
        "mm_hidden_size": mm_hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"biomedclip_cxr_{image_size}",
        "mm_vision_tower_checkpoint": f"biomedclipcxr_{image_size}_checkpoint.pt",
        # As in the real one, this names a file that is not there: the json beside it has another name.
        "mm_vision_tower_config": f"biomedclip_cxr_{image_size}_config.json",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }


def adapter_config_json(rank: int, base_name: str) -> dict[str, Any]:
    """Return PEFT's adapter_config.json: LoRA on all seven linears, with twice the rank as alpha."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "revision": None,
        "target_modules": list(LORA_TARGETS),
        "task_type": "CAUSAL_LM",
    }


def tower_config_json(image_size: int) -> dict[str, Any]:
    """Return open_clip's model configuration, which holds the tower's name and its image size."""
    return {
        "embed_dim": 512,
        "vision_cfg": {
            "timm_model_name": "vit_base_patch14_dinov2.lvd142m",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": image_size,
        },
        "text_cfg": {
            "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_tokenizer_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 256,
        },
    }


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


def _special_token(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_length": 4096,
    "pad_token_id": 0,
    "temperature": 0.9,
    "top_p": 0.6,
    "transformers_version": "4.31.0",
}

SPECIAL_TOKENS_MAP = {
    "bos_token": _special_token("<s>"),
    "eos_token": _special_token("</s>"),
    "pad_token": "<unk>",
    "unk_token": _special_token("<unk>"),
}


def tokenizer_config_json(model_max_length: int) -> dict[str, Any]:
    """Return tokenizer_config.json: Llama's slow tokenizer."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", **_special_token("<s>")},
        "clean_up_tokenization_spaces": False,
        "eos_token": {"__type": "AddedToken", **_special_token("</s>")},
        "legacy": False,
        "model_max_length": model_max_length,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": {"__type": "AddedToken", **_special_token("<unk>")},
    }
