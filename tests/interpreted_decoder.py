"""Decode three studies with a decoder, and print what came of it: the other process of test_decoder_interpreted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from driving import decode_token, newest_of, read_prompt
from tiny import PROMPTS, VOCAB_SIZE, decoder_folder, features, gptq_llama, tiny_llama_config

from kernels.quant_weight import QuantWeight
from lite.artifact.parts import CacheDtype
from lite.engines.torch_engine.linear import linears_of
from lite.engines.torch_engine.load import load_decoder

STEPS = 2
SETTINGS: dict[str, tuple[str, CacheDtype | None]] = {"float16": ("float16", None), "int8": ("float32", "int8")}


def decode(folder: Path, dtype: str, cache_dtype: CacheDtype | None) -> dict[str, Any]:
    """Prefill three rows, decode some tokens, release the first row and give it to the second study too."""
    config, tensors = gptq_llama(tiny_llama_config(VOCAB_SIZE))
    decoder = load_decoder(decoder_folder(folder, config, tensors), device="cpu", dtype=dtype, cache_dtype=cache_dtype)
    cache = decoder.new_cache(3, 32)
    logits, tokens = [], []

    def note(rows: torch.Tensor) -> None:
        logits.append(rows.float().tolist())
        newest = newest_of(cache)
        tokens.append(
            [token_id if count else None for token_id, count in zip(newest, cache.num_cached_tokens, strict=True)]
        )

    for row, (input_ids, image) in enumerate(zip(PROMPTS, features(3), strict=True)):
        note(read_prompt(decoder, input_ids, image, cache, row))
    for _ in range(STEPS):
        note(decode_token(decoder, cache))
    cache.release(0)
    note(decode_token(decoder, cache)[1:])  # of a free row the logits mean nothing
    note(read_prompt(decoder, PROMPTS[1], features(3)[1], cache, 0))
    note(decode_token(decoder, cache))
    return {
        "backend": decoder.selection.backend,
        "shown": decoder.backend,
        "fallbacks": decoder.fallbacks,
        "tiled": [
            isinstance(weight, QuantWeight) for linear in linears_of(decoder).values() for weight in linear.weights
        ],
        "steps": sorted(cache.steps),
        "tokens": tokens,
        "logits": logits,
        "num_cached_tokens": cache.num_cached_tokens,
    }


if __name__ == "__main__":
    out = Path(sys.argv[1])
    found = {name: decode(out / f"interpreted-{name}", *settings) for name, settings in SETTINGS.items()}
    (out / "found.json").write_text(json.dumps(found))
