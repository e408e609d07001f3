"""What an export writes and how it is measured: the settings, and the only place that holds their defaults."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final, Literal, get_args

from lite.errors import ArtifactError

DecoderFormat = Literal["fp16"]
VisionFormat = Literal["fp32", "fp16"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """What to write, and how to measure it.

    Raises:
        ArtifactError: A format is none of those known, or nothing would be measured.
    """

    decoder_format: DecoderFormat = "fp16"
    vision_format: VisionFormat = "fp32"
    """What tower and projector are stored as and computed in."""
    verify_data: str | Path | None = None
    """JSON list of studies in the evaluation format to measure parity on; None takes built-in ones."""
    image_folder: str | Path | None = None
    """Where the images of `verify_data` are; its own folder by default."""
    verify_studies: int = 4
    verify_tokens: int = 64
    """Findings tokens scored per study, at most."""
    device: str = "auto"
    """Where torch computes the measurement: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"."""
    overwrite: bool = False
    """Replace an artifact that is there, once the new one is complete."""
    show_progress: bool = False
    """Draw progress bars on stderr."""

    def __post_init__(self) -> None:
        """Refuse values that no export can have."""
        formats = {"decoder": (self.decoder_format, DecoderFormat), "vision": (self.vision_format, VisionFormat)}
        for part, (chosen, known) in formats.items():
            if chosen not in get_args(known):
                msg = (
                    f"got {part} format {chosen!r} · expected one of {', '.join(get_args(known))} · choose one of them"
                )
                raise ArtifactError(msg)
        for name, count in {"verify_studies": self.verify_studies, "verify_tokens": self.verify_tokens}.items():
            if count < 1:
                raise ArtifactError(f"got {name}={count} · expected at least 1 · an unmeasured export is not kept")


DEFAULTS: Final = ExportSettings()
