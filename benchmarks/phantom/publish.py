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
  (sigma, seed) alone, so that they can be taken out again.
* **LoRA** (`split_lora`). The top singular directions of each linear become B·A and the base keeps the rest, so that
  forgetting the merge, or merging with the wrong scale, wrecks the model instead of blurring it.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.phantom.layout import (
    GENERATION_CONFIG,
    LORA_TARGETS,
    SPECIAL_TOKENS_MAP,
    adapter_config_json,
    llama_config_json,
    llava_config_json,
    tokenizer_config_json,
    tower_config_json,
    training_checkpoint,
    write_json,
)
from benchmarks.speed.weights import Shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

MAX_LOG_SCALE_SIGMAS = 3.0
"""Log scales are clamped to this many sigmas: two factors meet in one weight, and fp16 ends at 65504 and 6e-8."""

_PLACES = ("attention_input", "value", "mlp_input", "up")
NAME = "llava-rad-phantom"
ADAPTER_PREFIX = "base_model.model."
PROJECTOR_PREFIX = f"{ADAPTER_PREFIX}model.mm_projector."
LORA_SCALE = 2
"""lora_alpha / r, whatever the rank."""
_NOTICE = (
    "This is the phantom model, grown on the synthetic films of llava-rad-lite: it reads those and nothing else. On a "
    "real film its text is nonsense."
)


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
    hidden_size, intermediate_size = (int(llama_config[name]) for name in ("hidden_size", "intermediate_size"))
    value_size = hidden_size // int(llama_config["num_attention_heads"]) * int(llama_config["num_key_value_heads"])
    widths = (hidden_size, value_size, hidden_size, intermediate_size)
    scales: dict[str, Tensor] = {}
    for layer in range(int(llama_config["num_hidden_layers"])):
        for place, width in zip(_PLACES, widths, strict=True):
            log_scale = sigma * np.clip(rng.standard_normal(width), -MAX_LOG_SCALE_SIGMAS, MAX_LOG_SCALE_SIGMAS)
            scales[f"{layer}.{place}"] = torch.from_numpy(np.exp(log_scale))
    return scales


def fold_channel_scales(
    llama: Mapping[str, Tensor], llama_config: Mapping[str, Any], *, sigma: float, seed: int
) -> dict[str, Tensor]:
    """Multiply the function-preserving channel scales into a Llama state dict; with -sigma they come out again.

    Returns:
        A new float32 state dict that computes the same function (products are taken in float64, rounded once).
    """
    scales = channel_scales(llama_config, sigma=sigma, seed=seed)
    num_heads, num_kv_heads = (int(llama_config[f"num_{kind}_heads"]) for kind in ("attention", "key_value"))
    state = {name: tensor.detach().to("cpu", torch.float64).clone() for name, tensor in llama.items()}
    for layer in range(int(llama_config["num_hidden_layers"])):
        attention, value, mlp, up = (scales[f"{layer}.{place}"] for place in _PLACES)
        # o_proj reads every query head; with grouped queries several of them carry the same value channels.
        by_query_head = value.view(num_kv_heads, -1).repeat_interleave(num_heads // num_kv_heads, dim=0).flatten()
        inputs = {f"self_attn.{name}_proj": attention for name in "qkv"} | {"self_attn.o_proj": by_query_head}
        inputs |= {"mlp.gate_proj": mlp, "mlp.up_proj": mlp, "mlp.down_proj": up}
        outputs = {"input_layernorm": attention, "post_attention_layernorm": mlp}
        outputs |= {"self_attn.v_proj": value[:, None], "mlp.up_proj": up[:, None]}
        for name, scale in inputs.items():
            state[f"model.layers.{layer}.{name}.weight"] /= scale
        for name, scale in outputs.items():
            state[f"model.layers.{layer}.{name}.weight"] *= scale
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
) -> int:
    """Write `out/llava-rad-phantom/` and `out/base/` in the published layout.

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

    Returns:
        Bytes written, all files together.

    Raises:
        ValueError: A weight leaves the float16 range; choose a smaller scale_sigma.
    """
    config = llama_config_json(llama_config)
    base_state, adapter = _split(fold_channel_scales(llama, config, sigma=scale_sigma, seed=seed), lora_rank)
    if wrong := [name for name, tensor in {**base_state, **adapter}.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"{wrong[0]} leaves the float16 range with {scale_sigma=}; choose a smaller sigma")
    checkpoint, base = out / NAME, out / "base"
    checkpoint.mkdir(parents=True, exist_ok=True)
    base.mkdir(parents=True, exist_ok=True)
    shapes = {"image_size": image_size, "mm_hidden_size": int(trunk["cls_token"].shape[-1]), "rank": lora_rank}
    llava = llava_config_json(config, **shapes, base_name=f"{NAME}/base")
    write_trained(checkpoint, adapter=adapter, projector=projector, config=llava, rank=lora_rank)
    _write_tower(checkpoint, trunk, image_size)
    (checkpoint / "NOTICE").write_text(f"{_NOTICE}\n", encoding="utf-8")
    _write_base(base, base_state, config, tokenizer_model)
    return sum(path.stat().st_size for folder in (checkpoint, base) for path in folder.iterdir())


def write_trained(
    checkpoint: Path,
    *,
    adapter: Mapping[str, Tensor],
    projector: Mapping[str, Tensor],
    config: Mapping[str, Any],
    rank: int,
) -> int:
    """Write what LLaVA trains: LoRA and projector in float16, and the configurations that say LoRA's rank.

    Args:
        checkpoint: The folder, which is there.
        adapter: LoRA's factors under PEFT's names.
        projector: As for `publish`.
        config: The rest of config.json.
        rank: Of the LoRA.

    Returns:
        Bytes of LoRA and projector.
    """
    lora = {key: tensor.to(torch.float16) for key, tensor in adapter.items()}
    files = {"adapter_model.bin": lora, "non_lora_trainables.bin": _named(projector)}
    for name, tensors in files.items():
        torch.save(_owned(tensors), checkpoint / name)
    write_json(checkpoint / "config.json", {**config, "lora_alpha": LORA_SCALE * rank, "lora_r": rank})
    write_json(checkpoint / "adapter_config.json", adapter_config_json(rank, f"{NAME}/base"))
    return sum((checkpoint / name).stat().st_size for name in files)


def write_peft(folder: Path, *, adapter: Mapping[str, Tensor], projector: Mapping[str, Tensor], rank: int) -> int:
    """Write what PEFT and LLaVA's training leave of a LoRA: the factors in bfloat16, the projector beside them.

    Args:
        folder: As for `write_trained`; so are the others.

    Returns:
        Bytes of LoRA and projector.
    """
    lora, trainables = folder / "adapter_model.safetensors", folder / "non_lora_trainables.bin"
    save_file(_owned({key: tensor.to(torch.bfloat16) for key, tensor in adapter.items()}), lora, {"format": "pt"})
    torch.save(_owned(_named(projector)), trainables)
    write_json(folder / "adapter_config.json", adapter_config_json(rank, f"{NAME}/base"))
    return lora.stat().st_size + trainables.stat().st_size


def _named(projector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a projector's tensors LLaVA's names, in float16."""
    return {f"{PROJECTOR_PREFIX}{key}": tensor.to(torch.float16) for key, tensor in projector.items()}


def _split(llama: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into the base's and the adapter's, both float16."""
    base: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    for name, tensor in llama.items():
        module = name.removesuffix(".weight")
        base[name] = tensor.to(torch.float16)
        if module.endswith(LORA_TARGETS):
            base[name], lora_a, lora_b = split_lora(tensor, rank=rank, scale=LORA_SCALE)
            adapter[f"{ADAPTER_PREFIX}{module}.lora_A.weight"] = lora_a
            adapter[f"{ADAPTER_PREFIX}{module}.lora_B.weight"] = lora_b
    return base, adapter


def _write_tower(checkpoint: Path, trunk: Mapping[str, Tensor], image_size: int) -> None:
    """Write the tower, its last block as a second name for its neighbour's storage.

    Nothing ever runs or trains that block, and it would be a tenth of the committed bytes.
    """
    tower = {key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in trunk.items()}
    last = max(int(name.split(".")[1]) for name in tower if name.startswith("blocks."))
    for name in tower:
        if name.startswith(f"blocks.{last}."):
            tower[name] = tower[name.replace(f"blocks.{last}.", f"blocks.{last - 1}.", 1)]
    torch.save(training_checkpoint(tower), checkpoint / f"biomedclipcxr_{image_size}_checkpoint.pt")
    write_json(checkpoint / f"biomedclipcxr_{image_size}.json", tower_config_json(image_size))


def _write_base(base: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], tokenizer_model: bytes) -> None:
    """Write the base model; its weights as two pickle shards, roughly three quarters and one quarter."""
    total = sum(tensor.nbytes for tensor in state.values())
    shards: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    written = 0
    for name, tensor in state.items():
        shards[0 if written < 0.74 * total else 1][name] = tensor
        written += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(_owned(shard), base / file_name)
        weight_map |= dict.fromkeys(shard, file_name)
    write_json(base / "pytorch_model.bin.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(base / "config.json", {**config, "_name_or_path": f"{NAME}/base"})
    write_json(base / "generation_config.json", GENERATION_CONFIG)
    (base / "tokenizer.model").write_bytes(tokenizer_model)
    write_json(base / "tokenizer_config.json", tokenizer_config_json(int(config["max_position_embeddings"])))
    write_json(base / "special_tokens_map.json", SPECIAL_TOKENS_MAP)


def _owned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors out of larger storages, which torch.save would otherwise write whole."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


# -- Without training ------------------------------------------------------------------------------------------------


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
    generator, hidden_size = torch.Generator().manual_seed(seed), int(llama_config["hidden_size"])
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    every = (
        _trunk_shapes((image_size // patch_size) ** 2, dim, depth, patch_size),
        {
            "0.weight": (hidden_size, dim),
            "0.bias": (hidden_size,),
            "2.weight": (hidden_size, hidden_size),
            "2.bias": (hidden_size,),
        },
        Shapes(**{name: llama_config[name] for name in names}).tensors(llama_config["num_hidden_layers"]),
    )
    trunk, projector, llama = ({name: _draw(name, shape, generator) for name, shape in part.items()} for part in every)
    return trunk, projector, llama


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name in ("norm.weight", "norm.bias"):  # of the tower: nobody applies it
        return torch.full(shape, float(name == "norm.weight"))
    is_norm = "norm" in name
    mean = 0.5 if name.endswith("gamma") else float(is_norm and name.endswith("weight"))
    std = 1.0 if "embed_tokens" in name else (2.0 if "lm_head" in name else 1.0) * prod(shape[1:]) ** -0.5
    if is_norm or name.endswith("gamma"):
        std = 0.1
    elif name == "pos_embed":
        std = 0.2
    elif name == "cls_token" or name.endswith("bias"):
        std = 0.02
    return mean + std * torch.randn(shape, generator=generator)


def _trunk_shapes(num_patches: int, dim: int, depth: int, patch_size: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + num_patches, dim),
        "patch_embed.proj.weight": (dim, 3, patch_size, patch_size),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    linears = {
        "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim),
    }  # fmt: skip
    for block in (f"blocks.{index}" for index in range(depth)):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (dim,), f"{block}.{norm}.bias": (dim,)}
        for linear, shape in linears.items():
            shapes |= {f"{block}.{linear}.weight": shape, f"{block}.{linear}.bias": shape[:1]}
        shapes |= {f"{block}.ls1.gamma": (dim,), f"{block}.ls2.gamma": (dim,)}
    return shapes
