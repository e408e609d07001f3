"""Is a decoder right? Its logits beside plain float32, and captured steps beside launched ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from benchmarks.speed.gpu import model
from lite.config import IMAGE_TOKEN_ID

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from benchmarks.speed.gpu.rig import Rig
    from lite.artifact.parts import CacheDtype
    from lite.engines.torch_engine.decoder import LlamaDecoder

LAYERS: Final = 2
"""As many are computed plainly."""
TOKENS: Final = 64
ALLOWED: Final = {"float16": 0.01, "int8 cache": 0.03, "4 bits": 0.35}
"""Root mean square of a difference between logits, relative. float16: activations and weights are rounded to 11 bits at
some ten places a layer. An int8 cache rounds to 7 bits. 4 bits: a peer rounds our weights once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the first layers of a decoder should say."""

    input_ids: list[int]
    logits: Tensor  # [2, vocab_size], behind all but the last token, and behind that


@torch.inference_mode()
def expected_logits(decoder: LlamaDecoder) -> Expected:
    """Compute the first layers of one of our decoders plainly."""
    part = model.part_of(decoder, layers=min(LAYERS, decoder.config.num_hidden_layers))
    generator = torch.Generator().manual_seed(1)
    count = min(TOKENS, decoder.config.max_position_embeddings)
    ids = torch.randint(decoder.config.vocab_size, (count,), generator=generator).tolist()
    return Expected(input_ids=ids, logits=model.plain_logits(part, part.embed(ids))[-2:])


@torch.inference_mode()
def logits_of(decoder: LlamaDecoder, input_ids: Sequence[int], rows: int) -> Tensor:
    """Return logits as `Expected` has them, by prefill and decode_one_token: [rows, 2, vocab_size]."""
    cache = decoder.new_cache(rows, len(input_ids))
    # The first token takes the place of the image.
    features, prompt = decoder.embed(input_ids[:1]), [IMAGE_TOKEN_ID, *input_ids[1:-1]]
    behind_prompt = [decoder.prefill(prompt, features, cache, row).float().clone() for row in range(rows)]
    for _ in range(2):  # the second one is a captured one, where steps are captured
        model.rewind(cache, len(input_ids) - 1)
        decoded = decoder.decode_one_token(cache, [input_ids[-1]] * rows).float()
    return torch.stack((torch.cat(behind_prompt), decoded), dim=1)


def difference(got: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference, relative, of the worst of all logits [..., vocab_size].

    What is not finite is infinitely far away.
    """
    expected = expected.to(got.device)
    far = (got - expected).square().mean(-1).sqrt() / expected.square().mean(-1).sqrt()
    return float(far.nan_to_num(nan=math.inf).max())


def check_graphs(rig: Rig, decoder: LlamaDecoder, cache_dtype: CacheDtype | None) -> str | None:
    """Say in how far captured and launched steps decode differently at full depth; None if they do not."""
    setting = rig.setting
    prompt = model.random_prompt(decoder.config, setting.prompt_tokens, rig.device)
    found = []
    for capture in (None, rig.capture):
        part = model.part_of(decoder, cache_dtype=cache_dtype, capture=capture)
        token_ids, problem = model.greedy(part, prompt, setting.checked_tokens)
        if problem is not None:
            return f"not captured in a CUDA graph: {problem}"
        if min(token_ids) < 0:
            return "logits that are not finite"
        found.append(token_ids)
    launched, captured = found
    if launched == captured:
        return None
    first = next(i for i, pair in enumerate(zip(launched, captured, strict=True)) if pair[0] != pair[1])
    return f"captured steps decode other tokens than launched ones, from token {first} on"
