"""Reading the published layout: everything used or named, nothing run."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import random_checkpoint
import torch
from random_checkpoint import edit_json, edit_tensors
from small_export import Folders

from export.__main__ import main
from export.source.checkpoint import open_checkpoint
from export.source.shapes import base_shapes
from export.source.tower import trunk_shapes
from lite.config import OPENAI_CLIP_MEAN
from lite.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from export.source.checkpoint import Checkpoint

    Change = Callable[[dict[str, Any]], dict[str, Any]]

TENSORS = [
    ("llava-rad-phantom/adapter_model.bin", "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"),
    ("llava-rad-phantom/non_lora_trainables.bin", "base_model.model.model.mm_projector.2.weight"),
    ("llava-rad-phantom/biomedclipcxr_42_checkpoint.pt", "module.visual.trunk.blocks.1.ls2.gamma"),
    ("base/pytorch_model-00001-of-00002.bin", "model.layers.0.self_attn.q_proj.weight"),
]


def test_reads_shapes_settings_and_files(source: Checkpoint) -> None:
    assert source.name == "llava-rad-phantom"
    assert (source.tower.depth, source.tower.num_blocks, source.tower.num_heads) == (3, 2, 2)
    assert (source.tower.image_size, source.tower.num_patches) == (42, 9)
    assert source.preprocessing.mean == OPENAI_CLIP_MEAN
    assert (source.adapter.config.scale("model.layers.0.mlp.up_proj"), source.decoding.eos_token_id) == (2.0, 2)
    assert set(source.files) == {
        "checkpoint/NOTICE",
        "checkpoint/config.json",
        "checkpoint/adapter_config.json",
        "checkpoint/adapter_model.bin",
        "checkpoint/non_lora_trainables.bin",
        "checkpoint/biomedclipcxr_42.json",
        "checkpoint/biomedclipcxr_42_checkpoint.pt",
        "base/config.json",
        "base/tokenizer.model",
        "base/pytorch_model-00001-of-00002.bin",
        "base/pytorch_model-00002-of-00002.bin",
    }


def test_a_snapshot_in_the_cache_gives_the_name_of_its_repository(folders: Folders, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--microsoft--llava-rad/snapshots/0123abcd"
    shutil.copytree(folders[0], snapshot)
    assert open_checkpoint(snapshot, folders[1]).name == "microsoft/llava-rad"


def test_reads_the_weights_that_are_there(source: Checkpoint) -> None:
    trunk, projector, llama = random_checkpoint.weights()
    tower = source.read_tower()
    assert not [name for name in tower if name.startswith(("blocks.2.", "norm."))]
    assert torch.equal(tower["blocks.1.attn.qkv.weight"], trunk["blocks.1.attn.qkv.weight"])
    assert torch.equal(tower["projector.2.bias"], projector["2.bias"].half())
    assert torch.equal(source.read_base("lm_head.weight"), llama["lm_head.weight"].half())
    layer = source.read_layer(1)
    assert set(layer.lora) == {name.removesuffix(".weight") for name in layer.weights if "_proj" in name}
    assert layer.weights["mlp.down_proj.weight"].shape == (128, 256)


def test_real_shapes_are_the_published_ones(source: Checkpoint) -> None:
    """The checkpoint's page counts 174 trunk tensors; without block 11 and the norm 158 of them are read."""
    tower = dataclasses.replace(
        source.tower, image_size=518, dim=768, depth=12, num_blocks=12, mlp_dim=3072, patch_size=14
    )
    shapes = trunk_shapes(tower)
    assert len(shapes) + len(("norm.weight", "norm.bias")) == 174
    assert shapes["pos_embed"] == (1, 1370, 768)
    assert tower.num_heads == 12
    parameters = sum(int(np.prod(shape)) for shape in shapes.values()) + 2 * 768
    assert parameters == pytest.approx(86.58e6, rel=1e-4)
    decoder = dataclasses.replace(
        source.decoder,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        vocab_size=32000,
    )
    assert 2 * sum(int(np.prod(shape)) for shape in base_shapes(decoder).values()) == pytest.approx(13.48e9, rel=1e-3)


def _in_messages(name: str) -> str:
    return name.removeprefix("module.visual.trunk.").replace(".", r"\.")


@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen", "integers"])
@pytest.mark.parametrize(("file", "name"), TENSORS)
def test_a_tensor_that_is_not_as_promised_is_named(own: Folders, file: str, name: str, fault: str) -> None:
    extra = name.replace("weight", "wait").replace("gamma", "delta")
    changes: dict[str, tuple[Change, str]] = {
        "missing": (lambda state: {key: state[key] for key in state if key != name}, _in_messages(name)),
        "extra": (lambda state: state | {extra: torch.zeros(2)}, f"{_in_messages(extra)}.*does not know"),
        "misshapen": (lambda state: state | {name: torch.zeros(3, 5)}, r"\[3, 5\] · expected \["),
        "integers": (lambda state: state | {name: state[name].to(torch.int8)}, "as int8 · expected floating point"),
    }
    change, match = changes[fault]
    edit_tensors(own[0].parent / file, change)
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(*own)


@pytest.mark.parametrize(("file", "name"), TENSORS)
def test_a_tensor_that_is_not_finite_is_named_when_read(own: Folders, file: str, name: str) -> None:
    def poison(state: dict[str, Any]) -> dict[str, Any]:
        tensor = state[name].clone()
        tensor.view(-1)[3] = float("nan")
        return state | {name: tensor}

    edit_tensors(own[0].parent / file, poison)
    source = open_checkpoint(*own)
    reads = [lambda: source.read_layer(0), lambda: source.read_layer(1), source.read_tower]
    with pytest.raises(CheckpointError, match=f"NaN or infinity in '{_in_messages(name)}'"):
        [read() for read in reads]


def test_known_leftovers_are_ignored(own: Folders) -> None:
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}
    edit_tensors(own[1] / "pytorch_model-00001-of-00002.bin", lambda state: state | inv_freq)
    open_checkpoint(*own)


def test_folders_given_the_wrong_way_round_are_explained(own: Folders) -> None:
    with pytest.raises(CheckpointError, match="look swapped"):
        open_checkpoint(own[1], own[0])


def test_wrong_folders_are_explained(own: Folders, tmp_path: Path) -> None:
    checkpoint, base = own
    with pytest.raises(CheckpointError, match="--base .*does not exist"):
        open_checkpoint(checkpoint, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="--checkpoint .*got a file"):
        open_checkpoint(checkpoint / "config.json", base)
    (tmp_path / "hub/snapshots").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="Hugging Face cache entry.*snapshots"):
        open_checkpoint(checkpoint, tmp_path / "hub")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="config.json: got no such file"):
        open_checkpoint(checkpoint, tmp_path / "empty")


@pytest.mark.parametrize(
    ("folder", "change", "named"),
    [
        (0, {"mm_projector_type": "linear"}, "mm_projector_type"),
        (0, {"mm_vision_select_layer": -1}, "mm_vision_select_layer"),
        (0, {"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        (0, {"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        (0, {"mm_use_im_patch_token": True}, "mm_use_im_patch_token"),
        (0, {"image_aspect_ratio": "pad"}, "image_aspect_ratio"),
        (0, {"model_type": "llama"}, "model_type"),
        (0, {"quantization_config": {"bits": 4}}, "quantization_config.*stale"),
        (0, {"vocab_size": 32000}, "vocab_size.*adapter was trained on"),
        (0, {"rope_theta": 500000.0}, "rope_theta"),
        (0, {"max_position_embeddings": 2048}, "max_position_embeddings"),
        (0, {"mm_hidden_size": 768}, "mm_hidden_size"),
        (0, {"mm_vision_tower_checkpoint": "../tower.pt"}, "plain name"),
        (0, {"mm_vision_tower_checkpoint": "gone.pt"}, "gone.pt: got no such file"),
        (1, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (1, {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (1, {"model_type": "llava"}, "language model it was trained from, llava-rad-phantom/base"),
        (1, {"num_hidden_layers": 3}, "num_hidden_layers=3 · expected 2"),
        (1, {"hidden_size": None}, "hidden_size"),
    ],
)
def test_other_models_are_refused_by_the_setting_that_differs(
    own: Folders, folder: int, change: dict[str, Any], named: str
) -> None:
    edit_json(own[folder] / "config.json", **change)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(*own)


def test_a_base_under_another_name_is_taken_only_where_that_is_said(own: Folders, tmp_path: Path) -> None:
    checkpoint, base = own
    edit_json(base / "config.json", _name_or_path="lmsys/vicuna-7b-v1.3")
    edit_json(checkpoint / "adapter_config.json", base_model_name_or_path="lmsys/vicuna-7b-v1.5")
    with pytest.raises(CheckpointError, match=r"itself vicuna-7b-v1\.3 · expected lmsys/vicuna-7b-v1\.5.*--other-base"):
        open_checkpoint(checkpoint, base)
    assert open_checkpoint(checkpoint, base, other_base=True).name == "llava-rad-phantom"
    # A folder's name will do, and a base that does not say what it is cannot be told from another.
    named = tmp_path / "Vicuna-7B-v1.5"
    named.symlink_to(base)
    with pytest.raises(CheckpointError, match="itself"):
        open_checkpoint(checkpoint, named)
    named.unlink()
    shutil.copytree(base, named)
    open_checkpoint(checkpoint, named)
    edit_json(base / "config.json", _name_or_path="")
    open_checkpoint(checkpoint, base)


def test_the_named_tower_json_comes_first_and_no_choice_is_made_between_two(own: Folders) -> None:
    checkpoint, _ = own
    tower = checkpoint / "biomedclipcxr_42.json"
    other = checkpoint / "another.json"
    shutil.copyfile(tower, other)
    with pytest.raises(CheckpointError, match=r"2 other json files.*another\.json"):
        open_checkpoint(*own)
    edit_json(checkpoint / "config.json", mm_vision_tower_config="another.json")
    assert "checkpoint/another.json" in open_checkpoint(*own).files
    tower.unlink()
    other.unlink()
    with pytest.raises(CheckpointError, match="0 other json files"):
        open_checkpoint(*own)


@pytest.mark.parametrize(
    ("vision", "match"),
    [
        ({"timm_model_name": "vit_base_patch14_reg4_dinov2", "image_size": 42}, "expected a DINOv2 ViT"),
        ({"image_size": 42}, "expected a DINOv2 ViT"),
        ({}, "expected a DINOv2 ViT"),
        (5, "expected a DINOv2 ViT"),
        (
            {"timm_model_name": "vit_base_patch14_dinov2.lvd142m", "image_size": 56},
            r"pos_embed.*expected \[1, 17, 128\]",
        ),
    ],
)
def test_other_towers_are_refused(own: Folders, vision: object, match: str) -> None:
    edit_json(own[0] / "biomedclipcxr_42.json", vision_cfg=vision)
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(*own)


def test_stated_preprocessing_is_taken(own: Folders) -> None:
    edit_json(own[0] / "biomedclipcxr_42.json", preprocess_cfg={"mean": [0.1, 0.2, 0.3]})
    assert open_checkpoint(*own).preprocessing.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ({"interpolation": "bilinear"}, "preprocess_cfg=.* · expected bicubic"),
        ([0.5], r"preprocess_cfg=\[0.5\] · expected an object"),
        (0, "preprocess_cfg=0 · expected an object"),
        ({"mean": 0.5}, "mean=0.5 · expected three finite numbers"),
        ({"mean": []}, r"mean=\[\] · expected three finite numbers"),
        ({"mean": [0.1, 0.2]}, "mean=.* · expected three finite numbers"),
        ({"mean": [0.1, 0.2, float("nan")]}, "mean=.*nan.* · expected three finite numbers"),
        ({"mean": [0.1, 0.2, 10**400]}, "mean=.* · expected three finite numbers"),
        ({"std": [0.1, "0.2", 0.3]}, "std=.* · expected three finite numbers"),
        ({"std": [0.1, float("inf"), 0.3]}, "std=.*inf.* · expected three finite numbers"),
        ({"std": [0.1, 0.2, True]}, "std=.*True.* · expected three finite numbers"),
        ({"std": [0.1, 0.2, 0]}, "std=.* · expected positive numbers"),
        ({"std": [0.1, -0.2, 0.3]}, "std=.* · expected positive numbers"),
    ],
)
def test_preprocessing_that_cannot_be_computed_is_refused(own: Folders, stated: object, named: str) -> None:
    edit_json(own[0] / "biomedclipcxr_42.json", preprocess_cfg=stated)
    with pytest.raises(CheckpointError, match=rf"biomedclipcxr_42\.json: got {named}"):
        open_checkpoint(*own)


def test_a_tokenizer_of_another_vocabulary_is_refused(own: Folders) -> None:
    tokenizer = own[1] / "tokenizer.model"
    tokenizer.write_bytes(b"not a tokenizer")
    with pytest.raises(CheckpointError, match="expected a SentencePiece model · fetch it again"):
        open_checkpoint(*own)
    tokenizer.unlink()
    with pytest.raises(CheckpointError, match="tokenizer.model: got something unreadable .*No such file"):
        open_checkpoint(*own)


@pytest.mark.parametrize("content", [b"", b"x" * 1001, b"\xff\xfe"])
def test_a_notice_that_is_no_short_text_is_refused(own: Folders, content: bytes) -> None:
    (own[0] / "NOTICE").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"NOTICE: got .* remove it"):
        open_checkpoint(*own)


def test_a_checkpoint_is_looked_at_without_an_export(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    sources = ["check", "--checkpoint", str(folders[0]), "--base", str(folders[1])]
    assert main(sources) == 0
    assert (
        capsys.readouterr().out
        == "llava-rad-phantom on llava-rad-phantom/base: whole, 2 decoder layers, 9 image tokens\n"
    )
    assert main([*sources[:-1], str(folders[0])]) == 1
    assert "expected 'llama'" in capsys.readouterr().err
