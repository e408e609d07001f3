"""The linears of a decoder in each stored form, behind one call: y = x Wᵀ.

fp16                     nn.Linear          weight
gptq-int4, gptq-int8     QuantizedLinear    qweight, qzeros, scales, g_idx                 kernels/gptq.py
bnb-nf4                  QuantizedLinear    weight, weight.absmax, weight.quant_map, …     kernels/bnb.py
bnb-int8                 QuantizedLinear    weight, SCB, weight_format                     kernels/bnb.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from kernels.bnb import Int8Weight, Nf4Weight, int8_matmul, nf4_matmul
from kernels.gptq import GptqWeight, gptq_matmul
from lite.config import Quantization
from lite.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lite.config import DecoderConfig

    StoredWeight = GptqWeight | Nf4Weight | Int8Weight


class QuantizedLinear(nn.Module):
    """A linear whose weight stays as it is stored. It has no weight until `take` gives it one."""

    def __init__(self, in_features: int, out_features: int, quantization: Quantization) -> None:
        super().__init__()
        self.shape = (out_features, in_features)
        self.quantization = quantization
        self.weight: StoredWeight | None = None

    def take(self, tensors: Mapping[str, Tensor], *, device: torch.device | str) -> None:
        """Read the weight.

        Args:
            tensors: by the part of their name behind the linear's, all of them.
            device: where to put it.

        Raises:
            ValueError: they are not a weight of this form and shape.
        """
        stored = self.quantization
        weight: StoredWeight
        if stored.format == "bnb-nf4":
            weight = Nf4Weight.from_tensors(tensors)
        elif stored.format == "bnb-int8":
            weight = Int8Weight.from_tensors(tensors)
        else:
            weight = GptqWeight.from_tensors(tensors, bits=stored.bits)
            group_size = self.shape[1] if stored.group_size == -1 else stored.group_size
            if weight.group_size != group_size:
                raise ValueError(f"got groups of {weight.group_size} inputs · expected {group_size} by config.json")
        if weight.shape != self.shape:
            raise ValueError(f"got a weight {list(weight.shape)} · expected {list(self.shape)} by config.json")
        self.weight = weight.to(device)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the linear to x [..., in_features]."""
        if isinstance(self.weight, GptqWeight):
            return gptq_matmul(x, self.weight)
        if isinstance(self.weight, Nf4Weight):
            return nf4_matmul(x, self.weight)
        if isinstance(self.weight, Int8Weight):
            return int8_matmul(x, self.weight)
        msg = "got a linear without a weight · expected load_decoder to have given it one · report this"
        raise ArtifactError(msg)


def layer_linear(config: DecoderConfig, in_features: int, out_features: int) -> nn.Module:
    """Return an empty linear of a decoder layer, in the form config.json says."""
    if config.quantization is None:
        return nn.Linear(in_features, out_features, bias=False)
    return QuantizedLinear(in_features, out_features, config.quantization)


def head_linear(config: DecoderConfig) -> nn.Module:
    """Return the empty linear that makes the logits: 16-bit unless config.json says otherwise."""
    head = config.quantization.lm_head if config.quantization is not None else None
    if head is None:
        return nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    return QuantizedLinear(config.hidden_size, config.vocab_size, head)
