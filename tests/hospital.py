"""A hospital's LoRA, random: as a PEFT folder in the forms that are met, for any checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from export.source.shapes import linear_shapes
from lite.artifact.open import Artifact
from lite.artifact.parts import PUBLISHED, AdapterPart, unhashed
from lite.artifact.write import staged_artifact
from lite.config import DecoderConfig
from lite.files import link_or_copy

PREFIX = "base_model.model."
PROJECTOR = "base_model.model.model.mm_projector."


def random_factors(
    decoder: DecoderConfig, *, rank: int = 4, seed: int = 1, size: float = 0.3, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Draw A and B of every linear, under PEFT's names: what they add is about `size` of what a linear gives."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, (rows, columns) in linear_shapes(decoder).items():
        a = torch.randn(rank, columns, generator=generator) * columns**-0.5
        b = torch.randn(rows, rank, generator=generator) * size * rank**-0.5
        factors[f"{PREFIX}{module}.lora_A.weight"] = a.to(dtype)
        factors[f"{PREFIX}{module}.lora_B.weight"] = b.to(dtype)
    return factors


def write_folder(
    folder: Path,
    factors: dict[str, Tensor],
    *,
    base: str = "llava-rad-phantom/base",
    projector: dict[str, Tensor] | None = None,
    form: str = "safetensors",
    **changes: Any,
) -> Path:
    """Write a PEFT folder; `changes` are of its configuration."""
    folder.mkdir(parents=True)
    rank = next(len(factor) for name, factor in factors.items() if "lora_A" in name)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    if form == "safetensors":
        save_file(factors, folder / "adapter_model.safetensors")
    else:
        torch.save(factors, folder / "adapter_model.bin")
    if projector is not None:
        torch.save(projector, folder / "non_lora_trainables.bin")
    return folder


def artifact_with_adapters(artifact: Artifact, out: Path, **adapters: dict[str, Tensor]) -> Artifact:
    """Write a copy of an artifact with adapters, of factors such as `stored_factors` draws."""
    with staged_artifact(out) as staged:
        for name in artifact.manifest.files:
            link_or_copy(artifact.path / name, staged.path / name)
        parts = {}
        for name, factors in adapters.items():
            file = f"adapters/{name}/factors.safetensors"
            (staged.path / file).parent.mkdir(parents=True)
            save_file(factors, staged.path / file)
            rank = max(factor.shape[0] for key, factor in factors.items() if key.endswith("lora_A"))
            own = {"files": unhashed(file), "is_default": name == PUBLISHED}
            parts[name] = AdapterPart(factors=file, on="base", rank=rank, **own)
        return staged.finish(artifact.manifest.with_parts(adapters=parts))


def stored_factors(
    decoder: DecoderConfig, *, rank: int = 4, seed: int = 1, size: float = 0.5, only: str = ""
) -> dict[str, Tensor]:
    """Draw factors as an artifact has them, of the linears whose names hold `only`."""
    drawn = random_factors(decoder, rank=rank, seed=seed, size=size, dtype=torch.float16)
    names = {name: name.removeprefix(PREFIX).removesuffix(".weight") for name in drawn}
    return {short: drawn[name] for name, short in names.items() if only in name}
