"""The process of the vision tower: `python -m benchmarks.speed.peers.tower ARTIFACT DEVICE`, started by `measure`."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from benchmarks.speed.peers.worker import serve
from lite.artifact.open import load_artifact
from lite.engines.onnx_session import import_onnxruntime, provider_of_device
from lite.vision import VisionEncoder


class Tower:
    """The tower of an artifact, and an image of noise."""

    def __init__(self, path: str, device: str) -> None:
        """Load the tower, and run it once untimed."""
        artifact = load_artifact(path)
        self.encoder = VisionEncoder(
            artifact, provider=provider_of_device(device, import_onnxruntime().get_available_providers())
        )
        size = artifact.manifest.parts.vision.image_size
        self.pixel_values = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
        self.look()

    def about(self) -> dict[str, Any]:
        """Say what computes."""
        return {"provider": self.encoder.provider}

    def look(self) -> None:
        """Look at the image."""
        self.encoder(self.pixel_values)

    def round(self) -> dict[str, Any]:
        """Time an image."""
        started = time.perf_counter()
        self.look()
        return {"seconds": time.perf_counter() - started}


if __name__ == "__main__":
    sys.exit(serve(lambda: Tower(*sys.argv[1:])))
