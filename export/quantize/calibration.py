"""What the decoder sees while it is calibrated: sequences of prompt, image and findings, layer after layer.

A sequence is spliced as at run time, with the image features of the exported `vision.onnx`:

    prompt … │ image features (P) │ … prompt │ findings …

Nine tenths and more of its tokens are image tokens, while the loss that counts is that of the findings. So each kind of
token has its weight λ in the Hessian Σ λ_t x_t x_tᵀ that GPTQ rounds by: see `export.quantize.importance`. (Text-only
calibration of such models has been reported worse than rounding to nearest.)

The hidden states of all sequences lie in a file and are read and written a sequence at a time: 128 studies of a 7B
model are 3 GB, which need not be memory.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from export.progress import progress_bar
from export.studies import EncodedStudy, NamedStudies, StudyReader, sha256_of_studies
from lite.config import IMAGE_TOKEN_ID
from lite.files import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

    from export.settings import GptqSettings
    from export.source.checkpoint import Checkpoint
    from lite.artifact.manifest import Manifest

MAX_FINDINGS_TOKENS: Final = 256
KINDS: Final = ("first", "prompt", "image", "findings")
"""Of tokens: position 0, the rest of the prompt, the film's, and those that predict the findings."""
FINDINGS: Final = KINDS.index("findings")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationStudies(NamedStudies):
    """The studies of a calibration."""

    sha256: str

    @property
    def films(self) -> tuple[str, ...]:
        """What tells the films apart from others: the first 16 hex digits of each one's hash, sorted."""
        return tuple(sorted({study.film_sha256[:16] for study in self.studies}))


def read_calibration(checkpoint: Checkpoint, manifest: Manifest, settings: GptqSettings) -> CalibrationStudies:
    """Read the studies to calibrate on.

    Raises:
        LiteError: See `StudyReader.from_list`.
    """
    file = Path(settings.calibration_data or "")
    reader = StudyReader(
        checkpoint.tokenizer,
        manifest,
        max_seq_len=checkpoint.decoder.max_position_embeddings,
        max_tokens=MAX_FINDINGS_TOKENS,
    )
    listed = reader.from_list(
        file, settings.calibration_images, settings.calibration_studies, option="--calibration-images"
    )
    sha256 = sha256_of_studies(listed.studies)
    return CalibrationStudies(data=listed.data, studies=listed.studies, left_out=listed.left_out, sha256=sha256)


class HiddenStates:
    """The hidden states of sequences of some `lengths`, float32 in a file, one sequence in memory at a time."""

    def __init__(self, file: Path, lengths: Sequence[int], hidden_size: int) -> None:
        """Describe the file; `fill` or `beside` makes it."""
        self.file = file
        self.lengths = tuple(lengths)
        self.hidden_size = hidden_size
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)]).tolist()

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return int(self._starts[-1]) * self.hidden_size * 4

    @property
    def complete(self) -> bool:
        """Whether the file is there in full length."""
        return self.file.is_file() and self.file.stat().st_size == self.nbytes

    def beside(self, file: Path) -> HiddenStates:
        """Return the same sequences in another file, which begins empty."""
        other = HiddenStates(file, self.lengths, self.hidden_size)
        with file.open("wb") as stream:
            stream.truncate(other.nbytes)
        return other

    def fill(self, sequences: Iterable[Tensor]) -> None:
        """Write all sequences, in order; the file has its name only when it is complete."""
        with whole_file(self.file) as partial, partial.open("wb") as stream:
            for sequence in sequences:
                stream.write(sequence.float().cpu().contiguous().numpy().data)

    def read(self, index: int) -> Tensor:
        """Return a sequence, float32 [T, hidden_size]."""
        count = self.lengths[index] * self.hidden_size
        values = np.fromfile(self.file, np.float32, count, offset=int(self._starts[index]) * self.hidden_size * 4)
        return torch.from_numpy(values).view(-1, self.hidden_size)

    def write(self, index: int, sequence: Tensor) -> None:
        """Replace a sequence."""
        with self.file.open("r+b") as stream:
            stream.seek(int(self._starts[index]) * self.hidden_size * 4)
            stream.write(sequence.float().cpu().contiguous().numpy().data)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.lengths)

    def remove(self) -> None:
        """Delete the file."""
        self.file.unlink(missing_ok=True)


def embed(study: EncodedStudy, features: Tensor, embeddings: Tensor) -> Tensor:
    """Splice the image, float32 [P, hidden_size], between the prompt's halves: float32 [T, hidden_size].

    The last target is predicted, never read.
    """
    ids = [*study.input_ids, *study.target_ids[:-1]]
    at = ids.index(IMAGE_TOKEN_ID)
    before, after = (embeddings[torch.tensor(part, dtype=torch.long)].float() for part in (ids[:at], ids[at + 1 :]))
    return torch.cat([before, features, after])


def token_kinds(study: EncodedStudy, num_patches: int) -> Tensor:
    """Return the kind of each token of a study, places in `KINDS`, int64 [T]."""
    kinds = torch.full((study.num_tokens(num_patches),), FINDINGS)
    # The last token of the prompt is the one that predicts the first of the findings.
    kinds[: len(study.input_ids) - 2 + num_patches] = KINDS.index("prompt")
    kinds[study.image_at : study.image_at + num_patches] = KINDS.index("image")
    kinds[0] = KINDS.index("first")
    return kinds


def start_states(
    file: Path,
    studies: Sequence[EncodedStudy],
    features: Callable[[EncodedStudy], Tensor],
    embeddings: Tensor,
    num_patches: int,
    *,
    show: bool,
) -> HiddenStates:
    """Write the decoder's inputs for some studies to a file; `features` runs the tower on one: [P, hidden_size]."""
    states = HiddenStates(file, [study.num_tokens(num_patches) for study in studies], embeddings.shape[1])
    films = progress_bar("reading the films", studies, unit="film", show=show)
    states.fill(embed(study, features(study), embeddings) for study in films)
    return states
