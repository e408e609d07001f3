"""What the tests of the Triton kernels share: where they run, what was launched, and poisoned memory.

With a GPU they run on it. Without one they are skipped, and `test_kernels_interpreted.py` runs the same files in a
process of its own under TRITON_INTERPRET=1, which has to be set before anything imports Triton.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.backend import is_interpreted

DEVICE = torch.device("cpu" if is_interpreted() else "cuda")
if DEVICE.type == "cuda" and not torch.cuda.is_available():
    msg = "no CUDA GPU; test_kernels_interpreted.py runs these under Triton's interpreter"
    pytest.skip(msg, allow_module_level=True)

NAN = float("nan")
Launches = list[tuple[str, tuple[int, ...]]]

MARKS = [] if is_interpreted() else [pytest.mark.gpu]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The kernels that Triton was asked to run, by name, each with its grid."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    seen: Launches = []
    if is_interpreted():
        interpret = GridExecutor.__call__

        def record_interpreted(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append((self.fn.__name__, tuple(self.grid)))
            return interpret(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", record_interpreted)
    else:
        launch = JITFunction.run

        def record_launched(self: Any, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> Any:
            seen.append((self.fn.__name__, tuple(grid)))
            return launch(self, *args, grid=grid, **kwargs)

        monkeypatch.setattr(JITFunction, "run", record_launched)
    return seen


def full(*values: Any) -> list[Any]:
    """Values of a cross product that the default tier leaves to --full."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.full) for value in values
    ]


def names(launches: Launches) -> list[str]:
    return [name for name, _ in launches]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poison(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.full(shape, NAN, dtype=dtype, device=DEVICE)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher allocates holds NaNs, or numbers that are no token's, until a kernel has written them."""
    empty = torch.empty

    def full(*shape: Any, **kwargs: Any) -> torch.Tensor:
        memory = empty(*shape, **kwargs)
        return memory.fill_(NAN if memory.is_floating_point() else -9)

    monkeypatch.setattr(torch, "empty", full)
