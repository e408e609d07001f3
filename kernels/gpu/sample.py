"""Kernel of `kernels.sample`: one program for one row, which its registers hold."""

import torch
import triton
import triton.language as tl

from kernels.gpu import OPTIONS
from kernels.reference import Sampled

GOLDEN = tl.constexpr(0x9E3779B9)
BITS_OF_ONE = tl.constexpr(0x3F800000)
"""1.0 as an integer. Floats from 0 on are in the order of their bits."""


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    """Scramble 32 bits, as in the reference."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _exponentials(seed: tl.tensor, position: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """Return the time at which each token arrives, as in the reference."""
    first = _mix(seed.to(tl.uint32) ^ _mix(position.to(tl.uint32) + GOLDEN))
    second = _mix((seed >> 32).to(tl.uint32) ^ _mix(first + GOLDEN))
    bits = _mix(second ^ _mix(first + tokens.to(tl.uint32) * GOLDEN))
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    # -log1p(-u), which Triton has not: the logarithm of a rounded 1 - u, put right by how much that was rounded.
    rest = 1.0 - uniform
    rounded = tl.where(rest == 1.0, 1.0, 1.0 - rest)
    return tl.where(rest == 1.0, uniform, -tl.log(rest) * (uniform / rounded))


@triton.jit
def _threshold(weights: tl.tensor, top_p: tl.tensor) -> tl.tensor:
    """Return a number that the weights of the nucleus reach, and no others; weights are up to 1, those below 0 none.

    Of all floats it is the largest at which there is enough of the weight. Sums are always in one order, so that they
    fall as it rises, whatever the rounding.
    """
    enough = top_p * tl.sum(tl.where(weights >= 0.0, weights, 0.0), axis=0)
    low, high = 0, BITS_OF_ONE + 1
    for _ in range(30):
        middle = (low + high) // 2
        mass = tl.sum(tl.where(weights >= tl.cast(middle, tl.float32, bitcast=True), weights, 0.0), axis=0)
        low = tl.where(mass >= enough, middle, low)
        high = tl.where(mass >= enough, high, middle)
    return tl.cast(low, tl.float32, bitcast=True)


@triton.jit
def _draw(
    logits_ptr: tl.tensor, V: tl.tensor, largest: tl.tensor, weights: tl.tensor,
    temperature: tl.tensor, top_p: tl.tensor, seed: tl.tensor, position: tl.tensor, TILE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the token of the nucleus that arrives first. Most tiles hold none of it, and cost a look each."""
    threshold = 0.0
    if top_p < 1.0:
        threshold = _threshold(weights, top_p)
    best, best_token = -1.0, 0
    for start in range(0, V, TILE):
        i = start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + i, mask=i < V, other=float("-inf")).to(tl.float32)
        some = tl.exp((x - largest) / temperature)
        kept = (some >= threshold) & (i < V)
        if tl.max(kept.to(tl.int32), axis=0) > 0:
            speeds = tl.where(kept, some / _exponentials(seed, position, i), -1.0)
            speed, winner = tl.max(speeds, axis=0, return_indices=True)
            if speed > best:
                best, best_token = speed, start + winner
    return best_token


@triton.jit
def sample_kernel(
    logits_ptr: tl.tensor, temperature_ptr: tl.tensor, top_p_ptr: tl.tensor, seeds_ptr: tl.tensor,
    positions_ptr: tl.tensor, token_ids_ptr: tl.tensor, logprobs_ptr: tl.tensor, top_ids_ptr: tl.tensor,
    top_logprobs_ptr: tl.tensor, is_finite_ptr: tl.tensor,
    V: tl.tensor, stride: tl.tensor, num_top: tl.tensor, BLOCK: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """Choose a row's token. Program (row)."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    i = tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + i, mask=i < V, other=float("-inf")).to(tl.float32)
    finite = tl.min(((tl.abs(x) < float("inf")) | (i >= V)).to(tl.int32), axis=0) > 0
    tl.store(is_finite_ptr + row, finite)
    top_ids_ptr += row * num_top
    top_logprobs_ptr += row * num_top
    if finite:
        largest, token = tl.max(x, axis=0, return_indices=True)
        log_total = tl.log(tl.sum(tl.exp(x - largest), axis=0))
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0.0:
            weights = tl.where(i < V, tl.exp((x - largest) / temperature), -1.0)
            token = _draw(
                logits_ptr, V, largest, weights, temperature, tl.load(top_p_ptr + row),
                tl.load(seeds_ptr + row), tl.load(positions_ptr + row), TILE,
            )  # fmt: skip
        tl.store(token_ids_ptr + row, token)
        tl.store(logprobs_ptr + row, tl.load(logits_ptr + token).to(tl.float32) - largest - log_total)
        for rank in range(num_top):
            value, best = tl.max(x, axis=0, return_indices=True)
            tl.store(top_ids_ptr + rank, best)
            tl.store(top_logprobs_ptr + rank, value - largest - log_total)
            x = tl.where(i == best, float("-inf"), x)
    else:
        tl.store(token_ids_ptr + row, 0)
        tl.store(logprobs_ptr + row, float("nan"))
        for rank in range(num_top):
            tl.store(top_ids_ptr + rank, 0)
            tl.store(top_logprobs_ptr + rank, float("nan"))


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor,
    out: Sampled,
) -> None:  # fmt: skip
    """Launch the kernel: logits [N, V], the last axis without gaps; the others contiguous."""
    N, V = logits.shape
    block = triton.next_power_of_2(V)
    # 32 numbers for each thread of a row of 32,000: 32 warps, as many as a program may have.
    num_warps = min(max(block // 1024, 1), 32)
    sample_kernel[(N,)](
        logits, temperature, top_p, seeds, positions, *out, V, logits.stride(0), out.top_ids.shape[1],
        BLOCK=block, TILE=min(block, 4096), num_warps=num_warps, **OPTIONS,
    )  # fmt: skip
