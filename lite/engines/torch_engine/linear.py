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

import contextlib
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.bnb import Int8Weight, Nf4Weight, int8_matmul, nf4_matmul
from kernels.gptq import GptqWeight, gptq_matmul
from kernels.quant_matmul import quant_matmul
from kernels.quant_weight import GROUP_SIZES, QuantWeight
from lite.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kernels.backend import Backend
    from lite.config import Quantization

Weight: TypeAlias = Tensor | GptqWeight | QuantWeight | Nf4Weight | Int8Weight


class Linear(nn.Module):
    """A linear, or several of one input, their outputs side by side. It has no weights until `take` gives them."""

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
        self.fp16_accumulation = False
        """Whether cuBLAS may add up in float16 where many rows are multiplied: see `kernels.quant_matmul`."""

    @property
    def nbytes(self) -> int:
        """The bytes of its weights in memory."""
        return sum(weight.nbytes for weight in self.weights)

    def take(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        backend: Backend = "reference",
    ) -> None:
        """Read the weights.

        Args:
            tensors: for each part all of its tensors, by what their names have behind the part's.
            device: where to put them.
            dtype: of a weight that is not quantised.
            backend: what will compute with them there: for "triton" integers, not NF4, are repacked into tiles.

        Raises:
            ValueError: they are not weights of this form and shape.
        """
        read = [self._read(name, tensors[name], dtype) for name in self.parts]
        if self.quantization is None:
            moved: list[Weight] = [weight.to(device) for weight in read]
            self.weights = tuple(moved)
            dense = [weight for weight in moved if isinstance(weight, Tensor)]
            if torch.device(device).type == "cuda" and len(dense) > 1:
                self.weights = (torch.cat(dense),)
            return
        self.weights = tuple(weight.to(device) for weight in read)
        if backend == "triton":
            self._repack()

    def _repack(self) -> None:
        """Put integers side by side in the tiles of the GPU kernels, where these know their form."""
        gptq = [weight for weight in self.weights if isinstance(weight, GptqWeight)]
        int8 = [weight for weight in self.weights if isinstance(weight, Int8Weight)]
        if gptq and self.fits_kernels:
            self.weights = (QuantWeight.from_gptq(*gptq),)
        elif int8:
            # Rows that the kernels cannot scale stay as they are: right, and slower.
            with contextlib.suppress(ValueError):
                self.weights = (QuantWeight.from_int8(*int8),)

    @property
    def uses_kernels(self) -> bool:
        """Whether its integers, if it has some, are where the GPU kernels want them."""
        return not any(isinstance(weight, GptqWeight | Int8Weight) for weight in self.weights)

    @property
    def fits_kernels(self) -> bool:
        """Whether its groups are of a size that the GPU kernels know, if it is stored as GPTQ."""
        stored = self.quantization
        if stored is None or not stored.format.startswith("gptq"):
            return True
        return stored.group_size in (-1, self.in_features, *GROUP_SIZES)

    def _read(self, name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Weight:
        stored, shape = self.quantization, (self.parts[name], self.in_features)
        weight: Weight
        if stored is None:
            if set(tensors) != {"weight"}:
                raise ValueError(f"got the tensors {', '.join(sorted(tensors))} · expected weight")
            weight = tensors["weight"].to(dtype)
        elif stored.format == "bnb-nf4":
            weight = Nf4Weight.from_tensors(tensors)
        elif stored.format == "bnb-int8":
            weight = Int8Weight.from_tensors(tensors)
        else:
            weight = GptqWeight.from_tensors(tensors, bits=stored.bits)
            group_size = self.in_features if stored.group_size == -1 else stored.group_size
            if weight.group_size != group_size:
                raise ValueError(f"got groups of {weight.group_size} inputs · expected {group_size} by config.json")
        if tuple(weight.shape) != shape:
            raise ValueError(f"got a weight {list(weight.shape)} · expected {list(shape)} by config.json")
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply the linear to x [..., in_features]; return [..., all outputs]."""
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


def parts_of(linears: Mapping[str, Linear]) -> dict[str, tuple[str, str]]:
    """Return what a checkpoint calls each part, in the place of its linear's name, with that name and the part's."""
    return {
        f"{name.rpartition('.')[0]}.{part}".removeprefix("."): (name, part)
        for name, linear in linears.items()
        for part in linear.parts
    }
