"""What an artifact will take, in bytes, computed before anything of it is loaded."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The parts of the peak, in bytes, for `batch_size` studies at a time."""

    batch_size: int
    libraries_bytes: int  # what the process has resident before: Python and its packages; 0 for a GPU
    decoder_bytes: int  # the decoder's weights, as they lie in memory
    vision_bytes: int  # tower and projector; 0 where they are on another device
    cache_bytes: int
    vision_work_bytes: int  # activations of the tower at their peak
    prefill_work_bytes: int  # activations of the decoder, and the logits

    @property
    def peak_bytes(self) -> int:
        """Everything that stays, and the larger of the two passing parts."""
        stays = self.libraries_bytes + self.decoder_bytes + self.vision_bytes
        return stays + max(self.vision_work_bytes, self.cache_bytes + self.prefill_work_bytes)
