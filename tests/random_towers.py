"""Random towers of retrieval in the published keys, put into a checkpoint, and the BERT's two small files."""

from __future__ import annotations

import json
import string
from typing import TYPE_CHECKING, Any

import random_checkpoint
import torch

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

EMBED_DIM, PROJ_DIM, CONTEXT = 48, 56, 256
BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
WORDS = ("left", "right", "pleural", "effusion", "lungs", "are", "clear", "no", "##es", "##ion", "##ly", "heart", "中")


def pieces() -> list[str]:
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    within = [f"##{c}" for c in (*string.ascii_lowercase, *string.digits)]
    return ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *within, *WORDS]


def bert_folder(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces()), encoding="utf-8")
    config = BERT | {"vocab_size": len(pieces())} | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def bert_state(seed: int = 7) -> dict[str, Tensor]:
    """Return transformers' own BERT with random weights, outliers in a few channels as trained ones have."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    model = BertModel(BertConfig(vocab_size=len(pieces()), **{k: v for k, v in BERT.items() if k != "architectures"}))
    state: dict[str, Tensor] = model.state_dict()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.ndim:
            noise = torch.randn(tensor.shape, generator=generator)
            state[name] = tensor + noise * (0.1 if "Norm" in name or name.endswith("bias") else 0.12)
    return state


def others(seed: int = 7) -> dict[str, Tensor]:
    """Return all that is beside the trunk: what is run, and what a real checkpoint may have and nobody needs."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        drawn: Tensor = torch.randn(shape, generator=generator) * float(shape[-1]) ** -0.5
        return drawn

    named = {f"text.transformer.{name}": tensor for name, tensor in bert_state(seed).items()}
    named["text.transformer.embeddings.position_ids"] = torch.arange(512)[None]
    return named | {
        "text.proj.0.weight": random(PROJ_DIM, BERT["hidden_size"]),
        "text.proj.2.weight": random(EMBED_DIM, PROJ_DIM),
        "visual.head.proj.weight": random(EMBED_DIM, random_checkpoint.DIM),
        "logit_scale": torch.tensor(4.6),
    }


def add_towers(checkpoint: Path) -> None:
    """Put them into a random checkpoint, with a last block and a norm of their own."""
    generator = torch.Generator().manual_seed(3)

    def change(state: dict[str, Any]) -> dict[str, Any]:
        kept = {name: tensor for name, tensor in state.items() if name.startswith("module.visual.trunk.")}
        for name in list(kept):
            last = f".blocks.{random_checkpoint.DEPTH - 1}." in name or name.startswith("module.visual.trunk.norm.")
            if last:
                kept[name] = kept[name] + 0.05 * torch.randn(kept[name].shape, generator=generator)
        return kept | {f"module.{name}": tensor for name, tensor in others().items()}

    random_checkpoint.edit_tensors(checkpoint / "biomedclipcxr_42_checkpoint.pt", change)
    random_checkpoint.edit_json(checkpoint / "biomedclipcxr_42.json", embed_dim=EMBED_DIM)
