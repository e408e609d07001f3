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
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from export.source.adapter import PROJECTOR_PREFIX, AdapterSource, HasPairs, Together, open_adapter
from export.source.lora import AdapterConfig, LoraPair, merge
from export.source.retrieval import RetrievalSource, open_retrieval
from export.source.shapes import base_shapes, layer_shapes
from export.source.tensors import TensorFiles, open_tensors, read_json
from export.source.tower import TowerConfig, open_tower, trunk_shapes
from lite.config import DecoderConfig, DecodingDefaults, Preprocessing
from lite.errors import ArtifactError, CheckpointError
from lite.prompt import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

NOTICE_NAME: Final = "NOTICE"
MAX_NOTICE_CHARS: Final = 1000

UNNEEDED_BASE: Final = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

# LLaVA settings that change what the model computes, and the only value this exporter implements.
_LLAVA_REQUIRED: Final[dict[str, tuple[Any, str]]] = {
    "model_type": ("llava", "this is not a LLaVA checkpoint"),
    "mm_projector_type": ("mlp2x_gelu", "another projector computes something else"),
    "mm_vision_select_feature": ("patch", "features with the CLS token are not implemented"),
    "image_aspect_ratio": ("square", "padded or tiled images are not implemented"),
    "mm_use_im_start_end": (False, "it adds tokens to the vocabulary, which is not implemented"),
    "mm_use_im_patch_token": (False, "it adds a token to the vocabulary, which is not implemented"),
}
_MAY_DIFFER: Final = {"dtype", "quantization", "tie_word_embeddings"}
"""Of the decoder's fields, which LLaVA's config repeats: any other difference means another base model."""


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
    tower: TowerConfig
    preprocessing: Preprocessing
    base: TensorFiles
    adapter: AdapterSource
    projector: TensorFiles
    trunk: TensorFiles  # timm's names, without prefix
    tokenizer: Path
    notice: str | None  # what the folder's NOTICE says to whoever reads the findings; None without one
    files: dict[str, Path]  # every file that was read, under "checkpoint/...", "base/..." or "text/..."
    retrieval: RetrievalSource | None = None
    beside: HasPairs | None = None  # in the place of the published LoRA, where another one is meant

    def read_layer(self, index: int) -> SourceLayer:
        """Read one decoder layer, in the dtype it is stored in."""
        prefix = f"model.layers.{index}."
        names = [prefix + name for name in layer_shapes(self.decoder)]
        weights = {name.removeprefix(prefix): tensor for name, tensor in self.base.read(names).items()}
        return SourceLayer(weights=weights, lora=(self.beside or self.adapter).pairs(index))

    def read_part(self, part: int) -> dict[str, Tensor]:
        """Read the embeddings (part 0), layer `part - 1`, or the last norm and the head; in float32, LoRA merged."""
        layer = part - 1
        if 0 <= layer < self.decoder.num_hidden_layers:
            return {f"model.layers.{layer}.{name}": tensor for name, tensor in self.read_layer(layer).merged().items()}
        names = ["model.norm.weight", "lm_head.weight"] if part else ["model.embed_tokens.weight"]
        return {name: tensor.float() for name, tensor in self.base.read(names).items()}

    def apart(self) -> Checkpoint:
        """Return the checkpoint without its LoRA: the base alone, with tower and projector."""
        return dataclasses.replace(self, beside=Together(()))

    def read_base(self, name: str) -> Tensor:
        """Read one tensor of the base model: the embeddings, the final norm or the head."""
        return self.base.read([name])[name]

    def read_tower(self) -> dict[str, Tensor]:
        """Read the tensors of the tower that are run, and the projector's as `projector.0.weight` and so on."""
        tensors = self.trunk.read(trunk_shapes(self.tower))
        for name, tensor in self.projector.read(self.projector.entries).items():
            tensors[f"projector.{name.removeprefix(PROJECTOR_PREFIX)}"] = tensor
        return tensors


def open_checkpoint(
    checkpoint: Path, base: Path, *, other_base: bool = False, text_vocab: Path | None = None
) -> Checkpoint:
    """Open a LLaVA-Rad download and its base model's, and check them, without reading their weights.

    Args:
        checkpoint: Folder of the download.
        base: Folder of its base.
        other_base: Take a base whose name is not the one that the adapter asks for.
        text_vocab: Folder with vocab.txt and config.json of the text tower's BERT: open the towers of retrieval too.

    Raises:
        CheckpointError: A folder or file is not what it should be; the message says which, and what to do.
    """
    _require_folders(checkpoint, base)
    llava = read_json(checkpoint / "config.json", what="the LLaVA configuration")
    base_config = read_json(base / "config.json", what="the base model's configuration")
    adapter_file = checkpoint / "adapter_config.json"
    adapter_config = AdapterConfig.from_json(read_json(adapter_file, what="the LoRA"), where=str(adapter_file))
    if not other_base:
        _require_base(base, base_config, adapter_config)
    _check_llava_config(llava, checkpoint / "config.json")
    decoder = _decoder_config(llava, checkpoint, base_config, base, adapter_config)

    base_tensors = open_tensors(base, "pytorch_model", what="the base model")
    base_tensors.require(base_shapes(decoder), unneeded=UNNEEDED_BASE)
    tower = open_tower(checkpoint, llava)
    retrieval = None if text_vocab is None else open_retrieval(tower, text_vocab)
    adapter = open_adapter(checkpoint, decoder, projector_shapes(decoder, tower.config))
    projector = adapter.projector or open_tensors(checkpoint, "non_lora_trainables", what="the projector")

    tokenizer = base / "tokenizer.model"
    ids = {key: llava[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if type(llava.get(key)) is int}
    decoding = DecodingDefaults(**ids)
    _check_tokenizer(tokenizer, decoding, decoder.vocab_size)
    in_checkpoint = [checkpoint / "config.json", *tower.files, *adapter.files]
    notice = _notice(checkpoint / NOTICE_NAME)
    in_checkpoint += [checkpoint / NOTICE_NAME] if notice is not None else []
    files = {f"checkpoint/{file.name}": file for file in in_checkpoint}
    files |= {f"base/{file.name}": file for file in (base / "config.json", tokenizer, *base_tensors.files)}
    files |= retrieval.files if retrieval is not None else {}
    return Checkpoint(
        name=_model_name(checkpoint),
        decoder=decoder,
        decoding=decoding,
        tower=tower.config,
        preprocessing=tower.preprocessing,
        base=base_tensors,
        adapter=adapter,
        projector=projector,
        trunk=tower.trunk,
        tokenizer=tokenizer,
        notice=notice,
        files=dict(sorted(files.items())),
        retrieval=retrieval,
    )


def projector_shapes(decoder: DecoderConfig, tower: TowerConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the projector's four tensors."""
    hidden = decoder.hidden_size
    shapes = {"0.weight": (hidden, tower.dim), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    return {PROJECTOR_PREFIX + name: shape for name, shape in shapes.items()}


def _require_folders(checkpoint: Path, base: Path) -> None:
    for option, folder in (("--checkpoint", checkpoint), ("--base", base)):
        if not folder.is_dir():
            got = "a file" if folder.exists() else "a path that does not exist"
            raise CheckpointError(f"{option} {folder}: got {got} · expected a folder · check the path")
        if not (folder / "config.json").exists() and (folder / "snapshots").is_dir():
            msg = f"{option} {folder}: got a Hugging Face cache entry · expected the folder with the files"
            raise CheckpointError(f"{msg} · give one of {folder / 'snapshots'}/*")
    if (base / "adapter_config.json").exists() and not (checkpoint / "adapter_config.json").exists():
        msg = f"--checkpoint {checkpoint}: got no adapter_config.json, while --base {base} has one · expected the LoRA"
        raise CheckpointError(f"{msg} in --checkpoint and the plain Llama in --base · the two look swapped")


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
        raise CheckpointError(
            f"{where}: got a quantization_config · expected 16-bit weights · if the weights are the original download, "
            "the entry is stale: delete it from the file; if they are quantised, download the original"
        )


def _require_base(base: Path, config: dict[str, Any], adapter: AdapterConfig) -> None:
    """Tell the base by its own name or its folder's: another one of the same shape would be merged without a word."""
    own = str(config.get("_name_or_path") or "").rstrip("/").rpartition("/")[2]
    names = {own.lower(), base.resolve().name.lower()}
    if own and adapter.base_name and adapter.base_name.lower() not in names:
        raise CheckpointError(
            f"{base}: got a base that calls itself {own} · expected {adapter.base_model_name_or_path}, on which the "
            "adapter was trained · name that one, or give --other-base if it is the same under another name"
        )


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
        theirs = DecoderConfig.from_hf({**llava, "model_type": "llama"}, where=str(checkpoint / "config.json"))
    except ArtifactError as error:
        raise CheckpointError(str(error).replace("export the artifact again", "fetch the file again")) from error
    for name in {field.name for field in dataclasses.fields(decoder)} - _MAY_DIFFER:
        if getattr(decoder, name) != getattr(theirs, name):
            raise CheckpointError(
                f"{where}: got {name}={getattr(decoder, name)} · expected {getattr(theirs, name)}, as in "
                f"{checkpoint / 'config.json'} · use the base model the adapter was trained on: "
                f"{adapter.base_model_name_or_path}"
            )
    if decoder.tie_word_embeddings:
        raise CheckpointError(
            f"{where}: got tie_word_embeddings=true · expected false · tied heads are not implemented"
        )
    return decoder


def _check_tokenizer(tokenizer: Path, decoding: DecodingDefaults, vocab_size: int) -> None:
    try:
        pieces = Tokenizer(tokenizer, decoding).vocab_size
    except ArtifactError as error:
        said = str(error).replace("the manifest", "config.json").replace("export it again", "fetch it again")
        raise CheckpointError(said) from error
    if pieces != vocab_size:
        msg = f"{tokenizer}: got {pieces} pieces · expected {vocab_size}, as vocab_size in config.json"
        raise CheckpointError(f"{msg} · take tokenizer.model from the same download as the weights")
