"""One lock between a thread that captures a CUDA graph and those that wait for the whole GPU.

Who waits for a device (`cudaDeviceSynchronize`, as ONNX Runtime does here and there) while another thread captures may
end that capture. This module imports nothing, so that it may be held without torch.
"""

from __future__ import annotations

import threading
from typing import Final

CAPTURING: Final = threading.Lock()
"""Held while a graph is captured, and while ONNX Runtime computes on a GPU."""
