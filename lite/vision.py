"""The vision tower and projector, one ONNX graph run by ONNX Runtime.

    pixel_values float32 [B, 3, S, S] ──▶ image_features float32 [B, P, C]

The graph may compute in float16 inside; what goes in and comes out is float32. B is free.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lite.engines.cuda_lock import CAPTURING
from lite.engines.onnx_session import CPU, CUDA, errors_explained, open_session
from lite.errors import ArtifactError

if TYPE_CHECKING:
    from lite.artifact.open import Artifact

INPUT_NAME = "pixel_values"
OUTPUT_NAME = "image_features"


class Buffer(Protocol):
    """Memory of another library's that features are written to, such as a tensor of torch's."""

    @property
    def device(self) -> Any:  # noqa: ANN401 - of that library
        """Where it is: as text "cpu", "cuda" or "cuda:N"."""

    @property
    def shape(self) -> Any:  # noqa: ANN401
        """[B, P, C]."""

    def data_ptr(self) -> int:
        """Return its address."""


class VisionEncoder:
    """Pixels to the embeddings that take the image's place in the prompt."""

    def __init__(self, artifact: Artifact, *, provider: str = CPU) -> None:
        """Load the graph.

        Args:
            artifact: a checked artifact.
            provider: from `check_provider` or `provider_of_device`. What it lacks is computed on the CPU, and all of it
                where it does not start; `provider` says what computes.

        Raises:
            ArtifactError: the file is not the graph the manifest describes.
            BackendUnavailable: onnxruntime is not installed.
        """
        file = artifact.file(artifact.manifest.parts.vision.file)
        self._session = open_session(file, provider=provider)
        self._part = artifact.manifest.parts.vision
        self._check_signature(str(file))

    @property
    def provider(self) -> str:
        """The ONNX Runtime execution provider in use, such as "CPUExecutionProvider"."""
        name: str = self._session.get_providers()[0]
        return name

    def __call__(self, pixel_values: np.ndarray, out: Buffer | None = None) -> Any:  # noqa: ANN401 - an array, or out
        """Run the tower and the projector.

        Args:
            pixel_values: float32 [B, 3, S, S], from `lite.image.preprocess.preprocess`.
            out: contiguous float32 [B, P, C] that nobody writes or reads meanwhile. Where the provider computes on the
                same device, the features are written there and never pass through the host.

        Returns:
            image_features, float32 [B, P, C]: `out` if it was written to, or else a numpy array.

        Raises:
            MemoryBudgetError: a GPU is full.
            LiteError: ONNX Runtime fails.
        """
        place = None if out is None else self._place(out.device)
        # On a GPU ONNX Runtime waits for all of it, which a capture in another thread would not survive.
        with CAPTURING if self.provider == CUDA else contextlib.nullcontext(), errors_explained(self.provider):
            if out is None or place is None:
                return self._session.run([OUTPUT_NAME], {INPUT_NAME: pixel_values})[0]
            binding = self._session.io_binding()
            pixels = np.ascontiguousarray(pixel_values)  # bound by its address
            binding.bind_cpu_input(INPUT_NAME, pixels)
            binding.bind_output(OUTPUT_NAME, *place, np.float32, tuple(out.shape), out.data_ptr())
            self._session.run_with_iobinding(binding)  # it has ended when this returns
        return out

    def writes_to(self, device: object) -> bool:
        """Say whether features can be written to that device's memory without a copy: a name such as "cuda:0"."""
        return self._place(device) is not None

    def _place(self, where: object) -> tuple[str, int] | None:
        """Return what ONNX Runtime calls a device; None where its provider does not write there."""
        device, _, index = str(where).partition(":")
        if device == "cpu":
            return ("cpu", 0) if self.provider == CPU else None
        options = self._session.get_provider_options().get(CUDA, {})
        same = device == "cuda" and self.provider == CUDA and int(options.get("device_id", 0)) == int(index or 0)
        return ("cuda", int(index or 0)) if same else None

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
