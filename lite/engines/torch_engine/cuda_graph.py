"""A step of decoding as one CUDA graph: some 400 launches become one, and the GPU no longer waits for Python.

The first run of a step is an ordinary one: Triton compiles what it needs, cuBLAS makes its handles. Before the second
one the step is captured, which computes nothing; from then on it is replayed. A capture that fails leaves the ordinary
way, and says why.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from lite.engines.cuda_lock import CAPTURING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Step = Callable[[], Tensor]
    """Reads and writes tensors that stay where they are, and returns one; never waits for the device."""
    Capture = Callable[[Step], Step]
    """Turns a step into one that does the same from the same places, and returns the same tensor each time."""


def capture_cuda_graph(step: Step, *, device: torch.device) -> Step:
    """Capture a step that has run at least once, and whose tensors are on that GPU.

    Raises:
        RuntimeError: the step does what a graph cannot hold, or the driver is too old.
    """
    graph = torch.cuda.CUDAGraph()
    with (
        CAPTURING,
        torch.cuda.device(device),
        # Of its own accord torch does not come back from the stream of a capture that fails.
        torch.cuda.stream(torch.cuda.current_stream(device)),
        # What a capture leaves behind in torch's generators would else be of use in inference mode only.
        torch.inference_mode(mode=False),
        torch.no_grad(),
        # "thread_local": another thread may allocate memory meanwhile, for a request of its own.
        torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"),
    ):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a device's one stream for captures: cuBLAS has a workspace for each, and torch's own is of one device."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class GraphedStep:
    """A step that is captured on its second run, if it can be."""

    def __init__(self, step: Step, capture: Capture | None) -> None:
        """Take a step; None captures nothing."""
        self._run = step
        self._capture = capture
        self._has_run = False
        self.is_captured = False
        self.problem: str | None = None
        """Why it could not be captured."""

    def __call__(self) -> Tensor:
        """Run the step."""
        if self._has_run and self._capture is not None:
            capture, self._capture = self._capture, None
            try:
                self._run, self.is_captured = capture(self._run), True
            except RuntimeError as error:  # of CUDA, the driver, or an op that waits for the device
                first = _first_of(error)
                self.problem = (str(first).strip().splitlines() or [type(first).__name__])[0]
        self._has_run = True
        return self._run()


def _first_of(error: BaseException) -> BaseException:
    """Return what went wrong first: that the capture has then ended wrongly, too, says nothing."""
    while error.__context__ is not None:
        error = error.__context__
    return error
