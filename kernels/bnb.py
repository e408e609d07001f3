"""Linear weights in the two forms of bitsandbytes: NF4 with double quantisation, and int8 by rows.

NF4 cuts the weight, row after row, into blocks of 64. Each value is one of 16 quantiles of the normal distribution,
scaled to the largest magnitude of its block; and those magnitudes are stored in 8 bits, in blocks of 256:

    weight   uint8 [out * in / 2, 1]   two codes per byte, the first in the high half
    absmax   uint8 [out * in / 64]     the code of each block's largest magnitude
    value  = quant_map[code] * (nested_quant_map[absmax] * nested_absmax + nested_offset)

That is 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits per weight. int8 is one byte per weight and one magnitude per row:

    value  = weight * SCB / 127

Both ops here are weight-only: x is not rounded. (The library's own int8 layer, LLM.int8(), rounds x to int8 too, except
the columns that hold a magnitude above a threshold.) On a GPU the product with an NF4 weight is the library's kernel.
All else is plain PyTorch and needs no bitsandbytes: a workstation can read the files without it.

Source: QLoRA, arXiv 2305.14314, and LLM.int8(), arXiv 2208.07339; the bytes are those of bitsandbytes 0.50.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import logging
import math
import warnings
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional

from kernels.reference import matmul_by_rows
from kernels.weights import StoredWeight, check_forms, check_names

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from torch import Tensor

NF4_BLOCK_SIZE: Final = 64
"""Weights that share one magnitude."""
NF4_NESTED_BLOCK_SIZE: Final = 256
"""Magnitudes that share one magnitude of their own."""
NF4_QUANT_STATE_KEY: Final = "weight.quant_state.bitsandbytes__nf4"


@functools.cache
def import_bitsandbytes() -> ModuleType:
    """Import bitsandbytes, and keep to itself what it has to say meanwhile.

    It warns on machines without a GPU, and, where the CPU has bfloat16 instructions, that this project's folder
    `kernels` is not the Hugging Face package of that name. Neither is news to whoever runs this.

    Raises:
        ImportError: it is not installed, or does not load.
    """
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("bitsandbytes")
    except (OSError, RuntimeError) as error:
        msg = f"got a bitsandbytes that does not load ({error}) · expected one for this torch · install another version"
        raise ImportError(msg) from error
    finally:
        logger.setLevel(level)


# Without slots: cached_property needs a place to keep what it made.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Nf4Weight(StoredWeight):
    """A linear weight in NF4 with double quantisation, about 4.13 bits per weight; blocks = out * in / 64."""

    shape: tuple[int, int]
    packed: Tensor  # uint8 [out * in / 2, 1]
    absmax: Tensor  # uint8 [blocks]
    quant_map: Tensor  # float32 [16]
    nested_absmax: Tensor  # float32 [ceil(blocks / 256)]
    nested_quant_map: Tensor  # float32 [256]
    nested_offset: Tensor  # float32 []

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Nf4Weight:
        """Read a weight as `export.quantize.bnb.quantize_nf4` and transformers write it.

        Args:
            tensors: "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"
                and NF4_QUANT_STATE_KEY; on one device. They are kept, not copied.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape or dtype than the weight's shape asks for; or
                the weight is in another form, such as FP4 or without double quantisation.
        """
        check_names(tensors, {"weight", NF4_QUANT_STATE_KEY} | {f"weight.{name}" for name in _NF4_FLOATS})
        shape, offset = _read_quant_state(tensors[NF4_QUANT_STATE_KEY])
        blocks = shape[0] * shape[1] // NF4_BLOCK_SIZE
        forms: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((blocks * NF4_BLOCK_SIZE // 2, 1), torch.uint8),
            "weight.absmax": ((blocks,), torch.uint8),
            "weight.quant_map": ((16,), torch.float32),
            "weight.nested_absmax": ((math.ceil(blocks / NF4_NESTED_BLOCK_SIZE),), torch.float32),
            "weight.nested_quant_map": ((256,), torch.float32),
        }
        check_forms(tensors, forms, advice=_AGAIN)
        return cls(
            shape=shape,
            packed=tensors["weight"],
            nested_offset=torch.tensor(offset, dtype=torch.float32, device=tensors["weight"].device),
            **{name: tensors[f"weight.{name}"] for name in _NF4_FLOATS},
        )

    def block_scales(self) -> Tensor:
        """Return the magnitude of each block, float32 [out, in / NF4_BLOCK_SIZE, 1]."""
        codes = self.nested_quant_map.index_select(0, self.absmax.int())
        whole = functional.pad(codes, (0, -codes.numel() % NF4_NESTED_BLOCK_SIZE)).view(-1, NF4_NESTED_BLOCK_SIZE)
        scales = (whole * self.nested_absmax.unsqueeze(-1)).flatten()[: codes.numel()] + self.nested_offset
        return scales.view(self.shape[0], -1, 1)

    @functools.cached_property
    def _pairs(self) -> Tensor:
        """The two values of each possible byte, as one 64-bit word: int64 [256].

        One look-up then gives two values, and the order in which they lie in memory is that of the weight.
        """
        first, second = self.quant_map.repeat_interleave(16), self.quant_map.repeat(16)
        return torch.stack((first, second), dim=-1).view(torch.int64).squeeze(-1)

    def rows(self, begin: int, end: int, dtype: torch.dtype, scales: Tensor | None = None) -> Tensor:
        """Return rows begin … end - 1 of the weight, bit for bit as the library has them; `scales` saves them anew."""
        scales = self.block_scales() if scales is None else scales
        packed = self.packed.view(self.shape[0], -1)[begin:end]
        values = self._pairs.index_select(0, packed.flatten().int()).view(torch.float32)
        blocks = values.view(end - begin, -1, NF4_BLOCK_SIZE)
        return blocks.mul_(scales[begin:end]).view(end - begin, -1).to(dtype)

    @functools.cached_property
    def quant_state(self) -> Any:  # noqa: ANN401 - a class of an optional package
        """The library's view of the same tensors."""
        quant_state = import_bitsandbytes().functional.QuantState
        nested = quant_state(
            absmax=self.nested_absmax,
            code=self.nested_quant_map,
            blocksize=NF4_NESTED_BLOCK_SIZE,
            dtype=torch.float32,
        )
        return quant_state(
            absmax=self.absmax,
            shape=torch.Size(self.shape),
            code=self.quant_map,
            blocksize=NF4_BLOCK_SIZE,
            quant_type="nf4",
            dtype=torch.float16,
            offset=self.nested_offset,
            state2=nested,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Int8Weight(StoredWeight):
    """A linear weight in int8 with a magnitude per row."""

    weight: Tensor  # int8 [out, in]
    scb: Tensor  # float32 [out], the magnitude that 127 stands for; "SCB" on disk

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Int8Weight:
        """Read a weight as `export.quantize.bnb.quantize_int8` and transformers write it.

        Args:
            tensors: "weight", "SCB" and perhaps "weight_format"; on one device. They are kept, not copied.

        Raises:
            ValueError: a tensor is missing, unknown, or of a wrong shape or dtype; or the weight is in one of the
                column orders that old versions of the library wrote.
        """
        tensors = {"weight_format": torch.tensor(0, dtype=torch.uint8)} | dict(tensors)
        check_names(tensors, {"weight", "SCB", "weight_format"})
        if tensors["weight"].dim() != 2:
            got = list(tensors["weight"].shape)
            raise ValueError(f"weight: got shape {got} · expected [out, in]{_AGAIN}")
        out_features, in_features = tensors["weight"].shape
        forms: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((out_features, in_features), torch.int8),
            "SCB": ((out_features,), torch.float32),
            "weight_format": ((), torch.uint8),
        }
        check_forms(tensors, forms, advice=_AGAIN)
        if code := int(tensors["weight_format"]):
            raise ValueError(f"weight_format: got {code} · expected 0, by rows{_AGAIN}")
        return cls(weight=tensors["weight"], scb=tensors["SCB"])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.weight.shape[0], self.weight.shape[1]

    def rows(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Return rows begin … end - 1 of the weight."""
        # Scaled before the product and not after it: int8 times x leaves the range of float16 where y does not.
        values = torch.empty(end - begin, self.shape[1], dtype=dtype, device=self.weight.device)
        return torch.mul(self.weight[begin:end], self.scb[begin:end, None] / 127, out=values)


def nf4_matmul(x: Tensor, weight: Nf4Weight) -> Tensor:
    """Multiply x [..., in] by the transpose of a weight in NF4; see `reference.matmul_by_rows`.

    On a GPU this is the library's kernel, and an ImportError says that it is not there. On a CPU the weight is expanded
    a few rows at a time and multiplied in the dtype of x.
    """
    if x.is_cuda:
        # Before 0.50 the library tells which way round the weight lies by this transpose; since then it does not care.
        product: Tensor = import_bitsandbytes().matmul_4bit(x, weight.packed.t(), quant_state=weight.quant_state)
        return product
    scales = weight.block_scales()
    return matmul_by_rows(x, weight.shape, lambda begin, end: weight.rows(begin, end, x.dtype, scales))


def int8_matmul(x: Tensor, weight: Int8Weight) -> Tensor:
    """Multiply x [..., in], not quantised itself, by the transpose of a weight in int8; see `reference.matmul_by_rows`.

    The weight is expanded to the dtype of x: on a CPU a few rows at a time, on a GPU all of it, into memory that is
    free again after the product.
    """
    if x.is_cuda:
        return functional.linear(x, weight.dequantize(x.dtype))
    return matmul_by_rows(x, weight.shape, lambda begin, end: weight.rows(begin, end, x.dtype))


_AGAIN: Final = " · quantise the weight again"
_NF4_FLOATS: Final = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def _read_quant_state(blob: Tensor) -> tuple[tuple[int, int], float]:
    """Return (out, in) and the offset of the magnitudes from the JSON text in a uint8 tensor."""
    expected = {
        "quant_type": "nf4",
        "blocksize": NF4_BLOCK_SIZE,
        "nested_blocksize": NF4_NESTED_BLOCK_SIZE,
        "nested_dtype": "float32",
    }
    what_to_do = "quantise the weight to NF4 with double quantisation"
    try:
        state = json.loads(bytes(blob.tolist()))
        got = {key: state.get(key) for key in expected}
        shape, offset = state.get("shape"), state.get("nested_offset")
    except (ValueError, TypeError, AttributeError) as error:
        msg = f"{NF4_QUANT_STATE_KEY}: got no JSON object ({error}) · expected one · {what_to_do}"
        raise ValueError(msg) from error
    if got != expected:
        raise ValueError(f"{NF4_QUANT_STATE_KEY}: got {got} · expected {expected} · {what_to_do}")
    if not isinstance(offset, float) or not math.isfinite(offset):
        raise ValueError(f"{NF4_QUANT_STATE_KEY}: got nested_offset {offset!r} · expected a number · {what_to_do}")
    match shape:
        case [int(out_features), int(in_features)] if out_features > 0 and in_features > 0:
            if in_features % NF4_BLOCK_SIZE == 0:
                return (out_features, in_features), offset
    msg = f"{NF4_QUANT_STATE_KEY}: got shape {shape} · expected [out, in], in a multiple of {NF4_BLOCK_SIZE}"
    raise ValueError(f"{msg} · {what_to_do}")
