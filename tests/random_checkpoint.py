"""A tiny random model in the published layout, with grouped queries, made once per test run."""

from __future__ import annotations

import functools
import io
import json
from typing import TYPE_CHECKING, Any

import sentencepiece
import torch

from benchmarks.phantom.publish import publish, random_weights
from benchmarks.speed.weights import Shapes
from lite.config import PromptTemplate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

IMAGE_SIZE = 42
DIM = 128
DEPTH = 3
SCALE_SIGMA = 0.6
SEED = 5
LAYERS = 2
# Widths of a small synthetic checkpoint.
SMALL = Shapes(
    hidden_size=256,
    intermediate_size=688,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=1200,
    max_position_embeddings=512,
    lora_rank=8,
    image_size=42,
    tower_dim=128,
    tower_depth=3,
)


@functools.cache
def tokenizer_model() -> bytes:
    template = PromptTemplate()
    texts = [template.conversation, template.question_with_reason, template.question_without_reason]
    texts += ["The lungs are clear. No pleural effusion or pneumothorax.", "Heart size is normal."] * 5
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def llama_config() -> dict[str, Any]:
    return {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model()).get_piece_size(),
    }


@functools.cache
def weights() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return (trunk, projector, llama) before channel scales, LoRA and rounding."""
    return random_weights(llama_config(), image_size=IMAGE_SIZE, dim=DIM, depth=DEPTH, seed=SEED)


def write(out: Path, **changes: Any) -> tuple[Path, Path]:
    """Publish it; return (checkpoint, base)."""
    trunk, projector, llama = weights()
    settings: dict[str, Any] = {"scale_sigma": SCALE_SIGMA, "seed": SEED, **changes}
    publish(
        out,
        trunk=trunk,
        projector=projector,
        llama=llama,
        llama_config=llama_config(),
        image_size=IMAGE_SIZE,
        tokenizer_model=tokenizer_model(),
        **settings,
    )
    return out / "llava-rad-phantom", out / "base"


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON object; None removes."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            content.pop(key, None)
        else:
            content[key] = value
    file.write_text(json.dumps(content))


def edit_tensors(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the tensors of a pickled file, or of its state_dict."""
    content = load(file)
    if "state_dict" in content:
        content["state_dict"] = change(content["state_dict"])
    else:
        content = change(content)
    torch.save(content, file)


def load(file: Path) -> Any:
    return torch.load(file, weights_only=False)
