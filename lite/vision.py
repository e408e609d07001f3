"""The vision tower and the projector, two ONNX graphs run by ONNX Runtime.

    pixel_values [B, 3, S, S] ─tower─▶ patches [B, P, D] ─(fewer: lite.image_tokens)─▶ [B, T, D] ─projector─▶ [B, T, C]

The graphs may compute in float16 inside; what goes in and comes out is float32. B and T are free. In between patches
pass through the host: 4 MB of a film at 518 pixels.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lite.engines.cuda_lock import CAPTURING
from lite.engines.onnx_session import CPU, CUDA, errors_explained, open_session
from lite.engines.protocol import NO_ADAPTER
from lite.errors import ArtifactError
from lite.image_tokens import reduce_patches

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lite.artifact.open import Artifact

PIXELS, PATCHES, ATTENTION, FEATURES = "pixel_values", "patch_features", "class_attention", "image_features"


class Buffer(Protocol):
    """Memory of another library's that features are written to, such as a tensor of torch's."""

    @property
    def device(self) -> Any:  # noqa: ANN401 - of that library
        """Where it is: as text "cpu", "cuda" or "cuda:N"."""

    @property
    def shape(self) -> Any:  # noqa: ANN401
        """[B, T, C]."""

    def data_ptr(self) -> int:
        """Return its address."""


class VisionEncoder:
    """Pixels to the embeddings that take the image's place in the prompt."""

    def __init__(self, artifact: Artifact, *, provider: str = CPU, adapters: Sequence[str] = ()) -> None:
        """Load the graphs.

        Args:
            artifact: a checked artifact.
            adapters: whose projectors are loaded, too, of those that have one.
            provider: from `check_provider` or `provider_of_device`. What it lacks is computed on the CPU, and all of it
                where it does not start; `provider` says what computes.

        Raises:
            ArtifactError: the file is not the graph the manifest describes.
            BackendUnavailable: onnxruntime is not installed.
        """
        self._part = part = artifact.manifest.parts.vision
        tower, width = artifact.file(part.graph), part.tower.hidden_size
        self._tower = open_session(tower, provider=provider)
        patches = (part.num_patches, width)
        pixels = (3, part.image_size, part.image_size)
        check_signature(self._tower, tower, {PIXELS: pixels}, {PATCHES: patches, ATTENTION: patches[:1]})

        def projector(name: str) -> Any:  # noqa: ANN401 - of ONNX Runtime
            session = open_session(artifact.file(name), provider=provider)
            check_signature(
                session, artifact.file(name), {PATCHES: (None, width)}, {FEATURES: (None, part.hidden_size)}
            )
            return session

        self._projector = projector(part.projector)
        own = [artifact.adapter_part(name).projector for name in adapters]
        self._projectors = [self._projector if name is None else projector(name) for name in own]

    @property
    def provider(self) -> str:
        """The ONNX Runtime execution provider in use, such as "CPUExecutionProvider"."""
        name: str = self._projector.get_providers()[0]
        return name

    def __call__(self, pixel_values: np.ndarray, out: Buffer | None = None, *, adapter: int = NO_ADAPTER) -> Any:  # noqa: ANN401 - an array, or out
        """Run the tower and the projector.

        Args:
            pixel_values: float32 [B, 3, S, S], from `lite.image.preprocess.preprocess`.
            out: contiguous float32 [B, T, C] that nobody writes or reads meanwhile. Where the provider computes on the
                same device, the features are written there and never pass through the host.
            adapter: its place among those that were loaded: it may have another projector.

        Returns:
            image_features, float32 [B, T, C]: `out` if it was written to, or else a numpy array.

        Raises:
            MemoryBudgetError: a GPU is full.
            LiteError: ONNX Runtime fails.
        """
        place = None if out is None else self._place(out.device)
        projector = self._projector if adapter == NO_ADAPTER else self._projectors[adapter]
        # On a GPU ONNX Runtime waits for all of it, which a capture in another thread would not survive.
        with CAPTURING if self.provider == CUDA else contextlib.nullcontext(), errors_explained(self.provider):
            patches = self.patches(pixel_values)
            if out is None or place is None:
                return projector.run([FEATURES], {PATCHES: patches})[0]
            binding = projector.io_binding()
            binding.bind_cpu_input(PATCHES, patches)
            binding.bind_output(FEATURES, *place, np.float32, tuple(out.shape), out.data_ptr())
            projector.run_with_iobinding(binding)  # it has ended when this returns
        return out

    def patches(self, pixel_values: np.ndarray) -> np.ndarray:
        """Run the tower; return as many vectors as there are to be image tokens, [B, T, D], in one piece."""
        part = self._part
        if part.num_image_tokens == part.num_patches:
            whole: np.ndarray = self._tower.run([PATCHES], {PIXELS: pixel_values})[0]
            return whole
        patches, attention = self._tower.run([PATCHES, ATTENTION], {PIXELS: pixel_values})
        pairs = zip(patches, attention, strict=True)
        return np.stack([reduce_patches(*pair, part.num_image_tokens, part.image_method) for pair in pairs])

    def writes_to(self, device: object) -> bool:
        """Say whether features can be written to that device's memory without a copy: a name such as "cuda:0"."""
        return self._place(device) is not None

    def _place(self, where: object) -> tuple[str, int] | None:
        """Return what ONNX Runtime calls a device; None where its provider does not write there."""
        device, _, index = str(where).partition(":")
        if device == "cpu":
            return ("cpu", 0) if self.provider == CPU else None
        options = self._projector.get_provider_options().get(CUDA, {})
        same = device == "cuda" and self.provider == CUDA and int(options.get("device_id", 0)) == int(index or 0)
        return ("cuda", int(index or 0)) if same else None


def check_signature(
    session: Any,  # noqa: ANN401 - ONNX Runtime's have no types
    file: Path,
    inputs: Mapping[str, tuple[int | None, ...]],
    outputs: Mapping[str, tuple[int | None, ...]],
) -> None:
    """Compare names, types and fixed dimensions with the manifest, so that a wrong graph fails at load.

    Values are float32, but for ids, whose names end in `_ids`. A dimension of None is free; so is one that export left
    symbolic, which has a name instead of a number.
    """
    for kind, values, expected in (("input", session.get_inputs(), inputs), ("output", session.get_outputs(), outputs)):
        fits = [value.name for value in values] == list(expected)
        fits = fits and all(_fits(value, expected[value.name]) for value in values)
        if not fits:
            got = ", ".join(f"{value.name} {value.type} {value.shape}" for value in values)
            wanted = ", ".join(
                f"{name} {_type_of(name)} [B, {', '.join('T' if size is None else str(size) for size in shape)}]"
                for name, shape in expected.items()
            )
            msg = f"{file}: got {kind} {got} · expected {wanted} by the manifest · export the artifact again"
            raise ArtifactError(msg)


def _fits(value: Any, expected: tuple[int | None, ...]) -> bool:  # noqa: ANN401
    if value.type != _type_of(value.name) or len(value.shape) != len(expected) + 1:
        return False
    pairs = zip(value.shape[1:], expected, strict=True)
    return all(not isinstance(got, int) or size is None or got == size for got, size in pairs)


def _type_of(name: str) -> str:
    return "tensor(int64)" if name.endswith("_ids") else "tensor(float)"
