"""The vision tower, as exported and as the yardstick computes it, against transformers' own DINOv2."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import random_checkpoint
import torch
from safetensors.torch import save_file
from small_export import Small
from torch.utils._python_dispatch import TorchDispatchMode

from export.source import forward
from lite.vision import VisionEncoder

if TYPE_CHECKING:
    from export.source.checkpoint import Checkpoint
    from lite.artifact.open import Artifact


def _pixel_values(batch: int = 2) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((batch, 3, 42, 42), dtype=np.float32)


def _transformers_tower(trunk: dict[str, torch.Tensor], folder: Path) -> Any:
    """Put the trunk's weights into transformers' DINOv2, which knows nothing of ours.

    Through a folder with the names of published DINOv2 checkpoints: the ones inside change between versions.
    """
    from transformers import Dinov2Config, Dinov2Model

    dim, depth = random_checkpoint.DIM, random_checkpoint.DEPTH
    names = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    names |= {"attn.proj": "attention.output.dense"}
    state = {
        "embeddings.cls_token": trunk["cls_token"],
        "embeddings.mask_token": torch.zeros(1, dim),
        "embeddings.position_embeddings": trunk["pos_embed"],
    }
    for kind in ("weight", "bias"):
        state[f"embeddings.patch_embeddings.projection.{kind}"] = trunk[f"patch_embed.proj.{kind}"]
        state[f"layernorm.{kind}"] = trunk[f"norm.{kind}"]
        for block in range(depth):
            ours, theirs = f"blocks.{block}.", f"encoder.layer.{block}."
            for name, other in names.items():
                state[f"{theirs}{other}.{kind}"] = trunk[f"{ours}{name}.{kind}"]
            parts = trunk[f"{ours}attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                state[f"{theirs}attention.attention.{name}.{kind}"] = part
            for scale in "12":
                state[f"{theirs}layer_scale{scale}.lambda1"] = trunk[f"{ours}ls{scale}.gamma"]
    Dinov2Config(
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=dim // 64,
        mlp_ratio=4,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        image_size=42,
        patch_size=14,
        qkv_bias=True,
    ).save_pretrained(folder)
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    model, report = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def expected_features(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray[Any, Any]:
    """The features by transformers' tower, hidden state -2, CLS dropped, and the projector by hand."""
    trunk, projector, _ = random_checkpoint.weights()
    with torch.inference_mode():
        tower = _transformers_tower(trunk, tmp_path_factory.mktemp("dinov2"))
        hidden_states = tower(torch.from_numpy(_pixel_values()), output_hidden_states=True).hidden_states
        x = hidden_states[-2][:, 1:] @ projector["0.weight"].half().float().T + projector["0.bias"].half().float()
        x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
        return (x @ projector["2.weight"].half().float().T + projector["2.bias"].half().float()).numpy()


def test_onnx_tower_is_transformers_dinov2(artifact: Artifact, expected_features: np.ndarray[Any, Any]) -> None:
    features = VisionEncoder(artifact)(_pixel_values())
    assert features.shape == (2, 9, 128)
    np.testing.assert_allclose(features, expected_features, atol=2e-5)


def test_plain_tower_is_transformers_dinov2(source: Checkpoint, expected_features: np.ndarray[Any, Any]) -> None:
    features = forward.image_features(source.read_tower(), source.tower, torch.from_numpy(_pixel_values()))
    np.testing.assert_allclose(features.numpy(), expected_features, atol=2e-5)


def test_fp16_tower_is_close_and_takes_float32(small: Small, expected_features: np.ndarray[Any, Any]) -> None:
    artifact = small("fp16-tower")
    features = VisionEncoder(artifact)(_pixel_values())
    assert features.dtype == np.float32
    assert 1e-6 < np.abs(features - expected_features).max() < 0.02
    assert artifact.manifest.parts.vision.format == "fp16"


def test_batch_is_free_and_rows_do_not_mix(artifact: Artifact) -> None:
    encoder, pixel_values = VisionEncoder(artifact), _pixel_values(3)
    together = encoder(pixel_values)
    for row in range(3):
        np.testing.assert_allclose(encoder(pixel_values[row : row + 1])[0], together[row], atol=1e-5)


def test_onnx_holds_only_what_is_run(small: Small) -> None:
    for form, dtype in (("fp16", onnx.TensorProto.FLOAT), ("fp16-tower", onnx.TensorProto.FLOAT16)):
        model = onnx.load(small(form).file("vision.onnx"))
        names = {tensor.name for tensor in model.graph.initializer}
        assert not [name for name in names if name.startswith(("blocks.2.", "norm."))]
        assert "blocks.1.attn.qkv.weight" in names
        assert {tensor.data_type for tensor in model.graph.initializer if tensor.dims != []} <= {
            dtype,
            onnx.TensorProto.INT64,
        }
        assert {opset.domain for opset in model.opset_import} == {""}


def test_the_yardstick_has_no_convolution(source: Checkpoint) -> None:
    """Where cuDNN computes one, it does so in TF32 unless told otherwise."""
    operators: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operators.append(str(func))
            return func(*args, **(kwargs or {}))

    with Record():
        forward.image_features(source.read_tower(), source.tower, torch.from_numpy(_pixel_values(1)))
    assert [name for name in operators if "mm" in name]
    assert not [name for name in operators if "conv" in name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_yardstick_is_float32_on_a_gpu(source: Checkpoint) -> None:
    tensors, pixel_values = source.read_tower(), torch.from_numpy(_pixel_values())
    expected = forward.image_features(tensors, source.tower, pixel_values)
    on_gpu = {name: tensor.cuda() for name, tensor in tensors.items()}
    got = forward.image_features(on_gpu, source.tower, pixel_values.cuda())
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=2e-5)
