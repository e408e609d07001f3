"""The vision tower of a checkpoint: an open_clip training checkpoint, and the json that describes it.

The json is the file `mm_vision_tower_config` names; as the published config names one that is not there, the only other
json in the folder with a `vision_cfg` is taken in its place, and no choice is made between two.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

from export.source.tensors import TensorFiles, entries_of, load_pickle, plain_file_name, read_json
from lite.config import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, Preprocessing
from lite.errors import CheckpointError

MODULE_PREFIX: Final = "module."
TRUNK_PREFIX: Final = "module.visual.trunk."
VIT_HEAD_DIM: Final = 64
"""Heads are not recorded in the weights; every DINOv2 tower has heads of 64 channels."""
UNNEEDED_TOWER: Final = (r"module\.text\..*", r"module\.visual\.head\..*", r"module\.logit_(scale|bias)")
UNNEEDED_TRUNK: Final = (r"norm\.(weight|bias)", r"mask_token")
"""The trunk's final norm; blocks above the selected one are added by number."""
_TRAINING_EXTRAS: Final = frozenset({"optimizer", "scaler", "lr_scheduler", "scheduler"})
"""Keys of a training checkpoint that hold tensors of no use here."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TowerConfig:
    """The vision tower's shape, read from its tensors and json."""

    image_size: int
    patch_size: int
    dim: int
    depth: int  # blocks in the checkpoint
    num_blocks: int  # blocks that are run: select_layer -2 leaves the last one out
    mlp_dim: int

    @property
    def num_heads(self) -> int:
        """The attention heads."""
        return self.dim // VIT_HEAD_DIM

    @property
    def num_patches(self) -> int:
        """The image tokens the tower gives the decoder."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """An open tower: its tensors indexed and checked."""

    config: TowerConfig
    preprocessing: Preprocessing
    trunk: TensorFiles  # timm's names, without prefix
    others: TensorFiles  # what findings do not need, without "module."
    files: tuple[Path, Path]


def open_tower(checkpoint: Path, llava: dict[str, Any]) -> Tower:
    """Open the tower of a LLaVA-Rad download with that config.json, and check it, without reading its weights.

    Raises:
        CheckpointError: A file is missing, or is not what it should be.
    """
    tower_json = _find_tower_json(checkpoint, llava)
    tower_file = _find_tower_checkpoint(checkpoint, llava)
    trunk, others = _open_trunk(tower_file)
    config, preprocessing = _tower_config(tower_json, trunk, tower_file, int(llava["mm_vision_select_layer"]))
    unused_blocks = "|".join(str(block) for block in range(config.num_blocks, config.depth))
    trunk.require(trunk_shapes(config), unneeded=(*UNNEEDED_TRUNK, rf"blocks\.({unused_blocks})\..*"))
    if llava.get("mm_hidden_size", config.dim) != config.dim:
        msg = f"{checkpoint / 'config.json'}: got mm_hidden_size={llava['mm_hidden_size']} · expected the tower's"
        raise CheckpointError(f"{msg} {config.dim} · config.json and {tower_file.name} belong to different models")
    files = (tower_json, tower_file)
    return Tower(config=config, preprocessing=preprocessing, trunk=trunk, others=others, files=files)


def trunk_shapes(tower: TowerConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the trunk's tensors that are run."""
    dim, mlp_dim = tower.dim, tower.mlp_dim
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + tower.num_patches, dim),
        "patch_embed.proj.weight": (dim, 3, tower.patch_size, tower.patch_size),
        "patch_embed.proj.bias": (dim,),
    }
    vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")
    in_block: dict[str, tuple[int, ...]] = dict.fromkeys(vectors, (dim,))
    linears = {
        "attn.qkv": (3 * dim, dim),
        "attn.proj": (dim, dim),
        "mlp.fc1": (mlp_dim, dim),
        "mlp.fc2": (dim, mlp_dim),
    }
    for linear, shape in linears.items():
        in_block |= {f"{linear}.weight": shape, f"{linear}.bias": shape[:1]}
    for block in range(tower.num_blocks):
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in in_block.items()}
    return shapes


def _find_tower_json(checkpoint: Path, llava: dict[str, Any]) -> Path:
    """Return the named json, or the only other one that describes a tower."""
    named = llava.get("mm_vision_tower_config")
    if named is not None:
        # Published configs carry a path from the machine they were trained on; only its last part can be meant.
        path = checkpoint / Path(str(named)).name
        if path.is_file() and path.name == named:
            return path
    ours = {"config.json", "adapter_config.json"}
    others = sorted(path for path in checkpoint.glob("*.json") if path.name not in ours)
    others = [path for path in others if not path.name.endswith(".index.json")]
    towers = [path for path in others if "vision_cfg" in read_json(path, what="json")]
    if len(towers) != 1:
        raise CheckpointError(
            f"{checkpoint}: got {named!r} named in config.json but not there, and {len(towers)} other json files with "
            f"a vision_cfg{': ' + ', '.join(p.name for p in towers) if towers else ''} · expected exactly one · "
            "fetch biomedclipcxr_518.json, or remove the ones that are not this tower's"
        )
    return towers[0]


def _find_tower_checkpoint(checkpoint: Path, llava: dict[str, Any]) -> Path:
    name = plain_file_name(llava.get("mm_vision_tower_checkpoint"), where=f"{checkpoint / 'config.json'}")
    path = checkpoint / name
    if not path.is_file():
        msg = f"{path}: got no such file · expected the vision tower, an open_clip training checkpoint · fetch it"
        raise CheckpointError(msg)
    return path


def _open_trunk(file: Path) -> tuple[TensorFiles, TensorFiles]:
    """Index the trunk inside an open_clip training checkpoint, and what else is in it, which must be known."""
    what = "the vision tower"
    content = load_pickle(file, what=what)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        msg = f"{file}: got no state_dict · expected an open_clip training checkpoint · fetch the file again"
        raise CheckpointError(msg)
    for key, value in content.items():
        scalar = isinstance(value, str | int | float | np.generic | None)
        if key not in {"state_dict", *_TRAINING_EXTRAS} and not scalar:
            msg = f"{file}: got an entry {key!r} of type {type(value).__name__} · expected state_dict and training "
            raise CheckpointError(f"{msg}state · check that this is the right file")
    entries = entries_of(file, state, group="state_dict")
    known = [re.compile(pattern) for pattern in UNNEEDED_TOWER]
    trunk, others = {}, {}
    for name, entry in entries.items():
        if name.startswith(TRUNK_PREFIX):
            trunk[name.removeprefix(TRUNK_PREFIX)] = entry
        elif any(pattern.fullmatch(name) for pattern in known):
            others[name.removeprefix(MODULE_PREFIX)] = entry
        else:
            msg = f"{file}: got the tensor {name!r}, which this exporter does not know · expected {TRUNK_PREFIX}*"
            raise CheckpointError(f"{msg} and the text tower · check that this is the right model")
    return TensorFiles(trunk, what=what), TensorFiles(others, what="the towers of retrieval")


def _tower_config(
    tower_json: Path, trunk: TensorFiles, tower_file: Path, select_layer: int
) -> tuple[TowerConfig, Preprocessing]:
    config = read_json(tower_json, what="the tower's configuration")
    vision = config.get("vision_cfg")
    timm_name = vision.get("timm_model_name") if isinstance(vision, dict) else None
    image_size = vision.get("image_size") if isinstance(vision, dict) else None
    if not isinstance(timm_name, str) or "dinov2" not in timm_name or "reg" in timm_name or type(image_size) is not int:
        msg = f"{tower_json}: got timm_model_name={timm_name!r} image_size={image_size!r} · expected a DINOv2 ViT"
        raise CheckpointError(f"{msg} without registers and a size in pixels · other towers are not implemented")
    blocks = [int(name.split(".")[1]) for name in trunk.entries if re.match(r"blocks\.\d+\.", name)]
    for name, dimensions in {"cls_token": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2}.items():
        shape = trunk.entries[name].shape if name in trunk.entries else None
        if shape is None or len(shape) != dimensions:
            got = "no tensor" if shape is None else f"a shape of {list(shape)} for"
            msg = f"{tower_file}: got {got} {TRUNK_PREFIX + name!r} · expected a DINOv2 ViT · fetch the file again"
            raise CheckpointError(msg)
    depth = max(blocks) + 1
    tower = TowerConfig(
        image_size=image_size,
        patch_size=trunk.entries["patch_embed.proj.weight"].shape[-1],
        dim=trunk.entries["cls_token"].shape[-1],
        depth=depth,
        # Hidden states are [embedding, block 0, block 1, ...]: -2 is the output of the last block but one.
        num_blocks=depth + 1 + select_layer,
        mlp_dim=trunk.entries["blocks.0.mlp.fc1.weight"].shape[0],
    )
    if tower.dim % VIT_HEAD_DIM or tower.num_blocks < 1 or not tower.patch_size or image_size % tower.patch_size:
        raise CheckpointError(
            f"{tower_file}: got dim {tower.dim}, {depth} blocks, patch {tower.patch_size} for {image_size=} and select "
            f"layer {select_layer} · expected heads of {VIT_HEAD_DIM}, whole patches and a block to select · "
            f"{tower_json.name} belongs to another tower"
        )
    return tower, _preprocessing(config, image_size, tower_json)


def _preprocessing(config: dict[str, Any], image_size: int, where: Path) -> Preprocessing:
    """Return open_clip's preprocessing: the CLIP statistics, unless the tower's json states others."""
    stated = config.get("preprocess_cfg")
    if stated is None:
        stated = {}
    if not isinstance(stated, dict):
        raise CheckpointError(f"{where}: got preprocess_cfg={stated!r} · expected an object · fetch the file again")
    if stated.get("interpolation", "bicubic") != "bicubic" or stated.get("resize_mode", "shortest") != "shortest":
        msg = f"{where}: got preprocess_cfg={stated} · expected bicubic, shortest edge · others are not implemented"
        raise CheckpointError(msg)
    mean = _three_numbers(stated, "mean", OPENAI_CLIP_MEAN, where)
    std = _three_numbers(stated, "std", OPENAI_CLIP_STD, where)
    if min(std) <= 0:
        raise CheckpointError(f"{where}: got std={list(std)} · expected positive numbers · fetch the file again")
    return Preprocessing(image_size=image_size, mean=mean, std=std)


def _three_numbers(
    stated: dict[str, Any], name: str, unstated: tuple[float, float, float], where: Path
) -> tuple[float, float, float]:
    """Return a channel statistic as stated, or what holds where nothing is."""
    values = stated.get(name)
    if values is None:
        return unstated
    if (
        not isinstance(values, list)
        or len(values) != 3
        or any(type(value) not in (int, float) or not abs(value) <= sys.float_info.max for value in values)
    ):
        msg = f"{where}: got {name}={values!r} · expected three finite numbers · fetch the file again"
        raise CheckpointError(msg)
    red, green, blue = map(float, values)
    return red, green, blue
