"""What rounding loses on decoders that are not LLaVA-Rad's, on a tiny random Llama in a Hugging Face folder.

The decoder with trained weights is measured where the extra `real` and its package are installed: with --full.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import random_llama, tiny_llama_config

from benchmarks.quality.command import INTEROP_PYTHON, main
from benchmarks.quality.real import texts
from benchmarks.quality.real.decoder import EMBEDDINGS, FINAL_NORM, HEAD, LlamaFolder, write_folder
from benchmarks.quality.real.experiments import asymmetric, eight_bits, low_rank, worst
from benchmarks.quality.real.measure import Judge, Judged, Row, kl_ratio, measure
from benchmarks.quality.real.peer import peers
from benchmarks.quality.real.rounding import Plain, RoundedLayer, Setup, Way
from benchmarks.quality.real.rows import DEFAULT, ways
from benchmarks.quality.real.smollm2 import GgufLlama, carried_file, halves_apart
from benchmarks.quality.real.table import format_table
from benchmarks.quality.recipes import TRICKS
from export.quantize.gptq import Grid, gptq, relative_error
from export.settings import GptqSettings
from lite.errors import BackendUnavailable, CheckpointError, LiteError
from lite.eval.divergence import StudyDivergence

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
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    words = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Path:
    """A random Llama with a tied head, in two shards. Read only."""
    return write_llama(tmp_path_factory.mktemp("real") / "llama", tokenizer_model, shards=2)
