"""Random weights in GPTQ, whose products with values of order 1 are of order 1."""

from __future__ import annotations

import torch

from kernels.gptq import GptqWeight, to_tensors


def random_integers(bits: int, N: int, K: int, group_size: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [N, K], with both ends of their range at the ends of the weight, and scales float16 [N, groups]."""
    generator, half = torch.Generator().manual_seed(seed), 1 << (bits - 1)
    values = torch.randint(-half, half, (N, K), generator=generator)
    values[0, 0], values[-1, -1] = -half, half - 1
    scales = (torch.rand(N, K // group_size, generator=generator) + 0.5) / half / K**0.5
    return values, scales.half()


def random_gptq(bits: int, N: int, K: int, group_size: int, *, seed: int = 0) -> GptqWeight:
    values, scales = random_integers(bits, N, K, group_size, seed=seed)
    return GptqWeight.from_tensors(to_tensors(values, scales, bits=bits), bits=bits)
