"""Adapters in an artifact's folder: what is no adapter of its decoder is refused before it is used."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import hospital
import pytest
import torch

import lite
from lite.artifact.manifest import Manifest
from lite.artifact.open import Artifact, load_artifact
from lite.artifact.parts import FileRecord
from lite.engines.adapters import Adapters
from lite.engines.torch_engine.load import load_decoder
from lite.errors import ArtifactError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {k: v.float() for k, v in f.items()}, "as F32 · expected float16"),
        (lambda f: {k: v for k, v in f.items() if "0.mlp.up_proj.lora_B" not in k}, r"up_proj with factors .* \[\]"),
        (lambda f: {k.replace("layers.0", "layers.7"): v for k, v in f.items()}, "expected a linear of the decoder"),
        (lambda f: {k: v[:, :3].contiguous() for k, v in f.items()}, r"expected \[rank, \d+\] and"),
        (lambda f: {f"{k}.more": v for k, v in f.items()}, "expected"),
        (
            lambda f: {k: v[:2].contiguous() if "A" in k else v[:, :2].contiguous() for k, v in f.items()},
            "got factors of rank 2 · expected rank 4, as the manifest says",
        ),
    ],
)
def test_a_file_of_other_factors_is_refused(
    tiny_gptq_artifact: Artifact, tmp_path: Path, change: Any, message: str
) -> None:
    factors = hospital.stored_factors(tiny_gptq_artifact.decoder_config())
    artifact = hospital.artifact_with_adapters(tiny_gptq_artifact, tmp_path / "a", north=factors)
    hospital.save_file(change(factors), artifact.path / "adapters/north/factors.safetensors")
    with pytest.raises(ArtifactError, match=message):
        Adapters(artifact, ["north"])
    (artifact.path / "adapters/north/factors.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="something unreadable"):
        Adapters(artifact, ["north"])


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_factors_that_are_no_numbers_are_refused_when_they_are_loaded(
    tiny_gptq_artifact: Artifact, tmp_path: Path, factor: str, value: float
) -> None:
    factors = hospital.stored_factors(tiny_gptq_artifact.decoder_config())
    factors[f"model.layers.1.mlp.up_proj.{factor}"][0, 0] = value
    artifact = hospital.artifact_with_adapters(tiny_gptq_artifact, tmp_path / "a", north=factors)
    with pytest.raises(ArtifactError, match=r"got NaN or infinity in the factors of model.layers.1.mlp.up_proj"):
        load_decoder(artifact, device="cpu", adapters=["north"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "got an adapter north of rank 0"),
        ({"rank": 10**400}, "got an adapter north of rank 1000"),
        ({"projector": None}, "projector.onnx · expected a rank, its factors and perhaps its projector"),
        ({"is_default": True}, "got the adapters south and north for requests that name none · expected one at most"),
    ],
)
def test_an_adapter_that_the_manifest_contradicts_is_refused(
    tiny_gptq_artifact: Artifact, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    factors = hospital.stored_factors(tiny_gptq_artifact.decoder_config())
    adapted = hospital.artifact_with_adapters(tiny_gptq_artifact, tmp_path / "a", north=factors, south=factors)
    parts, file = adapted.manifest.parts, "adapters/north/projector.onnx"
    south = dataclasses.replace(parts.adapters["south"], is_default=True)
    files = parts.adapters["north"].files | {file: FileRecord(bytes=1, sha256="0" * 64)}
    north = dataclasses.replace(parts.adapters["north"], files=files, projector=file)
    whole = adapted.manifest.with_parts(adapters={"south": south, "north": north})
    assert Manifest.parse(whole.to_json()) == whole
    broken = whole.with_parts(adapters={"south": south, "north": dataclasses.replace(north, **changes)})
    with pytest.raises(ArtifactError, match=message):
        Manifest.parse(broken.to_json())


def test_a_changed_adapter_is_found_before_it_is_used(tiny_gptq_artifact: Artifact, tmp_path: Path) -> None:
    factors = hospital.stored_factors(tiny_gptq_artifact.decoder_config())
    artifact = hospital.artifact_with_adapters(tiny_gptq_artifact, tmp_path / "a", north=factors)
    file = artifact.path / "adapters/north/factors.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with lite.load(artifact.path, engine="torch", device="cpu"):  # it is not read where it is not asked for
        pass
    with pytest.raises(ArtifactError, match="factors.safetensors: got sha256"):
        lite.load(artifact.path, engine="torch", device="cpu", adapters=["north"])
    with pytest.raises(ArtifactError, match="factors.safetensors: got sha256"):
        load_artifact(artifact.path).verify()
