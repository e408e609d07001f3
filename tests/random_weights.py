"""Random weights in GPTQ, whose products with values of order 1 are of order 1."""

from __future__ import annotations

import torch

from kernels.gptq import GptqWeight, to_tensors


def random_integers(bits: int, N: int, K: int, group_size: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [N, K], with both ends of their range at the ends of the weight, and scales float16 [N, groups].

    The scales are of either sign.
    """
    generator, half = torch.Generator().manual_seed(seed), 1 << (bits - 1)
    values = torch.randint(-half, half, (N, K), generator=generator)
    values[0, 0], values[-1, -1] = -half, half - 1
    scales = (torch.rand(N, K // group_size, generator=generator) + 0.5) / half / K**0.5
    signs = torch.randint(0, 2, scales.shape, generator=generator) * 2 - 1
    return values, (scales * signs).half()


def of_either_sign(
    values: torch.Tensor, scales: torch.Tensor, bits: int, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the sign of about half of the scales [N, groups], and that of their integers [N, K]: the same weight.

    A group that has the lowest integer, whose opposite there is not, stays as it is.
    """
    groups = values.unflatten(1, (scales.shape[1], -1))
    signs = torch.randint(0, 2, scales.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    signs[groups.amin(-1) == -(1 << (bits - 1))] = 1
    return (groups * signs.unsqueeze(-1)).flatten(1), scales * signs


def random_gptq(bits: int, N: int, K: int, group_size: int, *, seed: int = 0) -> GptqWeight:
    values, scales = random_integers(bits, N, K, group_size, seed=seed)
    return GptqWeight.from_tensors(to_tensors(values, scales, bits=bits), bits=bits)
