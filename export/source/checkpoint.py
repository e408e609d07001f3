"""A source checkpoint in LLaVA-Rad's published layout, checked whole before anything is written.

    --checkpoint DIR                                       --base DIR
      config.json            shapes, the names below         config.json           the plain Llama
      adapter_config.json    LoRA's rank and alpha           pytorch_model*.bin    or model*.safetensors
      adapter_model.bin      LoRA's A and B                  tokenizer.model
      non_lora_trainables.bin  the projector
      <tower>.json, <tower>_checkpoint.pt                    an open_clip training checkpoint

`open_checkpoint` reads the small files and the *index* of the large ones, and compares every tensor's name, shape and
dtype with what the configurations promise: each is used, or known and not needed, or an error that names it. The
weights themselves are read later, one decoder layer at a time.

The tower's json is the file `mm_vision_tower_config` names; as the published config names one that is not there, the
only other json in the folder with a `vision_cfg` is taken in its place, and no choice is made between two.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from export.source.lora import LINEARS, AdapterConfig, LoraPair, merge
from export.source.tensors import TensorFiles, entries_of, load_pickle, open_tensors, plain_file_name, read_json
from lite.config import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, DecoderConfig, DecodingDefaults, Preprocessing
from lite.errors import ArtifactError, CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_PREFIX: Final = "base_model.model."
PROJECTOR_PREFIX: Final = "base_model.model.model.mm_projector."
TRUNK_PREFIX: Final = "module.visual.trunk."
NOTICE_NAME: Final = "NOTICE"
MAX_NOTICE_CHARS: Final = 1000
VIT_HEAD_DIM: Final = 64
"""Heads are not recorded in the weights; every DINOv2 tower has heads of 64 channels."""

UNNEEDED_BASE: Final = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
UNNEEDED_TOWER: Final = (r"module\.text\..*", r"module\.visual\.head\..*", r"module\.logit_(scale|bias)")
UNNEEDED_TRUNK: Final = (r"norm\.(weight|bias)", r"mask_token")
"""The trunk's final norm; blocks above the selected one are added by number."""
_TRAINING_EXTRAS: Final = frozenset({"optimizer", "scaler", "lr_scheduler", "scheduler"})
"""Keys of a training checkpoint that hold tensors of no use here."""

# LLaVA settings that change what the model computes, and the only value this exporter implements.
_LLAVA_REQUIRED: Final[dict[str, tuple[Any, str]]] = {
    "model_type": ("llava", "this is not a LLaVA checkpoint"),
    "mm_projector_type": ("mlp2x_gelu", "another projector computes something else"),
    "mm_vision_select_feature": ("patch", "features with the CLS token are not implemented"),
    "image_aspect_ratio": ("square", "padded or tiled images are not implemented"),
    "mm_use_im_start_end": (False, "it adds tokens to the vocabulary, which is not implemented"),
    "mm_use_im_patch_token": (False, "it adds a token to the vocabulary, which is not implemented"),
}
_SAME_IN_BASE: Final = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)


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
class SourceLayer:
    """One decoder layer as the source has it: plain weights, and LoRA pairs that are not merged."""

    weights: dict[str, Tensor]  # "self_attn.q_proj.weight", ..., "input_layernorm.weight"
    lora: dict[str, LoraPair]  # "self_attn.q_proj": ...

    def merged(self) -> dict[str, Tensor]:
        """Return all weights in float32 with LoRA merged, under the same names."""
        return {
            name: merge(weight, self.lora.get(name.removesuffix(".weight"))) for name, weight in self.weights.items()
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An open source checkpoint: configurations read, tensors indexed and checked, weights not yet read."""

    name: str
    decoder: DecoderConfig
    decoding: DecodingDefaults
    adapter_config: AdapterConfig
    tower: TowerConfig
    preprocessing: Preprocessing
    base: TensorFiles
    adapter: TensorFiles
    projector: TensorFiles
    trunk: TensorFiles  # timm's names, without prefix
    tokenizer: Path
    notice: str | None  # what the folder's NOTICE says to whoever reads the findings; None without one
    files: dict[str, Path]  # every file that was read, under "checkpoint/..." or "base/..."

    def read_layer(self, index: int) -> SourceLayer:
        """Read one decoder layer, in the dtype it is stored in."""
        prefix = f"model.layers.{index}."
        names = [prefix + name for name in layer_shapes(self.decoder)]
        weights = {name.removeprefix(prefix): tensor for name, tensor in self.base.read(names).items()}
        pairs = [f"{ADAPTER_PREFIX}{prefix}{linear}.lora_" for linear in self.adapter_config.linears]
        factors = self.adapter.read([pair + factor for pair in pairs for factor in ("A.weight", "B.weight")])
        lora = {
            linear: LoraPair(
                a=factors[f"{pair}A.weight"], b=factors[f"{pair}B.weight"], scale=self.adapter_config.scale
            )
            for linear, pair in zip(self.adapter_config.linears, pairs, strict=True)
        }
        return SourceLayer(weights=weights, lora=lora)

    def read_base(self, name: str) -> Tensor:
        """Read one tensor of the base model: the embeddings, the final norm or the head."""
        return self.base.read([name])[name]

    def read_tower(self) -> dict[str, Tensor]:
        """Read the tensors of the tower that are run, and the projector's as `projector.0.weight` and so on."""
        tensors = self.trunk.read(trunk_shapes(self.tower, num_blocks=self.tower.num_blocks))
        for name, tensor in self.projector.read(self.projector.entries).items():
            tensors[f"projector.{name.removeprefix(PROJECTOR_PREFIX)}"] = tensor
        return tensors


def open_checkpoint(checkpoint: Path, base: Path) -> Checkpoint:
    """Open a checkpoint in the published layout and check it, without reading its weights.

    Args:
        checkpoint: Folder of the LLaVA-Rad download: LoRA, projector, tower.
        base: Folder of the language model it was trained from: `lmsys/vicuna-7b-v1.5` for the published one.

    Raises:
        CheckpointError: A folder or file is not what it should be; the message says which, and what to do.
    """
    _require_folders(checkpoint, base)
    llava = read_json(checkpoint / "config.json", what="the LLaVA configuration")
    base_config = read_json(base / "config.json", what="the base model's configuration")
    adapter_json = read_json(checkpoint / "adapter_config.json", what="the LoRA configuration")
    adapter_config = AdapterConfig.from_json(adapter_json, where=str(checkpoint / "adapter_config.json"))
    _check_llava_config(llava, checkpoint / "config.json")
    decoder = _decoder_config(llava, checkpoint, base_config, base, adapter_config)

    base_tensors = open_tensors(base, "pytorch_model", what="the base model")
    base_tensors.require(base_shapes(decoder), unneeded=UNNEEDED_BASE)
    adapter = open_tensors(checkpoint, "adapter_model", what="the LoRA adapter")
    adapter.require(adapter_shapes(decoder, adapter_config))

    tower_json = _find_tower_json(checkpoint, llava)
    tower_file = _find_tower_checkpoint(checkpoint, llava)
    trunk = _open_trunk(tower_file)
    tower, preprocessing = _tower_config(tower_json, trunk, tower_file, int(llava["mm_vision_select_layer"]))
    unused_blocks = "|".join(str(block) for block in range(tower.num_blocks, tower.depth))
    trunk.require(
        trunk_shapes(tower, num_blocks=tower.num_blocks),
        unneeded=(*UNNEEDED_TRUNK, rf"blocks\.({unused_blocks})\..*"),
    )
    projector = open_tensors(checkpoint, "non_lora_trainables", what="the projector")
    projector.require(projector_shapes(decoder, tower))
    if llava.get("mm_hidden_size", tower.dim) != tower.dim:
        msg = (
            f"{checkpoint / 'config.json'}: got mm_hidden_size={llava['mm_hidden_size']} · expected the tower's "
            f"{tower.dim} · config.json and {tower_file.name} belong to different models"
        )
        raise CheckpointError(msg)

    tokenizer = base / "tokenizer.model"
    _check_tokenizer(tokenizer, decoder.vocab_size)
    in_checkpoint = [checkpoint / "config.json", checkpoint / "adapter_config.json", tower_json, tower_file]
    in_checkpoint += adapter.files + projector.files
    in_base = [base / "config.json", tokenizer, *base_tensors.files]
    files = {f"checkpoint/{file.name}": file for file in in_checkpoint} | {
        f"base/{file.name}": file for file in in_base
    }
    notice = _notice(checkpoint / NOTICE_NAME)
    if notice is not None:
        files[f"checkpoint/{NOTICE_NAME}"] = checkpoint / NOTICE_NAME
    ids = {key: llava[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if type(llava.get(key)) is int}
    return Checkpoint(
        name=_model_name(checkpoint),
        decoder=decoder,
        decoding=DecodingDefaults(**ids),
        adapter_config=adapter_config,
        tower=tower,
        preprocessing=preprocessing,
        base=base_tensors,
        adapter=adapter,
        projector=projector,
        trunk=trunk,
        tokenizer=tokenizer,
        notice=notice,
        files=dict(sorted(files.items())),
    )


def layer_shapes(decoder: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of one decoder layer."""
    hidden, intermediate = decoder.hidden_size, decoder.intermediate_size
    query, kv = (heads * decoder.head_dim for heads in (decoder.num_attention_heads, decoder.num_key_value_heads))
    attention = [(query, hidden), (kv, hidden), (kv, hidden), (hidden, query)]
    mlp = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    shapes: dict[str, tuple[int, ...]] = {
        f"{linear}.weight": shape for linear, shape in zip(LINEARS, attention + mlp, strict=True)
    }
    return shapes | {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}


def base_shapes(decoder: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of the base model, in the order of the network."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (decoder.vocab_size, decoder.hidden_size)}
    for layer in range(decoder.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(decoder).items()}
    shapes["model.norm.weight"] = (decoder.hidden_size,)
    shapes["lm_head.weight"] = (decoder.vocab_size, decoder.hidden_size)
    return shapes


def adapter_shapes(decoder: DecoderConfig, adapter: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every LoRA factor."""
    shapes: dict[str, tuple[int, ...]] = {}
    in_layer = layer_shapes(decoder)
    for layer in range(decoder.num_hidden_layers):
        for linear in adapter.linears:
            rows, columns = in_layer[f"{linear}.weight"]
            module = f"{ADAPTER_PREFIX}model.layers.{layer}.{linear}"
            shapes[f"{module}.lora_A.weight"] = (adapter.r, columns)
            shapes[f"{module}.lora_B.weight"] = (rows, adapter.r)
    return shapes


def projector_shapes(decoder: DecoderConfig, tower: TowerConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the projector's four tensors."""
    hidden = decoder.hidden_size
    shapes = {"0.weight": (hidden, tower.dim), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    return {PROJECTOR_PREFIX + name: shape for name, shape in shapes.items()}


def trunk_shapes(tower: TowerConfig, *, num_blocks: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the trunk's tensors up to a number of blocks."""
    dim, mlp_dim = tower.dim, tower.mlp_dim
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + tower.num_patches, dim),
        "patch_embed.proj.weight": (dim, 3, tower.patch_size, tower.patch_size),
        "patch_embed.proj.bias": (dim,),
    }
    in_block: dict[str, tuple[int, ...]] = {}
    linears = {
        "attn.qkv": (3 * dim, dim),
        "attn.proj": (dim, dim),
        "mlp.fc1": (mlp_dim, dim),
        "mlp.fc2": (dim, mlp_dim),
    }
    for linear, (rows, columns) in linears.items():
        in_block |= {f"{linear}.weight": (rows, columns), f"{linear}.bias": (rows,)}
    vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")
    in_block |= dict.fromkeys(vectors, (dim,))
    for block in range(num_blocks):
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in in_block.items()}
    return shapes


def _require_folders(checkpoint: Path, base: Path) -> None:
    for option, folder in (("--checkpoint", checkpoint), ("--base", base)):
        if not folder.is_dir():
            got = "a file" if folder.exists() else "a path that does not exist"
            raise CheckpointError(f"{option} {folder}: got {got} · expected a folder · check the path")
        if not (folder / "config.json").exists() and (folder / "snapshots").is_dir():
            msg = (
                f"{option} {folder}: got a Hugging Face cache entry · expected the folder with the files · "
                f"give one of {folder / 'snapshots'}/*"
            )
            raise CheckpointError(msg)
    if (base / "adapter_config.json").exists() and not (checkpoint / "adapter_config.json").exists():
        msg = (
            f"--checkpoint {checkpoint}: got no adapter_config.json, while --base {base} has one · expected the LoRA "
            "in --checkpoint and the plain Llama in --base · the two look swapped"
        )
        raise CheckpointError(msg)


def _notice(file: Path) -> str | None:
    """Read a short text beside the weights that every reader of the findings should see."""
    if not file.is_file():
        return None
    try:
        text = " ".join(file.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{file}: got something unreadable ({error}) · expected a short text · correct or remove it"
        raise CheckpointError(msg) from error
    if not 0 < len(text) <= MAX_NOTICE_CHARS:
        msg = f"{file}: got {len(text)} characters · expected 1 to {MAX_NOTICE_CHARS} · shorten or remove it"
        raise CheckpointError(msg)
    return text


def _model_name(checkpoint: Path) -> str:
    """Return the folder's name, or the repository's where the folder is a snapshot in the Hugging Face cache."""
    folder = checkpoint.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def _check_llava_config(llava: dict[str, Any], where: Path) -> None:
    _refuse_quantised(llava, where)
    for name, (wanted, why) in _LLAVA_REQUIRED.items():
        if llava.get(name, wanted if isinstance(wanted, bool) else None) != wanted:
            raise CheckpointError(f"{where}: got {name}={llava.get(name)!r} · expected {wanted!r} · {why}")
    select_layer = llava.get("mm_vision_select_layer")
    if type(select_layer) is not int or select_layer > -2:
        msg = f"{where}: got mm_vision_select_layer={select_layer!r} · expected -2, as published, or a lower one"
        raise CheckpointError(f"{msg} · other choices are not implemented")


def _refuse_quantised(config: dict[str, Any], where: Path) -> None:
    if config.get("quantization_config"):
        msg = (
            f"{where}: got a quantization_config · expected 16-bit weights · if the weights are the original download, "
            "the entry is stale: delete it from the file; if they are quantised, download the original"
        )
        raise CheckpointError(msg)


def _decoder_config(
    llava: dict[str, Any], checkpoint: Path, base_config: dict[str, Any], base: Path, adapter: AdapterConfig
) -> DecoderConfig:
    where = base / "config.json"
    _refuse_quantised(base_config, where)
    if base_config.get("model_type") == "llava":
        msg = f"{where}: got model_type 'llava' · expected 'llama' · --base is the language model it was trained from"
        raise CheckpointError(f"{msg}, {adapter.base_model_name_or_path}")
    try:
        decoder = DecoderConfig.from_hf(base_config, where=str(where))
        # LLaVA's config repeats the decoder's fields; a difference means another base model.
        theirs = DecoderConfig.from_hf({**llava, "model_type": "llama"}, where=str(checkpoint / "config.json"))
    except ArtifactError as error:
        raise CheckpointError(str(error).replace("export the artifact again", "fetch the file again")) from error
    for name in _SAME_IN_BASE:
        if getattr(decoder, name) != getattr(theirs, name):
            msg = (
                f"{where}: got {name}={getattr(decoder, name)} · expected {getattr(theirs, name)}, as in "
                f"{checkpoint / 'config.json'} · use the base model the adapter was trained on: "
                f"{adapter.base_model_name_or_path}"
            )
            raise CheckpointError(msg)
    if decoder.tie_word_embeddings:
        raise CheckpointError(
            f"{where}: got tie_word_embeddings=true · expected false · tied heads are not implemented"
        )
    return decoder


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
    towers = [
        path
        for path in others
        if not path.name.endswith(".index.json") and "vision_cfg" in read_json(path, what="json")
    ]
    if len(towers) != 1:
        msg = (
            f"{checkpoint}: got {named!r} named in config.json but not there, and {len(towers)} other json files with "
            f"a vision_cfg{': ' + ', '.join(p.name for p in towers) if towers else ''} · expected exactly one · "
            "fetch biomedclipcxr_518.json, or remove the ones that are not this tower's"
        )
        raise CheckpointError(msg)
    return towers[0]


def _find_tower_checkpoint(checkpoint: Path, llava: dict[str, Any]) -> Path:
    name = plain_file_name(llava.get("mm_vision_tower_checkpoint"), where=f"{checkpoint / 'config.json'}")
    path = checkpoint / name
    if not path.is_file():
        msg = f"{path}: got no such file · expected the vision tower, an open_clip training checkpoint · fetch it"
        raise CheckpointError(msg)
    return path


def _open_trunk(file: Path) -> TensorFiles:
    """Index the trunk inside an open_clip training checkpoint; everything else in it must be known."""
    what = "the vision tower"
    content = load_pickle(file, what=what)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        msg = f"{file}: got no state_dict · expected an open_clip training checkpoint · fetch the file again"
        raise CheckpointError(msg)
    for key, value in content.items():
        if key not in {"state_dict", *_TRAINING_EXTRAS} and not isinstance(
            value, str | int | float | np.generic | None
        ):
            msg = (
                f"{file}: got an entry {key!r} of type {type(value).__name__} · expected state_dict and training state"
            )
            raise CheckpointError(f"{msg} · check that this is the right file")
    entries = entries_of(file, state, group="state_dict")
    known = [re.compile(pattern) for pattern in UNNEEDED_TOWER]
    trunk = {}
    for name, entry in entries.items():
        if name.startswith(TRUNK_PREFIX):
            trunk[name.removeprefix(TRUNK_PREFIX)] = entry
        elif not any(pattern.fullmatch(name) for pattern in known):
            msg = f"{file}: got the tensor {name!r}, which this exporter does not know · expected {TRUNK_PREFIX}*"
            raise CheckpointError(f"{msg} and the text tower · check that this is the right model")
    return TensorFiles(trunk, what=what)


def _tower_config(
    tower_json: Path, trunk: TensorFiles, tower_file: Path, select_layer: int
) -> tuple[TowerConfig, Preprocessing]:
    config = read_json(tower_json, what="the tower's configuration")
    vision = config.get("vision_cfg")
    timm_name = vision.get("timm_model_name") if isinstance(vision, dict) else None
    image_size = vision.get("image_size") if isinstance(vision, dict) else None
    if not isinstance(timm_name, str) or "dinov2" not in timm_name or "reg" in timm_name or type(image_size) is not int:
        msg = (
            f"{tower_json}: got timm_model_name={timm_name!r} image_size={image_size!r} · expected a DINOv2 ViT "
            "without registers and a size in pixels · other towers are not implemented"
        )
        raise CheckpointError(msg)
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
        msg = (
            f"{tower_file}: got dim {tower.dim}, {depth} blocks, patch {tower.patch_size} for {image_size=} and select "
            f"layer {select_layer} · expected heads of {VIT_HEAD_DIM}, whole patches and a block to select · "
            f"{tower_json.name} belongs to another tower"
        )
        raise CheckpointError(msg)
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


def _check_tokenizer(tokenizer: Path, vocab_size: int) -> None:
    import sentencepiece

    if not tokenizer.is_file():
        msg = f"{tokenizer}: got no such file · expected the base model's SentencePiece model · fetch it"
        raise CheckpointError(msg)
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).get_piece_size()
    except (RuntimeError, OSError) as error:
        msg = (
            f"{tokenizer}: got a file SentencePiece cannot read ({error}) · expected a tokenizer.model · fetch it again"
        )
        raise CheckpointError(msg) from error
    if pieces != vocab_size:
        msg = (
            f"{tokenizer}: got {pieces} pieces · expected {vocab_size}, as vocab_size in config.json · "
            "take tokenizer.model from the same download as the weights"
        )
        raise CheckpointError(msg)
