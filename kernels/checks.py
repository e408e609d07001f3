"""What the launchers check of their arguments, or raise ValueError: shapes, dtypes, devices and strides, never values.

A value on a GPU can only be checked by waiting for it, and a launcher must not wait: it runs within CUDA graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)
_BFLOAT16_CAPABILITY: Final = (8, 0)


def check_float(name: str, tensor: Tensor) -> None:
    """Raise unless a tensor is of a dtype that its card computes in."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"got {name} {tensor.dtype} · expected float16, bfloat16 or float32")
    if tensor.dtype == torch.bfloat16 and tensor.is_cuda:
        capability = torch.cuda.get_device_capability(tensor.device)
        if capability < _BFLOAT16_CAPABILITY:
            got = f"bfloat16 on a card of compute capability {capability[0]}.{capability[1]}"
            raise ValueError(f"got {name} {got} · expected 8.0 or newer for it · use float16")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless a tensor is just so."""
    if (tuple(tensor.shape), tensor.dtype, tensor.device) != (shape, dtype, device):
        got = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ValueError(f"got {name} {got} · expected {list(shape)} {dtype} on {device}")


def check_whole(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless a tensor is just so, and has no gaps."""
    check_tensor(name, tensor, shape, dtype, device)
    if not tensor.is_contiguous():
        raise ValueError(f"got {name} with strides {list(tensor.stride())} · expected a contiguous tensor")


def check_cache(
    k_cache: Tensor, v_cache: Tensor, k_scales: Tensor | None, v_scales: Tensor | None, *, dtype: torch.dtype
) -> None:
    """Raise unless keys and values are a cache for tensors of `dtype`: in that dtype, or int8 with scales.

    k_cache is [B, kv_heads, S, head_dim], its last axis without gaps: one layer of a larger tensor will do. v_cache is
    like it, strides included. k_scales is float16 or float32 [B, kv_heads, S], and v_scales like it.
    """
    quantized = k_cache.dtype == torch.int8
    if k_cache.dtype != dtype and not quantized:
        raise ValueError(f"got k_cache {k_cache.dtype} · expected {dtype}, the dtype of the tokens, or torch.int8")
    pairs = [("k_cache", k_cache, "v_cache", v_cache)]
    if quantized != (k_scales is not None) or quantized != (v_scales is not None):
        got = "both" if k_scales is not None and v_scales is not None else "not both"
        wanted = "k_scales and v_scales" if quantized else "no scales"
        raise ValueError(f"got a cache of {k_cache.dtype} and {got} of k_scales and v_scales · expected {wanted}")
    if k_scales is not None and v_scales is not None:
        pairs.append(("k_scales", k_scales, "v_scales", v_scales))
        if k_scales.dtype not in (torch.float16, torch.float32) or k_scales.shape != k_cache.shape[:3]:
            got = f"k_scales {list(k_scales.shape)} {k_scales.dtype}"
            raise ValueError(f"got {got} · expected torch.float16 or torch.float32 {list(k_cache.shape[:3])}")
    for first_name, first, second_name, second in pairs:
        same = (first.shape, first.dtype, first.stride(), first.device)
        if same != (second.shape, second.dtype, second.stride(), second.device):
            got = f"{second_name} {list(second.shape)} {second.dtype} with strides {list(second.stride())}"
            expected = f"{list(first.shape)} {first.dtype} with strides {list(first.stride())}, like {first_name}"
            raise ValueError(f"got {got} on {second.device} · expected {expected} on {first.device}")
        if first.stride(-1) != 1:
            raise ValueError(f"got {first_name} with strides {list(first.stride())} · expected the last to be 1")
