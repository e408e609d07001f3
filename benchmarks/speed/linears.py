"""Linears of other libraries, made of our weights: each is called as its library would be.

tinygemm   torch's own int4 product, groups of 128, computes in bfloat16
gemlite    gemlite's Triton kernels, groups of 128, computes in float16
nf4        bitsandbytes' NF4, in our linear, which calls the library's kernel
dense      16 bits on a GPU, for cuBLAS; float32 on a CPU
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from benchmarks.speed.harness import Unavailable
from benchmarks.speed.weights import GROUP_SIZE
from kernels.bnb import Nf4Weight, import_bitsandbytes
from kernels.gptq import GptqWeight
from kernels.packing import pack_factor
from lite.config import Quantization
from lite.engines.torch_engine.linear import Linear

if TYPE_CHECKING:
    from collections.abc import Callable


def random_gptq(bits: int, shape: tuple[int, int], device: torch.device) -> GptqWeight:
    """Draw a weight whose products with values of order 1 are of order 1; all bits are as probable."""
    N, K = shape
    qweight = torch.randint(-(2**31), 2**31, (K // pack_factor(bits), N), dtype=torch.int32, device=device)
    group_size = GROUP_SIZE if K % GROUP_SIZE == 0 else K
    scales = (torch.rand(K // group_size, N, device=device) + 0.5) / (1 << (bits - 1)) / K**0.5
    return GptqWeight(qweight=qweight, scales=scales.half(), bits=bits, group_size=group_size)


def round_to_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [out, in] to the nearest of 4 bits, symmetric.

    Returns:
        Integers −8 … 7 [out, in], and their scales, float16 [out, groups].
    """
    groups = weight.float().view(weight.shape[0], -1, GROUP_SIZE)
    scales = (groups.abs().amax(-1) / 7).to(torch.float16)
    values = (groups / scales.float().unsqueeze(-1)).round_().clamp_(-8, 7)
    return values.flatten(1).to(torch.int8), scales


class Tinygemm(nn.Module):
    """A linear by torch's int4 product, which takes and gives bfloat16."""

    def __init__(self, weight: Tensor) -> None:
        """Round a weight [out, in].

        Raises:
            Unavailable: the card has no bfloat16.
        """
        super().__init__()
        if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0):
            raise Unavailable("it needs a card of compute capability 8.0")
        values, scales = round_to_groups(weight)
        self.out_features = weight.shape[0]
        unsigned = values.to(torch.int32) + 8
        # w = (q − 8) · scale + zero, and the zero is 0 here. Both as bfloat16 [groups, out, 2].
        scale = scales.t().to(torch.bfloat16)
        scales_and_zeros = torch.stack((scale, torch.zeros_like(scale)), dim=-1).contiguous()
        # torch has no public names for these.
        if weight.is_cuda:
            pairs = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).to(torch.uint8)
            packed = torch._convert_weight_to_int4pack(pairs, 8)  # noqa: SLF001
            self.product = torch._weight_int4pack_mm  # noqa: SLF001
        else:
            packed = torch._convert_weight_to_int4pack_for_cpu(unsigned, 2)  # noqa: SLF001
            self.product = torch._weight_int4pack_mm_for_cpu  # noqa: SLF001
        self.packed = nn.Buffer(packed)
        self.scales_and_zeros = nn.Buffer(scales_and_zeros)

    def forward(self, x: Tensor, adapters: None = None) -> Tensor:  # noqa: ARG002 - called as ours, without any
        """Apply the linear to x [..., in_features]."""
        rows = x.flatten(0, -2).to(torch.bfloat16)
        product: Tensor = self.product(rows, self.packed, GROUP_SIZE, self.scales_and_zeros)
        return product.to(x.dtype).view(*x.shape[:-1], self.out_features)


def gemlite(weight: Tensor) -> nn.Module:
    """Make a linear of gemlite's.

    Raises:
        Unavailable: it is not installed.
    """
    try:
        helper: Any = importlib.import_module("gemlite.helper")
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"not installed ({error})") from error
    values, scales = round_to_groups(weight)
    processor = helper.A16Wn(device=str(weight.device), dtype=torch.float16)
    unsigned = (values + 8).to(torch.uint8)
    made: nn.Module = processor.from_weights(unsigned, scales, torch.full_like(scales, 8), 4, GROUP_SIZE)
    return made


def nf4(weight: Tensor) -> nn.Module:
    """Round a weight to bitsandbytes' NF4.

    Raises:
        Unavailable: it is not installed, or has no CUDA library for this torch.
    """
    try:
        quantize: Any = import_bitsandbytes().functional.quantize_4bit
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error
    packed, state = quantize(weight.to(torch.float16), quant_type="nf4", compress_statistics=True)
    made = Linear(weight.shape[1], {"all": weight.shape[0]}, Quantization(format="bnb-nf4"))
    made.weights = (
        Nf4Weight(
            shape=(weight.shape[0], weight.shape[1]),
            packed=packed,
            absmax=state.absmax,
            quant_map=state.code,
            nested_absmax=state.state2.absmax,
            nested_quant_map=state.state2.code,
            nested_offset=state.offset,
        ),
    )
    return made


def dense(weight: Tensor) -> nn.Module:
    """Keep a weight as it is, in 16 bits on a GPU."""
    made = Linear(weight.shape[1], {"all": weight.shape[0]})
    made.weights = (weight.to(torch.float16) if weight.is_cuda else weight,)
    return made


PEERS: Final[dict[str, tuple[Callable[[Tensor], nn.Module], torch.dtype]]] = {
    "tinygemm int4": (Tinygemm, torch.bfloat16),
    "bitsandbytes nf4": (nf4, torch.float16),
    "fp16, cuBLAS": (dense, torch.float16),
    # The last: it looks for its fastest kernels, which may take long.
    "gemlite int4": (gemlite, torch.float16),
}
"""What makes a linear of a weight [out, in], and what it computes in on a GPU."""


def bytes_of(linear: nn.Module, weight: Tensor) -> int:
    """Return what a product reads of a linear that was made of a weight."""
    if isinstance(linear, Linear):
        return linear.nbytes
    if isinstance(linear, Tinygemm):
        return linear.packed.nbytes + linear.scales_and_zeros.nbytes
    # gemlite: a float16 scale and a zero of that size for each group.
    return weight.numel() // 2 + 2 * 2 * weight.numel() // GROUP_SIZE
