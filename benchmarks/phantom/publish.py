"""Write a trained phantom model in LLaVA-Rad's published layout, file for file and key for key.

The published model is not one file but two folders that meet only in the exporter:

    llava-rad-phantom/                       base/
      config.json                LLaVA         config.json                        a plain Llama
      adapter_config.json        PEFT          generation_config.json             sampling defaults nobody should use
      adapter_model.bin          LoRA A, B     pytorch_model.bin.index.json
      non_lora_trainables.bin    projector     pytorch_model-0000{1,2}-of-00002.bin
      biomedclipcxr_112.json     tower shape   tokenizer.model, tokenizer_config.json, special_tokens_map.json
      biomedclipcxr_112_checkpoint.pt          (an open_clip *training* checkpoint)
      NOTICE                                   what its reader must know; the published model has none

Two things are done to the weights on the way, both undone by a correct export:

* **Channel scales** (`fold_channel_scales`). A small trained model has no outlier channels, so any quantiser looks
  perfect on it. Every pair of neighbouring linear maps gets a log-normal factor s per channel on one side and 1/s on
  the other; the function stays the same, the weights become as uneven as a real decoder's. The factors come from
  (sigma, seed) alone, so `unfold_channel_scales` can take them out again.
* **LoRA** (`split_lora`). The top singular directions of each linear become B·A and the base keeps the rest, so that
  forgetting the merge, or merging with the wrong scale, wrecks the model instead of blurring it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

MAX_LOG_SCALE_SIGMAS = 3.0
"""Log scales are clamped to this many sigmas: two factors meet in one weight, and fp16 ends at 65504 and 6e-8."""

_NOTICE = (
    "This is the phantom model, grown on the synthetic films of llava-rad-lite: it reads those and nothing else. On a "
    "real film its text is nonsense."
)

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def channel_scales(llama_config: Mapping[str, Any], *, sigma: float, seed: int) -> dict[str, Tensor]:
    """Draw the channel scales that belong to (shapes, sigma, seed).

    Args:
        llama_config: Hugging Face field names: num_hidden_layers, hidden_size, intermediate_size, heads.
        sigma: Standard deviation of log s; 0 gives all ones.
        seed: Seed of the draw; the same arguments give the same scales on every machine.

    Returns:
        Float64 vectors keyed `{layer}.{attention_input | value | mlp_input | up}`.
    """
    rng = np.random.default_rng([seed, 0x5CA1E])
    hidden_size = int(llama_config["hidden_size"])
    head_dim = hidden_size // int(llama_config["num_attention_heads"])
    widths = {
        "attention_input": hidden_size,
        "value": head_dim * int(llama_config["num_key_value_heads"]),
        "mlp_input": hidden_size,
        "up": int(llama_config["intermediate_size"]),
    }
    scales: dict[str, Tensor] = {}
    for layer in range(int(llama_config["num_hidden_layers"])):
        for place, width in widths.items():
            log_scale = sigma * np.clip(rng.standard_normal(width), -MAX_LOG_SCALE_SIGMAS, MAX_LOG_SCALE_SIGMAS)
            scales[f"{layer}.{place}"] = torch.from_numpy(np.exp(log_scale))
    return scales


def fold_channel_scales(
    llama: Mapping[str, Tensor], llama_config: Mapping[str, Any], *, sigma: float, seed: int
) -> dict[str, Tensor]:
    """Multiply the function-preserving channel scales into a Llama state dict.

    Returns:
        A new float32 state dict that computes the same function (products are taken in float64, rounded once).
    """
    return _rescale(llama, llama_config, channel_scales(llama_config, sigma=sigma, seed=seed))


def unfold_channel_scales(
    llama: Mapping[str, Tensor], llama_config: Mapping[str, Any], *, sigma: float, seed: int
) -> dict[str, Tensor]:
    """Divide the channel scales of `fold_channel_scales` out again."""
    scales = channel_scales(llama_config, sigma=sigma, seed=seed)
    return _rescale(llama, llama_config, {place: 1.0 / scale for place, scale in scales.items()})


def _rescale(
    llama: Mapping[str, Tensor], llama_config: Mapping[str, Any], scales: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    heads_per_kv_head = int(llama_config["num_attention_heads"]) // int(llama_config["num_key_value_heads"])
    head_dim = int(llama_config["hidden_size"]) // int(llama_config["num_attention_heads"])
    state = {name: tensor.detach().to("cpu", torch.float64).clone() for name, tensor in llama.items()}
    for layer in range(int(llama_config["num_hidden_layers"])):
        prefix = f"model.layers.{layer}"
        attention_input = scales[f"{layer}.attention_input"]
        state[f"{prefix}.input_layernorm.weight"] *= attention_input
        for name in ("q_proj", "k_proj", "v_proj"):
            state[f"{prefix}.self_attn.{name}.weight"] /= attention_input
        mlp_input = scales[f"{layer}.mlp_input"]
        state[f"{prefix}.post_attention_layernorm.weight"] *= mlp_input
        for name in ("gate_proj", "up_proj"):
            state[f"{prefix}.mlp.{name}.weight"] /= mlp_input
        up = scales[f"{layer}.up"]
        state[f"{prefix}.mlp.up_proj.weight"] *= up[:, None]
        state[f"{prefix}.mlp.down_proj.weight"] /= up
        value = scales[f"{layer}.value"]
        state[f"{prefix}.self_attn.v_proj.weight"] *= value[:, None]
        # o_proj reads every query head; with grouped queries several of them carry the same value channels.
        per_query_head = value.view(-1, head_dim).repeat_interleave(heads_per_kv_head, dim=0).reshape(-1)
        state[f"{prefix}.self_attn.o_proj.weight"] /= per_query_head
    return {name: tensor.to(torch.float32) for name, tensor in state.items()}


def split_lora(weight: Tensor, *, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Split a linear weight into base + scale · B·A along its top singular directions.

    Args:
        weight: [out, in], float32.
        rank: Number of singular directions that go to LoRA.
        scale: lora_alpha / r, the factor a correct merge applies.

    Returns:
        (base, A, B) in float16, A [rank, in], B [out, rank]. A and B are rounded before the base is computed, so
        merging in float32 gives `weight` back to within the rounding of the base.
    """
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    lora_a = (root[:, None] * vh[:rank]).to(torch.float16)
    lora_b = (u[:, :rank] * root).to(torch.float16)
    base = weight.double() - scale * (lora_b.double() @ lora_a.double())
    return base.to(torch.float16), lora_a, lora_b


def publish(
    out: Path,
    *,
    trunk: Mapping[str, Tensor],
    projector: Mapping[str, Tensor],
    llama: Mapping[str, Tensor],
    llama_config: Mapping[str, Any],
    image_size: int,
    tokenizer_model: bytes,
    lora_rank: int = 8,
    scale_sigma: float = 0.0,
    seed: int = 0,
    name: str = "llava-rad-phantom",
    tie_unused_block: bool = True,
) -> int:
    """Write `out/{name}/` and `out/base/` in the published layout.

    Args:
        out: Folder that receives the two; made when missing, files of the same name are replaced.
        trunk: timm tensor names without prefix, all blocks, the last (unused) one included.
        projector: `0.weight`, `0.bias`, `2.weight`, `2.bias`.
        llama: Hugging Face names, the trained weights before scales and LoRA.
        llama_config: Hugging Face fields; those of a plain Llama are filled in where absent.
        image_size: Side of the square film in pixels, a multiple of 14.
        tokenizer_model: Bytes of the SentencePiece model.
        lora_rank: Singular directions per linear that go into the adapter; lora_alpha is twice that.
        scale_sigma: Sigma of the log channel scales; 0 leaves the weights as trained.
        seed: Seed of the channel scales.
        name: Name of the checkpoint folder.
        tie_unused_block: Store the last block as a second name for its neighbour's storage. Nothing ever runs or
            trains it, and it would be a tenth of the committed bytes.

    Returns:
        Bytes written, all files together.

    Raises:
        ValueError: A weight leaves the float16 range; choose a smaller scale_sigma.
    """
    config = _llama_config(llama_config)
    folded = fold_channel_scales(llama, config, sigma=scale_sigma, seed=seed)
    checkpoint, base = out / name, out / "base"
    checkpoint.mkdir(parents=True, exist_ok=True)
    base.mkdir(parents=True, exist_ok=True)

    base_state: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    for tensor_name, tensor in folded.items():
        if tensor_name.removesuffix(".weight").endswith(LORA_TARGETS):
            rest, lora_a, lora_b = split_lora(tensor, rank=lora_rank, scale=2.0)
            module = f"base_model.model.{tensor_name.removesuffix('.weight')}"
            adapter[f"{module}.lora_A.weight"] = lora_a
            adapter[f"{module}.lora_B.weight"] = lora_b
            base_state[tensor_name] = rest
        else:
            base_state[tensor_name] = tensor.to(torch.float16)
    for tensor_name, tensor in {**base_state, **adapter}.items():
        if not bool(torch.isfinite(tensor).all()):
            message = f"{tensor_name} leaves the float16 range with {scale_sigma=}; choose a smaller sigma"
            raise ValueError(message)

    trunk = {key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in trunk.items()}
    if tie_unused_block:
        trunk = _tie_last_block(trunk)
    torch.save(_owned(adapter), checkpoint / "adapter_model.bin")
    torch.save(
        _owned({f"base_model.model.model.mm_projector.{key}": t.to(torch.float16) for key, t in projector.items()}),
        checkpoint / "non_lora_trainables.bin",
    )
    torch.save(_training_checkpoint(trunk), checkpoint / f"biomedclipcxr_{image_size}_checkpoint.pt")
    mm_hidden_size = int(trunk["cls_token"].shape[-1])
    _write_json(checkpoint / f"biomedclipcxr_{image_size}.json", _tower_config(image_size))
    llava_config = _llava_config(
        config, image_size=image_size, mm_hidden_size=mm_hidden_size, rank=lora_rank, base_name=f"{name}/base"
    )
    _write_json(checkpoint / "config.json", llava_config)
    _write_json(checkpoint / "adapter_config.json", _adapter_config(lora_rank, f"{name}/base"))

    (checkpoint / "NOTICE").write_text(f"{_NOTICE}\n", encoding="utf-8")

    _write_shards(base, base_state)
    _write_json(base / "config.json", {**config, "_name_or_path": f"{name}/base"})
    _write_json(base / "generation_config.json", _GENERATION_CONFIG)
    (base / "tokenizer.model").write_bytes(tokenizer_model)
    _write_json(base / "tokenizer_config.json", _tokenizer_config(int(config["max_position_embeddings"])))
    _write_json(base / "special_tokens_map.json", _SPECIAL_TOKENS_MAP)
    return sum(path.stat().st_size for folder in (checkpoint, base) for path in folder.iterdir())


def random_weights(
    llama_config: Mapping[str, Any],
    *,
    image_size: int = 112,
    dim: int = 192,
    depth: int = 5,
    patch_size: int = 14,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Draw well-scaled random weights of the model's form: what tests publish when no training was done.

    Returns:
        (trunk, projector, llama), named as `publish` takes them.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float | None = None) -> Tensor:
        fan_in = shape[-1] if len(shape) == 2 else int(np.prod(shape[1:]))
        return torch.randn(shape, generator=generator) * (std if std is not None else fan_in**-0.5)

    num_patches = (image_size // patch_size) ** 2
    trunk = {
        "cls_token": normal(1, 1, dim, std=0.02),
        "pos_embed": normal(1, 1 + num_patches, dim, std=0.2),
        "patch_embed.proj.weight": normal(dim, 3, patch_size, patch_size),
        "patch_embed.proj.bias": normal(dim, std=0.02),
        "norm.weight": torch.ones(dim),
        "norm.bias": torch.zeros(dim),
    }
    linears = {
        "attn.qkv": (3 * dim, dim),
        "attn.proj": (dim, dim),
        "mlp.fc1": (4 * dim, dim),
        "mlp.fc2": (dim, 4 * dim),
    }
    for block in range(depth):
        prefix = f"blocks.{block}"
        for norm in ("norm1", "norm2"):
            trunk[f"{prefix}.{norm}.weight"] = 1.0 + normal(dim, std=0.1)
            trunk[f"{prefix}.{norm}.bias"] = normal(dim, std=0.1)
        for linear, (rows, columns) in linears.items():
            trunk[f"{prefix}.{linear}.weight"] = normal(rows, columns)
            trunk[f"{prefix}.{linear}.bias"] = normal(rows, std=0.02)
        for gamma in ("ls1.gamma", "ls2.gamma"):
            trunk[f"{prefix}.{gamma}"] = 0.5 + normal(dim, std=0.1)

    hidden_size, intermediate_size = int(llama_config["hidden_size"]), int(llama_config["intermediate_size"])
    kv_size = hidden_size // int(llama_config["num_attention_heads"]) * int(llama_config["num_key_value_heads"])
    vocab_size = int(llama_config["vocab_size"])
    projector = {
        "0.weight": normal(hidden_size, dim),
        "0.bias": normal(hidden_size, std=0.02),
        "2.weight": normal(hidden_size, hidden_size),
        "2.bias": normal(hidden_size, std=0.02),
    }
    llama = {"model.embed_tokens.weight": normal(vocab_size, hidden_size, std=1.0)}
    shapes = {
        "self_attn.q_proj": (hidden_size, hidden_size),
        "self_attn.k_proj": (kv_size, hidden_size),
        "self_attn.v_proj": (kv_size, hidden_size),
        "self_attn.o_proj": (hidden_size, hidden_size),
        "mlp.gate_proj": (intermediate_size, hidden_size),
        "mlp.up_proj": (intermediate_size, hidden_size),
        "mlp.down_proj": (hidden_size, intermediate_size),
    }
    for layer in range(int(llama_config["num_hidden_layers"])):
        prefix = f"model.layers.{layer}"
        for linear, (rows, columns) in shapes.items():
            llama[f"{prefix}.{linear}.weight"] = normal(rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            llama[f"{prefix}.{norm}.weight"] = 1.0 + normal(hidden_size, std=0.1)
    llama["model.norm.weight"] = 1.0 + normal(hidden_size, std=0.1)
    llama["lm_head.weight"] = normal(vocab_size, hidden_size, std=2.0 * hidden_size**-0.5)
    return trunk, projector, llama


def _llama_config(llama_config: Mapping[str, Any]) -> dict[str, Any]:
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


def _llava_config(
    config: Mapping[str, Any], *, image_size: int, mm_hidden_size: int, rank: int, base_name: str
) -> dict[str, Any]:
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


def _adapter_config(rank: int, base_name: str) -> dict[str, Any]:
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


def _tower_config(image_size: int) -> dict[str, Any]:
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


def _training_checkpoint(trunk: Mapping[str, Tensor]) -> dict[str, Any]:
    """Dress the trunk as an open_clip training checkpoint: text tower, logit scale, optimizer, numpy scalars."""
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


def _tie_last_block(trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    last = max(int(name.split(".")[1]) for name in trunk if name.startswith("blocks."))
    tied = dict(trunk)
    for name in trunk:
        if name.startswith(f"blocks.{last}."):
            tied[name] = trunk[name.replace(f"blocks.{last}.", f"blocks.{last - 1}.", 1)]
    return tied


def _write_shards(base: Path, state: Mapping[str, Tensor]) -> None:
    """Write two pickle shards, roughly three quarters and one quarter, and their index."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    shards: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    written = 0
    for name, tensor in state.items():
        shards[0 if written < 0.74 * total else 1][name] = tensor
        written += tensor.numel() * tensor.element_size()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(_owned(shard), base / file_name)
        weight_map |= dict.fromkeys(shard, file_name)
    _write_json(base / "pytorch_model.bin.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _owned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors out of larger storages, which torch.save would otherwise write whole."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _special_token(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


_GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_length": 4096,
    "pad_token_id": 0,
    "temperature": 0.9,
    "top_p": 0.6,
    "transformers_version": "4.31.0",
}

_SPECIAL_TOKENS_MAP = {
    "bos_token": _special_token("<s>"),
    "eos_token": _special_token("</s>"),
    "pad_token": "<unk>",
    "unk_token": _special_token("<unk>"),
}


def _tokenizer_config(model_max_length: int) -> dict[str, Any]:
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
