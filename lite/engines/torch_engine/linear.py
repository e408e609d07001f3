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
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.bnb import Int8Weight, Nf4Weight, int8_matmul, nf4_matmul
from kernels.gptq import GptqWeight, gptq_matmul
from kernels.quant_matmul import quant_matmul
from kernels.quant_weight import QuantWeight
from lite.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lite.config import Quantization
    from lite.engines.torch_engine.lora import Lora, RowAdapters

Weight: TypeAlias = Tensor | GptqWeight | QuantWeight | Nf4Weight | Int8Weight


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
        self.lora: Lora | None = None  # is computed beside the product, whatever the weights are stored as
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
        products = [self._product(x, weight) for weight in self.weights]
        if not products:
            msg = "got a linear without weights · expected load_decoder to have given it some · report this"
            raise ArtifactError(msg)
        y = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        return y if adapters is None or self.lora is None else self.lora.add(y, x, adapters)

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
