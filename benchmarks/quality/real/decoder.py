"""A decoder with trained weights, read a layer at a time: what it is here, and one in a Hugging Face folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from export.source.checkpoint import UNNEEDED_BASE
from export.source.shapes import base_shapes, layer_shapes
from export.source.tensors import open_tensors, read_json
from lite.config import DecoderConfig
from lite.errors import ArtifactError, BackendUnavailable, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_WEIGHTS: Final = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model")
HEAD: Final = "lm_head.weight"
EMBEDDINGS: Final = "model.embed_tokens.weight"
FINAL_NORM: Final = "model.norm.weight"


class RealDecoder(Protocol):
    """A plain Llama decoder and its tokenizer. All tensors are float32, on the CPU."""

    name: str
    config: DecoderConfig

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """Read a layer, under the names that `export.quantize.layerwise.LayerQuantizer` wants."""

    def read(self, name: str) -> Tensor:
        """Read `EMBEDDINGS` [V, C], `FINAL_NORM` [C] or `HEAD` [V, C]; a tied head is the embeddings."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """What its tokenizer puts before a text: BOS, or nothing."""

    def encode(self, text: str) -> list[int]:
        """Return a text's token ids, without BOS and EOS."""

    def save_tokenizer(self, folder: Path) -> None:
        """Write its tokenizer as transformers reads it."""


class Words:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401 - transformers' has no types
        self._tokenizer = tokenizer

    @property
    def prefix(self) -> tuple[int, ...]:
        """See `RealDecoder.prefix`."""
        bos = self._tokenizer.bos_token_id
        return (bos,) if bos is not None and self._tokenizer("").input_ids[:1] == [bos] else ()

    def encode(self, text: str) -> list[int]:
        """See `RealDecoder.encode`. A document is longer than the decoder's context; that is no reason to warn."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def save_tokenizer(self, folder: Path) -> None:
        """See `RealDecoder.save_tokenizer`."""
        self._tokenizer.save_pretrained(folder)


def load_tokenizer(folder: Path, **options: Any) -> Any:  # noqa: ANN401 - transformers' has no types
    """Load a tokenizer from a folder by transformers, without a look at any hub.

    Raises:
        BackendUnavailable: transformers is not installed.
        CheckpointError: there is none that it can read.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        msg = f'got no transformers ({error}) · expected it to tokenise with · pip install "llava-rad-lite[real]"'
        raise BackendUnavailable(msg) from error
    load: Any = AutoTokenizer.from_pretrained
    try:
        return load(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        msg = f"{folder}: got a tokenizer that transformers cannot read ({reason}) · expected that of a Llama"
        raise CheckpointError(f"{msg} · fetch the folder again") from error


class LlamaFolder(Words):
    """A Hugging Face folder of a plain Llama in safetensors: config.json, weights, tokenizer."""

    def __init__(self, folder: Path) -> None:
        """Open a folder: its configuration is read, its tensors' names and shapes are checked.

        Raises:
            CheckpointError: it is no such folder, or its decoder is not a plain Llama in 16 or 32 bit.
            BackendUnavailable: transformers is not installed.
        """
        _require_files(folder)
        self.name = folder.resolve().name
        self.config = _read_config(folder / "config.json")
        self._tensors = open_tensors(folder, "model", what="the decoder")
        expected = base_shapes(self.config)
        tied = self.config.tie_word_embeddings
        if tied:
            del expected[HEAD]
        self._tensors.require(expected, unneeded=(*UNNEEDED_BASE, *([HEAD.replace(".", r"\.")] if tied else ())))
        super().__init__(load_tokenizer(folder))

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """See `RealDecoder.read_layer`."""
        prefix = f"model.layers.{index}."
        found = self._tensors.read([prefix + name for name in layer_shapes(self.config)])
        return {name.removeprefix(prefix): tensor.float() for name, tensor in found.items()}

    def read(self, name: str) -> Tensor:
        """See `RealDecoder.read`."""
        name = EMBEDDINGS if name == HEAD and self.config.tie_word_embeddings else name
        return self._tensors.read([name])[name].float()


def _require_files(folder: Path) -> None:
    if not folder.is_dir():
        got = "a file" if folder.exists() else "a path that does not exist"
        raise CheckpointError(f"{folder}: got {got} · expected the folder of a Hugging Face Llama · check the path")
    for names, what in (
        (("config.json",), "its configuration"),
        (_WEIGHTS, "its weights in safetensors (pickles are not read)"),
        (_TOKENIZERS, "its tokenizer"),
    ):
        if not any((folder / name).is_file() for name in names):
            msg = f"{folder}: got no {' or '.join(names)} · expected {what} · fetch the folder whole, in this form"
            raise CheckpointError(msg)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        msg = f"{folder}: got tokenizer.model alone · expected tokenizer_config.json beside it, which says what goes "
        raise CheckpointError(f"{msg}before a text · fetch that, too")


def _read_config(file: Path) -> DecoderConfig:
    config = read_json(file, what="the decoder's configuration")
    if config.get("quantization_config"):
        msg = f"{file}: got a quantization_config · expected 16-bit weights: what rounding loses is measured from them"
        raise CheckpointError(f"{msg} · take the original")
    try:
        return DecoderConfig.from_hf(config, where=str(file))
    except ArtifactError as error:
        raise CheckpointError(str(error).replace("export the artifact again", "take a plain Llama")) from error


def write_folder(decoder: RealDecoder, folder: Path) -> None:
    """Write a decoder as a Hugging Face folder of float32, a shard a layer, its head tied or not as it is."""
    from safetensors.torch import save_file

    config = decoder.config
    written: dict[str, str] = {}
    num_shards = config.num_hidden_layers + 1

    def save(number: int, tensors: Mapping[str, Tensor]) -> None:
        shard = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / shard, {"format": "pt"})
        written.update(dict.fromkeys(tensors, shard))

    ends: Sequence[str] = (EMBEDDINGS, FINAL_NORM, *(() if config.tie_word_embeddings else (HEAD,)))
    save(1, {name: decoder.read(name) for name in ends})
    for index in range(config.num_hidden_layers):
        layer = decoder.read_layer(index)
        save(index + 2, {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()})
    index_file = {"metadata": {}, "weight_map": written}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(_config_json(config)), encoding="utf-8")
    decoder.save_tokenizer(folder)


def _config_json(config: DecoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float32",
    }
