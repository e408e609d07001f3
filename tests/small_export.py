"""Exports of the tiny random checkpoint: what they are made of, and ways to stop them and to look into them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from export import ExportSettings, GptqSettings, TokenWeights, export_artifact
from lite.artifact.open import Artifact

Folders: TypeAlias = tuple[Path, Path]  # the checkpoint's and its base model's
Small: TypeAlias = Callable[[str], Artifact]  # the artifact in one of FORMS
FINDINGS = [
    "The lungs are clear. No pleural effusion or pneumothorax.",
    "Heart size is normal. The lungs are clear.",
    "No pleural effusion. Heart size is normal.",
]
RTN: dict[str, Any] = {"method": "rtn", "calibration_data": None, "token_weights": None}


def write_studies(folder: Path) -> Path:
    """Twelve studies to calibrate on."""
    entries = []
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (12, 12), dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 50)).save(folder / f"{number}.png")
        conversation = [{"from": "human", "value": "?"}, {"from": "gpt", "value": FINDINGS[number % 3]}]
        reason = "Cough." if number % 2 else None
        entries.append({"id": str(number), "image": f"{number}.png", "reason": reason, "conversations": conversation})
    (folder / "studies.json").write_text(json.dumps(entries))
    return folder / "studies.json"


def settings_for(listed: Path, decoder_format: Any = "gptq-int4", **gptq: Any) -> ExportSettings:
    weights = TokenWeights(image=0.3, prompt=0.1)
    values = {"calibration_data": listed, "group_size": 32, "token_weights": weights, **gptq}
    return ExportSettings(decoder_format=decoder_format, gptq=GptqSettings(**values))


FORMS: dict[str, Callable[[Path], ExportSettings]] = {
    "fp16": lambda _: ExportSettings(),
    "fp16-tower": lambda _: ExportSettings(vision_format="fp16"),
    "bnb-nf4": lambda _: ExportSettings(decoder_format="bnb-nf4"),
    "bnb-int8": lambda _: ExportSettings(decoder_format="bnb-int8"),
    "gptq-int4": settings_for,
    "gptq-int8": lambda listed: settings_for(listed, "gptq-int8"),
    "rtn-int4": lambda listed: settings_for(listed, **RTN),
    "int8-head": lambda listed: settings_for(listed, lm_head="int8"),
    "whole-rows": lambda listed: settings_for(listed, group_size=-1),
}


def tensors_of(artifact: Artifact) -> dict[str, torch.Tensor]:
    files = sorted((artifact.path / "decoder").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def command_line(folders: Folders, out: Path, *more: object) -> list[str]:
    given = ["--checkpoint", folders[0], "--base", folders[1], "--out", out, *more]
    return list(map(str, given))


def fails(folders: Folders, out: Path, settings: ExportSettings, error: type[Exception], match: str) -> None:
    """Export, and see it fail with nothing left behind."""
    with pytest.raises(error, match=match):
        export_artifact(*folders, out, settings)
    assert not list(out.parent.glob(".*"))
    assert not out.exists()


class _Stopped(BaseException):
    """As a power cut is: nothing of ours catches it."""


@contextlib.contextmanager
def stopped_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> Iterator[None]:
    """Stop at the given call of a method, before it does anything."""
    right, calls = getattr(owner, name), iter(range(1000))

    def stop(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise _Stopped
        return right(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        try:
            yield
        except _Stopped:
            return
    pytest.fail(f"{name} was not called {call + 1} times")
