"""`adapters/NAME/`: the factors of a LoRA beside the decoder's linears, and the projector that was trained with it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save

from export.quantize.low_rank import correction, read_stored, stored_as
from export.write.vision_onnx import build_vision_onnx, write_vision_onnx
from lite.artifact.parts import PUBLISHED, AdapterPart, unhashed
from lite.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from export.logits import InputSizes
    from export.settings import TrainedOn
    from export.source.adapter import AdapterSource, HasPairs
    from export.source.checkpoint import Checkpoint
    from lite.artifact.open import Artifact


def new_part(name: str, on: TrainedOn) -> AdapterPart:
    """Return what an adapter is before its factors are written."""
    factors = f"adapters/{name}/factors.safetensors"
    return AdapterPart(files=unhashed(factors), factors=factors, on=on, rank=1)


def write_factors(
    artifact: Artifact,
    part: AdapterPart,
    stored: Checkpoint,
    delta: HasPairs,
    *,
    correction_rank: int = 0,
    inputs: InputSizes | None = None,
) -> AdapterPart:
    """Write the factors of all layers.

    Args:
        artifact: With the decoder, in the folder where they are to be.
        part: From `new_part`.
        stored: What that decoder was made of.
        delta: What is to be added to it.
        correction_rank: So many directions more make up for the decoder's rounding.
        inputs: What the linears read, for the correction.

    Returns:
        The part, with its rank.
    """
    tensors: dict[str, Tensor] = {}
    largest = 0
    for index in range(artifact.decoder_config().num_hidden_layers):
        source, pairs = stored.read_layer(index).merged(), delta.pairs(index)
        layer = read_stored(artifact, index, source)
        for linear, weight in layer.weights.items():
            name = f"model.layers.{index}.{linear}"
            factors = [layer.factors(linear, pairs[linear])] if linear in pairs else []
            if inputs is not None and correction_rank:
                wanted = layer.scaled(linear, source[f"{linear}.weight"])
                factors.append(correction(wanted, weight, inputs.of(name), correction_rank))
            if factors:
                a, b = torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], dim=1)
                tensors |= stored_as(name, a, b)
                largest = max(largest, len(a))
    (artifact.path / part.factors).parent.mkdir(parents=True, exist_ok=True)
    write_whole(artifact.path / part.factors, save(tensors))
    return dataclasses.replace(part, rank=largest, correction=correction_rank)


def write_projector(
    artifact: Artifact, part: AdapterPart, name: str, published: Checkpoint, adapter: AdapterSource
) -> AdapterPart:
    """Write an adapter's own projector, in the format of the tower; nothing where it is the published one."""
    own, theirs = adapter.read_projector(), published.projector.read(published.projector.entries)
    if not own or all(torch.equal(own[key], tensor) for key, tensor in _short(theirs).items()):
        return part
    tensors = published.read_tower() | own
    vision_format = artifact.manifest.parts.vision.format
    _, model = build_vision_onnx(tensors, published.tower, vision_format=vision_format, model_name=name)
    file = f"adapters/{name}/projector.onnx"
    (artifact.path / file).parent.mkdir(parents=True, exist_ok=True)
    write_vision_onnx(model, artifact.path / file)
    return dataclasses.replace(part, files=part.files | unhashed(file), projector=file)


def _short(projector: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"projector.{name.rpartition('mm_projector.')[2]}": tensor for name, tensor in projector.items()}


def write_published(artifact: Artifact, source: Checkpoint) -> Artifact:
    """Write the checkpoint's own LoRA beside a decoder that is the base alone; return the artifact with it."""
    part = write_factors(artifact, new_part(PUBLISHED, "base"), source.apart(), source.adapter)
    return artifact.with_parts(adapters={PUBLISHED: dataclasses.replace(part, is_default=True)})
