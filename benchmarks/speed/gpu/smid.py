"""On which multiprocessors a launch really ran: a Triton kernel whose every program notes its own.

Imported where there is a GPU only.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

_PROGRAMS_EACH: Final = 64
"""For each multiprocessor of the card: more than are resident at once, so that none is left out."""


def _note(out_ptr: tl.tensor) -> None:
    tl.store(out_ptr + tl.program_id(0), cuda.smid())


_note_kernel: Any = triton.jit(_note)


class Multiprocessors:
    """Notes where its programs run, on the current stream or within a CUDA graph."""

    def __init__(self, device: torch.device) -> None:
        count = torch.cuda.get_device_properties(device).multi_processor_count
        self._found = torch.full((count * _PROGRAMS_EACH,), -1, dtype=torch.int32, device=device)

    def note(self) -> torch.Tensor:
        """Launch; wait for nothing."""
        with torch.cuda.device(self._found.device):
            _note_kernel[(self._found.numel(),)](self._found, num_warps=1)
        return self._found

    def count(self) -> int:
        """Wait, and return how many there were."""
        torch.cuda.synchronize(self._found.device)
        found = len(set(self._found.tolist()))
        self._found.fill_(-1)
        torch.cuda.synchronize(self._found.device)
        return found
