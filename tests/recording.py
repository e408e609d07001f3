"""A stand-in for a CUDA graph where there is no GPU: a step's operations, recorded once and replayed.

As in a graph, whatever Python decided while the step was recorded is frozen: shapes, addresses, numbers. A step that
takes anything from the host anew for each token, or allocates what it then reads again, gives wrong tokens on replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.overwritten: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self.overwritten.append((value, value.clone()))
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record a step; unlike a capture this also runs it, so what it has written is put back."""
    with _Recorder() as recorder:
        result = step()
    for tensor, before in reversed(recorder.overwritten):
        tensor.copy_(before)
    calls = recorder.calls

    def replay() -> Tensor:
        now: dict[int, Any] = {}  # by what took its place when the step was recorded, which `calls` keeps alive

        def current(value: Any) -> Any:
            return now.get(id(value), value)

        for func, args, kwargs, recorded in calls:
            out = func(*tree_map(current, args), **tree_map(current, kwargs))
            for before, after in zip(tree_iter(recorded), tree_iter(out), strict=True):
                if isinstance(before, Tensor):
                    now[id(before)] = after
        out_now: Tensor = current(result)
        return out_now

    return replay
