"""A tiny random Llama as a Hugging Face folder, its tokenizer with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tiny import random_llama, tiny_llama_config

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True}


def write_llama(folder: Path, tokenizer_model: bytes, *, shards: int = 1, **changes: Any) -> Path:
    """Write a random Llama as a Hugging Face folder, with the tests' tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_llama_config(420, **{**SHAPE, **changes})
    tensors = random_llama(config)
    names = sorted(tensors)
    by_shard = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        for shard, inside in by_shard.items():
            save_file({name: tensors[name] for name in inside}, folder / shard)
        weight_map = {name: shard for shard, inside in by_shard.items() for name in inside}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    words = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder
