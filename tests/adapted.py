"""A hospital's adapters, and the tiny random checkpoint's artifact that has two of them: the fixture is in conftest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import random_checkpoint
import torch
from exported import made_once
from small_export import RTN, settings_for

from export import add_adapter, export_artifact
from export.settings import AdapterSettings
from lite.artifact.open import Artifact
from lite.config import to_json

NAMES = ("a", "b")
"""The second one has a projector of its own."""
SHORT = {"max_new_tokens": 40}
QUICK: dict[str, Any] = {"verify_studies": 2, "verify_tokens": 16, "device": "cpu", "show_progress": False}


def write_adapter(out: Path, published: Path, *, seed: int, projector: bool = False) -> Path:
    """Write a LoRA as PEFT does: the published one, far enough from it that texts are others."""
    generator = torch.Generator().manual_seed(seed)
    out.mkdir(parents=True)
    for name in ("adapter_model.bin", *(["non_lora_trainables.bin"] if projector else [])):
        tensors = random_checkpoint.load(published / name)
        moved = {
            key: tensor + 0.5 * tensor.float().std() * torch.randn(tensor.shape, generator=generator)
            for key, tensor in tensors.items()
        }
        torch.save({key: tensor.to(tensors[key].dtype) for key, tensor in moved.items()}, out / name)
    shutil.copy(published / "adapter_config.json", out)
    return out


def export_adapted(out: Path) -> Artifact:
    """Export the tiny random checkpoint in 4 bits, and add adapters to it."""
    checkpoint = made_once("small-checkpoint", random_checkpoint.write)
    published, base = checkpoint / "llava-rad-phantom", checkpoint / "base"
    artifact = export_artifact(published, base, out, settings_for(Path(), **RTN))
    # Random texts have no end: as short as that, they are drafted and measured soon.
    random_checkpoint.edit_json(out / "manifest.json", decoding=to_json(artifact.manifest.decoding) | SHORT)
    for seed, name in enumerate(NAMES):
        folder = write_adapter(out.parent / name, published, seed=seed, projector=name == NAMES[1])
        settings = AdapterSettings(on="base", keep_anyway=True, **QUICK)
        artifact = add_adapter(folder, out, name, base=base, published=published, settings=settings)
    return artifact
