"""The choice of the next token of each row, and how probable it was: one launch, from logits to token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from kernels import reference
from kernels.backend import Backend, device_guard, require_backend
from kernels.checks import check_float, check_whole
from kernels.reference import Sampled

if TYPE_CHECKING:
    from torch import Tensor

MAX_VOCAB_SIZE: Final = 65536
"""Beyond it a row would no longer fit the registers of one program."""


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    num_top: int = 0,
    backend: Backend | None = None,
) -> Sampled:
    """Choose a token for each row: the most probable one, or one drawn from the nucleus by seed and position.

    `kernels.reference.sample` defines it. All backends draw the same token, but where the rounding of a sum or a
    logarithm decides between two. Values are not checked, as the launcher does not wait for them: a temperature below 0
    is greedy, a `top_p` of 0 or less keeps the most probable tokens alone, one above 1 all.

    Args:
        logits: [N, V], float16, bfloat16 or float32, each row without gaps.
        temperature: float32 [N]; 0 takes the most probable token, the first of equals.
        top_p: float32 [N] in (0, 1]; 1 keeps all tokens.
        seeds: int64 [N], any.
        positions: int64 [N], of the tokens that are chosen, below 2^32.
        num_top: how many of the most probable tokens to return.

    Returns:
        The tokens, and the most probable ones in falling order. Log-probabilities are the model's own: at temperature
        1 over all tokens. A row with a NaN or an infinity has token 0, log-probabilities of NaN and `is_finite` false.
    """
    check_float("logits", logits)
    if logits.dim() != 2 or not 0 < logits.shape[1] <= MAX_VOCAB_SIZE:
        raise ValueError(f"got logits {list(logits.shape)} · expected [N, V], V at most {MAX_VOCAB_SIZE}")
    if logits.stride(1) != 1 and logits.numel():
        raise ValueError(f"got logits with strides {list(logits.stride())} · expected the last to be 1")
    (N, V), device = logits.shape, logits.device
    if not 0 <= num_top <= V:
        raise ValueError(f"got num_top {num_top} · expected 0 … {V}, the number of tokens")
    for name, tensor, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_p", top_p, torch.float32),
        ("seeds", seeds, torch.int64),
        ("positions", positions, torch.int64),
    ):
        check_whole(name, tensor, (N,), dtype, device)
    if require_backend(device, backend) == "reference":
        return reference.sample(
            logits, temperature=temperature, top_p=top_p, seeds=seeds, positions=positions, num_top=num_top
        )
    result = Sampled(
        token_ids=torch.empty(N, dtype=torch.int64, device=device),
        logprobs=torch.empty(N, dtype=torch.float32, device=device),
        top_ids=torch.empty(N, num_top, dtype=torch.int64, device=device),
        top_logprobs=torch.empty(N, num_top, dtype=torch.float32, device=device),
        is_finite=torch.empty(N, dtype=torch.bool, device=device),
    )
    if N:
        from kernels.gpu import sample as kernels

        with device_guard(device):
            kernels.sample(logits, temperature, top_p, seeds, positions, result)
    return result
