"""What retrieval needs of a checkpoint, and findings do not: the text tower, the heads, and the tower's end.

    module.text.transformer.*            BERT, whose CLS of the last hidden state is read
    module.text.proj.{0,2}.weight        Linear, GELU, Linear, without bias
    module.visual.trunk.blocks.11, norm  what `mm_vision_select_layer` -2 leaves out
    module.visual.head.proj.weight       Linear, without bias

Not used, and known: BERT's pooler, which this model's text tower has not; its `position_ids`, which are 0, 1, 2 …; and
`logit_scale`, by which all cosines are multiplied alike.

    --text-vocab DIR
      config.json   of the BERT: heads, and shapes that have to be those of the weights
      vocab.txt     its WordPiece
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from export.source.tensors import TensorFiles, read_json
from export.source.tower import trunk_shapes
from lite.config import from_json
from lite.errors import ArtifactError, CheckpointError
from lite.retrieval.wordpiece import WordPiece

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from export.source.tower import Tower

TEXT_PREFIX: Final = "text.transformer."
HEAD_NAME: Final = "visual.head.proj.weight"
VOCABULARY_NAME: Final = "vocab.txt"
UNNEEDED_RETRIEVAL: Final = (
    r"text\.transformer\.pooler\..*",
    r"text\.transformer\.embeddings\.position_ids",
    r"logit_(scale|bias)",
)
# Settings that change what a BERT computes, and the only value that is implemented.
_BERT_REQUIRED: Final[dict[str, Any]] = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "pad_token_id": 0,
    "is_decoder": False,
    "add_cross_attention": False,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BertShape:
    """The shape of the text tower, under the names `config.json` uses, and of what is behind it."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    dim: int  # of an embedding
    proj_dim: int  # between the two linears
    max_tokens: int  # what a text is cut to


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalSource:
    """The towers of retrieval in a source checkpoint: indexed and checked, weights not yet read."""

    bert: BertShape
    trunk: TensorFiles
    others: TensorFiles
    film_names: tuple[str, ...]  # of the trunk: what findings leave out
    vocabulary: Path
    files: dict[str, Path]  # what was read beside the checkpoint, under "text/..."

    def read_film(self) -> dict[str, Tensor]:
        """Read the end of the film's tower under timm's names, and the head as `head.proj.weight`."""
        head = self.others.read([HEAD_NAME])[HEAD_NAME]
        return self.trunk.read(self.film_names) | {"head.proj.weight": head}

    def read_text(self) -> dict[str, Tensor]:
        """Read the text tower under BERT's own names, and what is behind it as `proj.0.weight`, `proj.2.weight`."""
        tensors = self.others.read(text_shapes(self.bert))
        return {name.removeprefix(TEXT_PREFIX).removeprefix("text."): tensor for name, tensor in tensors.items()}


def open_retrieval(tower: Tower, text_vocab: Path) -> RetrievalSource:
    """Find the towers of retrieval in an open tower checkpoint, and check them, without reading their weights.

    Args:
        tower: From `open_tower`.
        text_vocab: The folder with the BERT's vocab.txt and config.json.

    Raises:
        CheckpointError: A tensor or a file is missing or not what it should be, or they are of different models.
        BackendUnavailable: `tokenizers` is not installed.
    """
    if not text_vocab.is_dir():
        msg = f"--text-vocab {text_vocab}: got no such folder · expected one with vocab.txt and config.json"
        raise CheckpointError(f"{msg} of the BERT that {tower.files[0].name} names · fetch both")
    bert = _bert_shape(tower, text_vocab / "config.json")
    whole = trunk_shapes(dataclasses.replace(tower.config, num_blocks=tower.config.depth))
    whole |= {"norm.weight": (tower.config.dim,), "norm.bias": (tower.config.dim,)}
    tower.trunk.require(whole, unneeded=("mask_token",))
    head = {HEAD_NAME: (bert.dim, tower.config.dim)}
    tower.others.require(text_shapes(bert) | head, unneeded=UNNEEDED_RETRIEVAL)
    vocabulary = text_vocab / VOCABULARY_NAME
    try:
        WordPiece(vocabulary, vocab_size=bert.vocab_size, max_tokens=bert.max_tokens)
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error
    return RetrievalSource(
        bert=bert,
        trunk=tower.trunk,
        others=tower.others,
        film_names=tuple(name for name in whole if name not in trunk_shapes(tower.config)),
        vocabulary=vocabulary,
        files={f"text/{name}": text_vocab / name for name in (VOCABULARY_NAME, "config.json")},
    )


def text_shapes(bert: BertShape) -> dict[str, tuple[int, ...]]:
    """Return name, without "module.", and shape of the text tower's tensors that are run."""
    dim, inner = bert.hidden_size, bert.intermediate_size
    tables = {"word": bert.vocab_size, "position": bert.max_position_embeddings, "token_type": bert.type_vocab_size}
    shapes: dict[str, tuple[int, ...]] = {
        f"{TEXT_PREFIX}embeddings.{name}_embeddings.weight": (rows, dim) for name, rows in tables.items()
    }
    norms = [f"{TEXT_PREFIX}embeddings.LayerNorm"]
    linears = {f"attention.self.{name}": (dim, dim) for name in ("query", "key", "value")}
    linears |= {"attention.output.dense": (dim, dim), "intermediate.dense": (inner, dim), "output.dense": (dim, inner)}
    for layer in range(bert.num_hidden_layers):
        prefix = f"{TEXT_PREFIX}encoder.layer.{layer}."
        for name, shape in linears.items():
            shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
        norms += [f"{prefix}attention.output.LayerNorm", f"{prefix}output.LayerNorm"]
    for norm in norms:
        shapes |= {f"{norm}.{kind}": (dim,) for kind in ("weight", "bias")}
    return shapes | {"text.proj.0.weight": (bert.proj_dim, dim), "text.proj.2.weight": (bert.dim, bert.proj_dim)}


def _bert_shape(tower: Tower, file: Path) -> BertShape:
    config, described = read_json(file, what="the BERT's configuration"), read_json(tower.files[0], what="the tower's")
    for name, wanted in _BERT_REQUIRED.items():
        if config.get(name, wanted) != wanted:
            msg = f"{file}: got {name}={config[name]!r} · expected {wanted!r}, as an uncased BERT has"
            raise CheckpointError(f"{msg} · others are not implemented")
    text, proj = described.get("text_cfg"), tower.others.entries.get("text.proj.0.weight")
    values = {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "dim": described.get("embed_dim")}
    values |= {field.name: config[field.name] for field in dataclasses.fields(BertShape) if field.name in config}
    values["max_tokens"] = text.get("context_length", 256) if isinstance(text, dict) else 256
    values["proj_dim"] = proj.shape[0] if proj is not None and proj.shape else 1  # compared with the tensors' shapes
    try:
        bert = from_json(BertShape, values, where=str(file))
    except ArtifactError as error:
        raise CheckpointError(str(error).replace("export it again", "fetch it again")) from error
    fits = min(value for value in dataclasses.astuple(bert) if type(value) is int) > 0 and 0 < bert.layer_norm_eps < 1
    if not fits or bert.hidden_size % bert.num_attention_heads or bert.max_tokens > bert.max_position_embeddings:
        raise CheckpointError(
            f"{file}: got {bert} · expected whole numbers from 1, heads of equal width, and positions for max_tokens · "
            f"take config.json of the BERT that {tower.files[0].name} names"
        )
    return bert
