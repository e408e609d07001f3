"""Reading the published layout: everything used or named, nothing run."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import random_checkpoint
import torch
from random_checkpoint import edit_json
from safetensors.torch import save_file

from export.source.checkpoint import open_checkpoint
from export.source.shapes import base_shapes
from export.source.tensors import load_pickle, open_tensors
from export.source.tower import trunk_shapes
from lite.config import OPENAI_CLIP_MEAN
from lite.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("original")
    random_checkpoint.write(out)
    return out


@pytest.fixture
def folders(original: Path, tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(original, tmp_path / "copy")
    return tmp_path / "copy/llava-rad-phantom", tmp_path / "copy/base"


def _edit_tensors(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = random_checkpoint.load(file)
    change(content.get("state_dict", content))
    torch.save(content, file)


def test_reads_shapes_settings_and_files(original: Path) -> None:
    source = open_checkpoint(original / "llava-rad-phantom", original / "base")
    assert source.name == "llava-rad-phantom"
    assert (source.tower.depth, source.tower.num_blocks, source.tower.num_heads) == (3, 2, 2)
    assert (source.tower.image_size, source.tower.num_patches) == (42, 9)
    assert source.preprocessing.mean == OPENAI_CLIP_MEAN
    assert (source.adapter_config.scale, source.decoding.eos_token_id) == (2.0, 2)
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


def test_a_snapshot_in_the_cache_gives_the_name_of_its_repository(original: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--microsoft--llava-rad/snapshots/0123abcd"
    shutil.copytree(original / "llava-rad-phantom", snapshot)
    assert open_checkpoint(snapshot, original / "base").name == "microsoft/llava-rad"


def test_reads_the_weights_that_are_there(original: Path) -> None:
    source = open_checkpoint(original / "llava-rad-phantom", original / "base")
    trunk, projector, llama = random_checkpoint.weights()
    tower = source.read_tower()
    assert not [name for name in tower if name.startswith(("blocks.2.", "norm."))]
    assert torch.equal(tower["blocks.1.attn.qkv.weight"], trunk["blocks.1.attn.qkv.weight"])
    assert torch.equal(tower["projector.2.bias"], projector["2.bias"].half())
    assert torch.equal(source.read_base("lm_head.weight"), llama["lm_head.weight"].half())
    layer = source.read_layer(1)
    assert set(layer.lora) == {name.removesuffix(".weight") for name in layer.weights if "_proj" in name}
    assert layer.weights["mlp.down_proj.weight"].shape == (128, 256)


def test_real_shapes_are_the_published_ones(original: Path) -> None:
    """The checkpoint's page counts 174 trunk tensors; without block 11 and the norm 158 of them are read."""
    source = open_checkpoint(original / "llava-rad-phantom", original / "base")
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


TENSORS = [
    ("llava-rad-phantom/adapter_model.bin", "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"),
    ("llava-rad-phantom/non_lora_trainables.bin", "base_model.model.model.mm_projector.2.weight"),
    ("llava-rad-phantom/biomedclipcxr_42_checkpoint.pt", "module.visual.trunk.blocks.1.ls2.gamma"),
    ("base/pytorch_model-00001-of-00002.bin", "model.layers.0.self_attn.q_proj.weight"),
]


@pytest.mark.parametrize(("file", "name"), TENSORS)
def test_a_missing_tensor_is_named(folders: tuple[Path, Path], file: str, name: str) -> None:
    _edit_tensors(folders[0].parent / file, lambda state: state.pop(name))
    with pytest.raises(CheckpointError, match=name.removeprefix("module.visual.trunk.").replace(".", r"\.")):
        open_checkpoint(*folders)


@pytest.mark.parametrize(("file", "name"), TENSORS)
def test_an_extra_tensor_is_named(folders: tuple[Path, Path], file: str, name: str) -> None:
    extra = name.replace("weight", "wait").replace("gamma", "delta")
    _edit_tensors(folders[0].parent / file, lambda state: state.update({extra: torch.zeros(2)}))
    named = extra.removeprefix("module.visual.trunk.").replace(".", r"\.")
    with pytest.raises(CheckpointError, match=f"{named}.*does not know"):
        open_checkpoint(*folders)


@pytest.mark.parametrize(("file", "name"), TENSORS)
def test_a_misshapen_tensor_is_named(folders: tuple[Path, Path], file: str, name: str) -> None:
    _edit_tensors(folders[0].parent / file, lambda state: state.update({name: torch.zeros(3, 5)}))
    with pytest.raises(CheckpointError, match=r"\[3, 5\] · expected \["):
        open_checkpoint(*folders)


@pytest.mark.parametrize(("file", "name"), TENSORS)
def test_a_tensor_of_integers_is_named(folders: tuple[Path, Path], file: str, name: str) -> None:
    _edit_tensors(folders[0].parent / file, lambda state: state.update({name: state[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match="as int8 · expected floating point"):
        open_checkpoint(*folders)


@pytest.mark.parametrize(("file", "name"), TENSORS)
def test_a_tensor_that_is_not_finite_is_named_when_read(folders: tuple[Path, Path], file: str, name: str) -> None:
    def poison(state: dict[str, Any]) -> None:
        state[name] = state[name].clone()
        state[name].view(-1)[3] = float("nan")

    _edit_tensors(folders[0].parent / file, poison)
    source = open_checkpoint(*folders)

    def read_everything() -> None:
        for layer in range(random_checkpoint.LAYERS):
            source.read_layer(layer)
        source.read_tower()

    named = name.removeprefix("module.visual.trunk.").replace(".", r"\.")
    with pytest.raises(CheckpointError, match=f"NaN or infinity in '{named}'"):
        read_everything()


def test_known_leftovers_are_ignored(folders: tuple[Path, Path]) -> None:
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}
    shard = "pytorch_model-00001-of-00002.bin"
    _edit_tensors(folders[1] / shard, lambda state: state.update(inv_freq))
    open_checkpoint(*folders)


def test_safetensors_are_read_as_well(folders: tuple[Path, Path]) -> None:
    checkpoint, base = folders
    before = open_checkpoint(*folders)
    weight_map = {}
    for number, shard in enumerate(sorted(base.glob("*.bin")), start=1):
        state = random_checkpoint.load(shard)
        save_file(state, base / f"model-0000{number}-of-00002.safetensors")
        weight_map |= dict.fromkeys(state, f"model-0000{number}-of-00002.safetensors")
        shard.unlink()
    (base / "pytorch_model.bin.index.json").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file(random_checkpoint.load(checkpoint / "adapter_model.bin"), checkpoint / "adapter_model.safetensors")
    source = open_checkpoint(*folders)
    assert "base/model-00001-of-00002.safetensors" in source.files
    assert "checkpoint/adapter_model.safetensors" in source.files
    expected = random_checkpoint.load(checkpoint / "adapter_model.bin")
    key = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
    assert torch.equal(source.read_layer(0).lora["self_attn.o_proj"].a, expected[key])
    assert source.base.entries.keys() == before.base.entries.keys()


class _Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("file", ["adapter_model.bin", "biomedclipcxr_42_checkpoint.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_code_is_refused_by_name(
    folders: tuple[Path, Path], tmp_path: Path, file: str, zipped: bool
) -> None:
    content = random_checkpoint.load(folders[0] / file)
    content["extra"] = _Malicious(tmp_path / "owned")
    torch.save(content, folders[0] / file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"{file}: got a pickle that asks for (posix|nt)\.system"):
        open_checkpoint(*folders)
    assert not (tmp_path / "owned").exists()


def test_a_bare_pickle_is_refused(folders: tuple[Path, Path]) -> None:
    file = folders[0] / "adapter_model.bin"
    file.write_bytes(pickle.dumps({"x": _Malicious(folders[0] / "owned")}, protocol=2))
    with pytest.raises(CheckpointError, match="adapter_model.bin"):
        open_checkpoint(*folders)
    assert not (folders[0] / "owned").exists()


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_scalars_of_either_numpy_are_read(tmp_path: Path, module: str) -> None:
    written, rewritten = tmp_path / "written.pt", tmp_path / "rewritten.pt"
    torch.save({"loss": np.float64(0.25), "step": np.int64(7), "weight": torch.ones(2)}, written)
    with zipfile.ZipFile(written) as source, zipfile.ZipFile(rewritten, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(
                name,
                data.replace(b"cnumpy._core.multiarray\n", f"c{module}\n".encode()).replace(
                    b"cnumpy.core.multiarray\n", f"c{module}\n".encode()
                ),
            )
    content = load_pickle(rewritten, what="a test")
    assert (content["loss"], content["step"]) == (0.25, 7)


def test_files_from_before_torch_1_6_are_read(folders: tuple[Path, Path]) -> None:
    file = folders[0] / "adapter_model.bin"
    torch.save(random_checkpoint.load(file), file, _use_new_zipfile_serialization=False)
    assert open_checkpoint(*folders).read_layer(0).lora["mlp.gate_proj"].a.shape == (8, 128)


def test_a_file_from_before_torch_1_6_with_a_wrong_storage_is_refused(folders: tuple[Path, Path]) -> None:
    file = folders[0] / "adapter_model.bin"
    tensor = torch.ones(3)
    torch.save({"weight": tensor}, file, _use_new_zipfile_serialization=False)
    key = str(tensor.untyped_storage()._cdata).encode()
    before, found, after = file.read_bytes().rpartition(key)
    assert found
    file.write_bytes(before + key[::-1] + after)
    with pytest.raises(CheckpointError, match=r"adapter_model.bin: got a damaged or truncated file \(storage key"):
        open_checkpoint(*folders)


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/passwd", "sub/shard.bin", "..", "a\\b.bin", 3])
def test_an_index_cannot_lead_out_of_the_folder(folders: tuple[Path, Path], name: object) -> None:
    index = folders[1] / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="expected a plain name"):
        open_checkpoint(*folders)


def test_an_index_that_disagrees_with_its_shards_is_refused(folders: tuple[Path, Path]) -> None:
    index = folders[1] / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.embed_tokens.weight"] = "pytorch_model-00002-of-00002.bin"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight.*listed in"):
        open_checkpoint(*folders)


def test_a_missing_shard_is_named(folders: tuple[Path, Path]) -> None:
    (folders[1] / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="pytorch_model-00002-of-00002.bin: got no such file"):
        open_checkpoint(*folders)


@pytest.mark.parametrize("file", ["adapter_model.bin", "biomedclipcxr_42_checkpoint.pt", "config.json"])
def test_a_git_lfs_pointer_is_explained(folders: tuple[Path, Path], file: str) -> None:
    (folders[0] / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError, match=f"{file}: got a git-lfs pointer.*git lfs pull"):
        open_checkpoint(*folders)


@pytest.mark.parametrize("file", ["adapter_model.bin", "biomedclipcxr_42_checkpoint.pt"])
@pytest.mark.parametrize("keep", [0, 100, -500])
def test_a_truncated_file_is_named(folders: tuple[Path, Path], file: str, keep: int) -> None:
    path = folders[0] / file
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{file}: got .*fetch"):
        open_checkpoint(*folders)


def test_folders_given_the_wrong_way_round_are_explained(folders: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match="look swapped"):
        open_checkpoint(folders[1], folders[0])


def test_wrong_folders_are_explained(folders: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, base = folders
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
    ("change", "named"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_use_im_patch_token": True}, "mm_use_im_patch_token"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio"),
        ({"model_type": "llama"}, "model_type"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.*stale"),
        ({"vocab_size": 32000}, "vocab_size.*adapter was trained on"),
        ({"rope_theta": 500000.0}, "rope_theta"),
        ({"max_position_embeddings": 2048}, "max_position_embeddings"),
        ({"mm_hidden_size": 768}, "mm_hidden_size"),
        ({"mm_vision_tower_checkpoint": "../tower.pt"}, "plain name"),
        ({"mm_vision_tower_checkpoint": "gone.pt"}, "gone.pt: got no such file"),
    ],
)
def test_other_models_are_refused_by_the_setting_that_differs(
    folders: tuple[Path, Path], change: dict[str, Any], named: str
) -> None:
    edit_json(folders[0] / "config.json", **change)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(*folders)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"model_type": "llava"}, "language model it was trained from, llava-rad-phantom/base"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3 · expected 2"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_other_base_models_are_refused(folders: tuple[Path, Path], change: dict[str, Any], named: str) -> None:
    edit_json(folders[1] / "config.json", **change)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(*folders)


def test_the_named_tower_json_comes_first_and_no_choice_is_made_between_two(folders: tuple[Path, Path]) -> None:
    checkpoint, _ = folders
    tower = checkpoint / "biomedclipcxr_42.json"
    other = checkpoint / "another.json"
    shutil.copyfile(tower, other)
    with pytest.raises(CheckpointError, match=r"2 other json files.*another\.json"):
        open_checkpoint(*folders)
    edit_json(checkpoint / "config.json", mm_vision_tower_config="another.json")
    assert "checkpoint/another.json" in open_checkpoint(*folders).files
    tower.unlink()
    other.unlink()
    with pytest.raises(CheckpointError, match="0 other json files"):
        open_checkpoint(*folders)


@pytest.mark.parametrize(
    "vision", [{"timm_model_name": "vit_base_patch14_reg4_dinov2", "image_size": 42}, {"image_size": 42}, None, 5]
)
def test_other_towers_are_refused(folders: tuple[Path, Path], vision: object) -> None:
    edit_json(folders[0] / "biomedclipcxr_42.json", vision_cfg=vision or {})
    with pytest.raises(CheckpointError, match="expected a DINOv2 ViT"):
        open_checkpoint(*folders)


def test_a_tower_of_another_size_is_refused(folders: tuple[Path, Path]) -> None:
    edit_json(
        folders[0] / "biomedclipcxr_42.json",
        vision_cfg={"timm_model_name": "vit_base_patch14_dinov2.lvd142m", "image_size": 56},
    )
    with pytest.raises(CheckpointError, match=r"pos_embed.*expected \[1, 17, 128\]"):
        open_checkpoint(*folders)


def test_stated_preprocessing_is_taken(folders: tuple[Path, Path]) -> None:
    edit_json(folders[0] / "biomedclipcxr_42.json", preprocess_cfg={"mean": [0.1, 0.2, 0.3]})
    assert open_checkpoint(*folders).preprocessing.mean == (0.1, 0.2, 0.3)
    edit_json(folders[0] / "biomedclipcxr_42.json", preprocess_cfg={"interpolation": "bilinear"})
    with pytest.raises(CheckpointError, match="bicubic"):
        open_checkpoint(*folders)


@pytest.mark.parametrize(
    ("stated", "named"),
    [
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
def test_preprocessing_that_cannot_be_computed_is_refused(
    folders: tuple[Path, Path], stated: object, named: str
) -> None:
    edit_json(folders[0] / "biomedclipcxr_42.json", preprocess_cfg=stated)
    with pytest.raises(CheckpointError, match=rf"biomedclipcxr_42\.json: got {named}"):
        open_checkpoint(*folders)


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json", "adapter_model.bin"])
def test_an_unreadable_file_is_named(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    right = Path.open

    def closed(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == folders[0] / file:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return right(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(CheckpointError, match=f"{file}: got an unreadable file .Permission denied.* permissions"):
        open_checkpoint(*folders)


def test_json_nested_without_end_is_refused(folders: tuple[Path, Path]) -> None:
    (folders[0] / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(CheckpointError, match="config.json: got something that is not JSON"):
        open_checkpoint(*folders)


@pytest.mark.parametrize("name", ["cls_token", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"])
def test_a_tower_of_tensors_without_a_shape_is_refused(folders: tuple[Path, Path], name: str) -> None:
    file = folders[0] / "biomedclipcxr_42_checkpoint.pt"
    _edit_tensors(file, lambda state: state.update({f"module.visual.trunk.{name}": torch.tensor(1.0)}))
    with pytest.raises(CheckpointError, match=rf"got a shape of \[\] for '.*{name}'"):
        open_checkpoint(*folders)


@pytest.mark.parametrize("file", ["adapter_model.bin", "biomedclipcxr_42_checkpoint.pt"])
def test_a_key_that_is_no_name_is_named(folders: tuple[Path, Path], file: str) -> None:
    _edit_tensors(folders[0] / file, lambda state: state.update({7: torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=f"{file}: got the key 7.* of type int · expected names of tensors"):
        open_checkpoint(*folders)


def test_a_name_with_a_slash_is_read_as_it_is(tmp_path: Path) -> None:
    torch.save({"encoder/weight": torch.ones(2), "encoder": torch.zeros(3)}, tmp_path / "model.bin")
    tensors = open_tensors(tmp_path, "model", what="a test").read(["encoder/weight"])
    assert torch.equal(tensors["encoder/weight"], torch.ones(2))


def test_a_tokenizer_of_another_vocabulary_is_refused(folders: tuple[Path, Path]) -> None:
    tokenizer = folders[1] / "tokenizer.model"
    tokenizer.write_bytes(b"not a tokenizer")
    with pytest.raises(CheckpointError, match="expected a SentencePiece model · fetch it again"):
        open_checkpoint(*folders)
    tokenizer.unlink()
    with pytest.raises(CheckpointError, match="tokenizer.model: got something unreadable .*No such file"):
        open_checkpoint(*folders)


def test_reading_keeps_no_file_mapped(original: Path) -> None:
    """A mapping that stays open counts as memory of this process, and 13 GB of it would end the export."""
    tensors = open_tensors(original / "base", "pytorch_model", what="the base model")
    kept = tensors.read(["lm_head.weight"])
    maps = "/proc/self/maps"
    if not os.path.exists(maps):  # noqa: PTH110
        pytest.skip("needs /proc")
    with open(maps, encoding="utf-8") as file:  # noqa: PTH123
        assert str(original / "base") not in file.read()
    assert kept["lm_head.weight"].untyped_storage().nbytes() == kept["lm_head.weight"].nbytes
