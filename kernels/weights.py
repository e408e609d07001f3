"""What linear weights have in common that are stored as something else than floats."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    import torch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredWeight:
    """A linear weight as it is stored, on any device: its fields are tensors and what tells how to read them."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def shape(self) -> tuple[int, int]:
            """(out, in) of the weight."""

        def rows(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
            """Return rows begin … end - 1 of the weight, computed in float32 and rounded to `dtype`."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in], computed in float32 and rounded to `dtype`."""
        return self.rows(0, self.shape[0], dtype)

    @property
    def nbytes(self) -> int:
        """Its bytes in memory."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def to(self, device: torch.device | str) -> Self:
        """Return the weight on a device."""
        return dataclasses.replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def check_names(tensors: Mapping[str, Tensor], expected: set[str]) -> None:
    """Raise ValueError unless a stored weight has just these tensors."""
    if tensors.keys() != expected:
        odd = ", ".join(sorted(expected ^ tensors.keys()))
        raise ValueError(f"got {sorted(tensors)} · expected {sorted(expected)} · missing or unknown: {odd}")


def check_forms(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]], *, advice: str = ""
) -> None:
    """Raise ValueError unless the tensors have these shapes and dtypes."""
    for name, (shape, dtype) in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            got = f"{list(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{name}: got {got} · expected {list(shape)} {dtype}{advice}")
