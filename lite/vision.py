"""The vision tower and projector, one ONNX graph run by ONNX Runtime.

    pixel_values float32 [B, 3, S, S] ──▶ image_features float32 [B, P, C]

The graph may compute in float16 inside; what goes in and comes out is float32. B is free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lite.artifact import VISION_NAME
from lite.errors import ArtifactError
from lite.onnx_session import open_session, provider_of_device

if TYPE_CHECKING:
    from lite.artifact import Artifact

INPUT_NAME = "pixel_values"
OUTPUT_NAME = "image_features"


class VisionEncoder:
    """Pixels to the embeddings that take the image's place in the prompt."""

    def __init__(self, artifact: Artifact, *, device: str = "cpu", provider: str | None = None) -> None:
        """Load the graph.

        Args:
            artifact: a checked artifact.
            device: "cpu", "cuda" or "cuda:N". Where this ONNX Runtime has no CUDA provider the CPU is used;
                `provider` says what was.
            provider: from `check_provider`: use this one instead. What it lacks is computed on the CPU.

        Raises:
            ArtifactError: the file is not the graph the manifest describes.
            BackendUnavailable: onnxruntime is not installed.
        """
        file = artifact.file(VISION_NAME)
        self._session = open_session(file, provider=provider or provider_of_device(device))
        self._part = artifact.manifest.vision
        self._check_signature(str(file))

    @property
    def provider(self) -> str:
        """The ONNX Runtime execution provider in use, such as "CPUExecutionProvider"."""
        name: str = self._session.get_providers()[0]
        return name

    def __call__(self, pixel_values: np.ndarray) -> np.ndarray:
        """Run the tower and the projector.

        Args:
            pixel_values: float32 [B, 3, S, S], from `lite.image.preprocess`.

        Returns:
            image_features, float32 [B, P, C].
        """
        features: np.ndarray = self._session.run([OUTPUT_NAME], {INPUT_NAME: pixel_values})[0]
        return features

    def _check_signature(self, file: str) -> None:
        """Compare names, types and fixed dimensions with the manifest, so that a wrong graph fails at load."""
        part = self._part
        pixels = (INPUT_NAME, (3, part.image_size, part.image_size))
        features = (OUTPUT_NAME, (part.num_image_tokens, part.hidden_size))
        for kind, values, (name, fixed) in (
            ("input", self._session.get_inputs(), pixels),
            ("output", self._session.get_outputs(), features),
        ):
            got = [f"{value.name} {value.type} {value.shape}" for value in values]
            named = [value for value in values if value.name == name]
            fits = len(values) == len(named) == 1 and named[0].type == "tensor(float)"
            fits = fits and len(named[0].shape) == len(fixed) + 1
            # A dimension that export left symbolic has a name instead of a number: nothing to compare.
            if not fits or any(isinstance(g, int) and g != f for g, f in zip(named[0].shape[1:], fixed, strict=True)):
                msg = (
                    f"{file}: got {kind} {', '.join(got)} · expected {name} tensor(float) [B, "
                    f"{', '.join(map(str, fixed))}] by the manifest · export the artifact again"
                )
                raise ArtifactError(msg)
