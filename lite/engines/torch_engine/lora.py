"""What the adapters of a batch's rows add to a linear."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from torch import Tensor
from torch.nn import functional

from kernels.lora_add import lora_add

RowAdapters: TypeAlias = Tensor | int | None
"""The adapter of each row: int64 [rows] on the device, negative for none; one for all rows; None: none at all."""


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
        down, up = functional.linear(x, self.a[adapters]), self.b[adapters]
        rank, begin = up.shape[1], 0
        for part, width in enumerate(self.parts):
            some = down.narrow(-1, part * rank, rank)
            y.narrow(-1, begin, width).add_(functional.linear(some, up.narrow(0, begin, width)))
            begin += width
        return y
