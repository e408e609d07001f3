"""Files of a checkpoint: the forms they come in, and what damaged or malicious ones are refused for."""

from __future__ import annotations

import errno
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_checkpoint
import torch
from random_checkpoint import edit_tensors
from safetensors.torch import save_file
from small_export import Folders

from export.source.checkpoint import open_checkpoint
from export.source.tensors import load_pickle, open_tensors
from lite.errors import CheckpointError


class _Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("file", ["adapter_model.bin", "biomedclipcxr_42_checkpoint.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_code_is_refused_by_name(own: Folders, tmp_path: Path, file: str, zipped: bool) -> None:
    content = random_checkpoint.load(own[0] / file)
    content["extra"] = _Malicious(tmp_path / "owned")
    torch.save(content, own[0] / file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"{file}: got a pickle that asks for (posix|nt)\.system"):
        open_checkpoint(*own)
    assert not (tmp_path / "owned").exists()


def test_a_bare_pickle_is_refused(own: Folders) -> None:
    file = own[0] / "adapter_model.bin"
    file.write_bytes(pickle.dumps({"x": _Malicious(own[0] / "owned")}, protocol=2))
    with pytest.raises(CheckpointError, match="adapter_model.bin"):
        open_checkpoint(*own)
    assert not (own[0] / "owned").exists()


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


def test_files_from_before_torch_1_6_are_read(own: Folders) -> None:
    file = own[0] / "adapter_model.bin"
    torch.save(random_checkpoint.load(file), file, _use_new_zipfile_serialization=False)
    assert open_checkpoint(*own).read_layer(0).lora["mlp.gate_proj"].a.shape == (8, 128)


def test_a_file_from_before_torch_1_6_with_a_wrong_storage_is_refused(own: Folders) -> None:
    file = own[0] / "adapter_model.bin"
    tensor = torch.ones(3)
    torch.save({"weight": tensor}, file, _use_new_zipfile_serialization=False)
    key = str(tensor.untyped_storage()._cdata).encode()
    before, found, after = file.read_bytes().rpartition(key)
    assert found
    file.write_bytes(before + key[::-1] + after)
    with pytest.raises(CheckpointError, match=r"adapter_model.bin: got a damaged or truncated file \(storage key"):
        open_checkpoint(*own)


def test_safetensors_are_read_as_well(own: Folders) -> None:
    checkpoint, base = own
    before = open_checkpoint(*own)
    weight_map = {}
    for number, shard in enumerate(sorted(base.glob("*.bin")), start=1):
        state = random_checkpoint.load(shard)
        save_file(state, base / f"model-0000{number}-of-00002.safetensors")
        weight_map |= dict.fromkeys(state, f"model-0000{number}-of-00002.safetensors")
        shard.unlink()
    (base / "pytorch_model.bin.index.json").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file(random_checkpoint.load(checkpoint / "adapter_model.bin"), checkpoint / "adapter_model.safetensors")
    source = open_checkpoint(*own)
    assert "base/model-00001-of-00002.safetensors" in source.files
    assert "checkpoint/adapter_model.safetensors" in source.files
    expected = random_checkpoint.load(checkpoint / "adapter_model.bin")
    key = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
    assert torch.equal(source.read_layer(0).lora["self_attn.o_proj"].a, expected[key])
    assert source.base.entries.keys() == before.base.entries.keys()


def test_an_index_without_its_shards_gives_way_to_weights_that_are_whole(
    own: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint, base = own
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    whole = open_checkpoint(checkpoint, base)
    assert {file.suffix for file in whole.base.files} == {".bin"}
    assert "model.safetensors.index.json: left aside: none of its shards is there" in caplog.text
    (base / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: got no such file"):
        open_checkpoint(checkpoint, base)


@pytest.mark.parametrize(
    ("tensor", "shard", "match"),
    [
        *(
            ("lm_head.weight", name, "expected a plain name")
            for name in ("../outside.bin", "/etc/passwd", "sub/shard.bin", "..", "a\\b.bin", 3)
        ),
        ("model.embed_tokens.weight", "pytorch_model-00002-of-00002.bin", r"model\.embed_tokens\.weight.*listed in"),
    ],
)
def test_an_index_that_leads_out_of_the_folder_or_disagrees_with_its_shards_is_refused(
    own: Folders, tensor: str, shard: object, match: str
) -> None:
    index = own[1] / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][tensor] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(*own)


def test_a_missing_shard_is_named(own: Folders) -> None:
    (own[1] / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="pytorch_model-00002-of-00002.bin: got no such file"):
        open_checkpoint(*own)


@pytest.mark.parametrize("file", ["adapter_model.bin", "biomedclipcxr_42_checkpoint.pt", "config.json"])
def test_a_git_lfs_pointer_is_explained(own: Folders, file: str) -> None:
    (own[0] / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError, match=f"{file}: got a git-lfs pointer.*git lfs pull"):
        open_checkpoint(*own)


@pytest.mark.parametrize("file", ["adapter_model.bin", "biomedclipcxr_42_checkpoint.pt"])
@pytest.mark.parametrize("keep", [0, 100, -500])
def test_a_truncated_file_is_named(own: Folders, file: str, keep: int) -> None:
    path = own[0] / file
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{file}: got .*fetch"):
        open_checkpoint(*own)


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json", "adapter_model.bin"])
def test_an_unreadable_file_is_named(own: Folders, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    right = Path.open

    def closed(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == own[0] / file:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return right(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(CheckpointError, match=f"{file}: got an unreadable file .Permission denied.* permissions"):
        open_checkpoint(*own)


def test_json_nested_without_end_is_refused(own: Folders) -> None:
    (own[0] / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(CheckpointError, match="config.json: got something that is not JSON"):
        open_checkpoint(*own)


@pytest.mark.parametrize("name", ["cls_token", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"])
def test_a_tower_of_tensors_without_a_shape_is_refused(own: Folders, name: str) -> None:
    file = own[0] / "biomedclipcxr_42_checkpoint.pt"
    edit_tensors(file, lambda state: state | {f"module.visual.trunk.{name}": torch.tensor(1.0)})
    with pytest.raises(CheckpointError, match=rf"got a shape of \[\] for '.*{name}'"):
        open_checkpoint(*own)


@pytest.mark.parametrize("file", ["adapter_model.bin", "biomedclipcxr_42_checkpoint.pt"])
def test_a_key_that_is_no_name_is_named(own: Folders, file: str) -> None:
    edit_tensors(own[0] / file, lambda state: state | {7: torch.zeros(2)})
    with pytest.raises(CheckpointError, match=f"{file}: got the key 7.* of type int · expected names of tensors"):
        open_checkpoint(*own)


def test_a_name_with_a_slash_is_read_as_it_is(tmp_path: Path) -> None:
    torch.save({"encoder/weight": torch.ones(2), "encoder": torch.zeros(3)}, tmp_path / "model.bin")
    tensors = open_tensors(tmp_path, "model", what="a test").read(["encoder/weight"])
    assert torch.equal(tensors["encoder/weight"], torch.ones(2))


def test_reading_keeps_no_file_mapped(folders: Folders) -> None:
    """A mapping that stays open counts as memory of this process, and 13 GB of it would end the export."""
    tensors = open_tensors(folders[1], "pytorch_model", what="the base model")
    kept = tensors.read(["lm_head.weight"])
    maps = "/proc/self/maps"
    if not os.path.exists(maps):  # noqa: PTH110
        pytest.skip("needs /proc")
    with open(maps, encoding="utf-8") as file:  # noqa: PTH123
        assert str(folders[1]) not in file.read()
    assert kept["lm_head.weight"].untyped_storage().nbytes() == kept["lm_head.weight"].nbytes
