"""The tiny random checkpoint's artifact with two hospitals' adapters: the fixture is in conftest."""

from __future__ import annotations

from pathlib import Path

import hospital
import random_checkpoint
from exported import made_once
from small_export import RTN, settings_for

from export import AdapterSettings, add_adapter, export_artifact
from export.source.checkpoint import open_checkpoint
from lite.artifact.open import Artifact
from lite.config import to_json

NAMES = ("a", "b")
"""The second one has a projector of its own."""
QUICK = AdapterSettings(on="base", keep_anyway=True, verify_studies=2, verify_tokens=16, device="cpu")


def export_adapted(out: Path) -> Artifact:
    """Export it in 4 bits, and add the adapters."""
    checkpoint = made_once("small-checkpoint", random_checkpoint.write)
    published, base = checkpoint / "llava-rad-phantom", checkpoint / "base"
    artifact = export_artifact(published, base, out, settings_for(Path(), **RTN))
    # Random texts have no end: as short as that, they are drafted and measured soon.
    short = to_json(artifact.manifest.decoding) | {"max_new_tokens": 40}
    random_checkpoint.edit_json(out / "manifest.json", decoding=short)
    decoder = open_checkpoint(published, base).decoder
    projector = random_checkpoint.load(published / "non_lora_trainables.bin")
    for seed, name in enumerate(NAMES):
        own = {key: 1.25 * tensor for key, tensor in projector.items()} if name == NAMES[1] else None
        factors = hospital.random_factors(decoder, seed=seed)
        folder = hospital.write_folder(out.parent / name, factors, projector=own)
        artifact = add_adapter(folder, out, name, base=base, published=published, settings=QUICK)
    return artifact
