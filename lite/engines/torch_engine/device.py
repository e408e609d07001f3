"""torch, or an error that says what to install; its dtypes by name, and its memory errors in this project's words."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Final

from lite.errors import BackendUnavailable, MemoryBudgetError

try:
    import safetensors as _  # noqa: F401 - what is missing is said together, before anything is loaded
    import torch
except ImportError as error:
    msg = f'got no torch and safetensors ({error}) · expected both here · pip install "llava-rad-lite[torch]"'
    raise BackendUnavailable(msg) from error

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_OUT_OF_MEMORY: Final = re.compile("out of memory|ALLOC_FAILED", re.IGNORECASE)


def num_gpus() -> int:
    """Return how many GPUs torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextlib.contextmanager
def memory_explained(what: str) -> Iterator[None]:
    """Say in this project's words that a GPU's memory is full."""
    try:
        yield
    except RuntimeError as error:
        # torch's own error, and those of CUDA, cuBLAS and Triton, which are of several kinds.
        if not isinstance(error, torch.OutOfMemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        reason = str(error).partition("\n")[0]
        msg = f"got no memory for {what} ({reason}) · expected some free on the GPU · take a smaller batch, "
        msg += "cache_dtype='int8', fewer bits, or end what else runs there"
        raise MemoryBudgetError(msg) from error
