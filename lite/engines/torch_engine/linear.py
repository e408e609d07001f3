"""The linears of a decoder in each stored form, behind one call: y = x Wᵀ.

    stored as                tensors of a part                              in memory
    fp16                     weight                                         a matrix
    gptq-int4, gptq-int8     qweight, qzeros, scales, g_idx                 kernels/gptq.py, kernels/quant_matmul.py
    bnb-nf4                  weight, weight.absmax, weight.quant_map, …     kernels/bnb.py
    bnb-int8                 weight, SCB, weight_format                     the same two

Linears of one input (q, k and v; gate and up) are one module here, its *parts* named as in the checkpoint. For a GPU
they are put side by side when they are loaded, and are one product: fewer launches, and a wider matrix fills the card
better. On a CPU that would copy what is mapped from the disk, for nothing: there they stay apart, and only the products
are put side by side.

What adapters add to a product (`Lora`) is computed beside it, whatever the weights are stored as.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.bnb import Int8Weight, Nf4Weight, int8_matmul, nf4_matmul
from kernels.gptq import GptqWeight, gptq_matmul
from kernels.lora_add import lora_add
from kernels.quant_matmul import quant_matmul
from kernels.quant_weight import QuantWeight
from lite.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lite.config import Quantization

RowAdapters: TypeAlias = Tensor | int | None
"""The adapter of each row: int64 [rows] on the device, negative for none; one for all rows; None: none at all."""
Weight: TypeAlias = Tensor | GptqWeight | QuantWeight | Nf4Weight | Int8Weight


class Lora(NamedTuple):
    """The factors of all adapters for a linear, on its device and in its dtype: see `lite.engines.adapters.Stack`."""

    a: Tensor  # [S, P * rank, in]
    b: Tensor  # [S, out, rank]
    parts: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all factors."""
        return self.a.nbytes + self.b.nbytes

    def add(self, y: Tensor, x: Tensor, adapters: Tensor | int) -> Tensor:
        """Add to y [..., out] what the adapter of each row makes of x [..., in], in place."""
        if isinstance(adapters, Tensor):
            return lora_add(y, x, self.a, self.b, adapters, parts=self.parts)
        # A prompt: many rows of one adapter, which is the host's to choose.
        down = functional.linear(x, self.a[adapters])
        rank, begin = self.b.shape[2], 0
        for part, width in enumerate(self.parts):
            rows = slice(begin, begin + width)
            some = down[..., part * rank : (part + 1) * rank]
            y[..., rows] += functional.linear(some, self.b[adapters, rows])
            begin += width
        return y


class Linear(nn.Module):
    """A linear, or several of one input, their outputs side by side. `load.fill_linear` gives it weights."""

    def __init__(self, in_features: int, parts: Mapping[str, int], quantization: Quantization | None = None) -> None:
        """Describe the linear.

        Args:
            in_features: of every part.
            parts: the outputs of each, by its name in the checkpoint, in order.
            quantization: how the parts are stored; None: in 16 bits.
        """
        super().__init__()
        self.in_features = in_features
        self.parts = dict(parts)
        self.quantization = quantization
        self.weights: tuple[Weight, ...] = ()
        self.lora: Lora | None = None
        self.fp16_accumulation = False
        """Whether cuBLAS may add up in float16 where many rows are multiplied: see `kernels.quant_matmul`."""

    @property
    def nbytes(self) -> int:
        """The bytes of its weights in memory, those of adapters included."""
        return sum(weight.nbytes for weight in self.weights) + (self.lora.nbytes if self.lora is not None else 0)

    @property
    def uses_kernels(self) -> bool:
        """Whether its integers, if it has some, are where the GPU kernels want them."""
        return not any(isinstance(weight, GptqWeight | Int8Weight) for weight in self.weights)

    def forward(self, x: Tensor, adapters: RowAdapters = None) -> Tensor:
        """Apply the linear to x [..., in_features], each row with its adapter; return [..., all outputs]."""
        y = self._base(x)
        return y if adapters is None or self.lora is None else self.lora.add(y, x, adapters)

    def _base(self, x: Tensor) -> Tensor:
        products = [self._product(x, weight) for weight in self.weights]
        if not products:
            msg = "got a linear without weights · expected load_decoder to have given it some · report this"
            raise ArtifactError(msg)
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def _product(self, x: Tensor, weight: Weight) -> Tensor:
        if isinstance(weight, Tensor):
            return functional.linear(x, weight)
        if isinstance(weight, QuantWeight):
            return quant_matmul(x, weight, fp16_accumulation=self.fp16_accumulation)
        if isinstance(weight, GptqWeight):
            return gptq_matmul(x, weight)
        if isinstance(weight, Nf4Weight):
            return nf4_matmul(x, weight)
        return int8_matmul(x, weight)


def linears_of(module: nn.Module) -> dict[str, Linear]:
    """Return the linears in a module by their names."""
    return {name: found for name, found in module.named_modules() if isinstance(found, Linear)}
