"""How the samples of a DICOM film lie, by its header; checked before any is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lite.image.header import text_of
from lite.image.rendering import check_size, refusal

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from lite.errors import ImageError

_MOST_PIXELS_A_BYTE: Final = 200  # a film at 100:1 has 70


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the samples of a film lie, by its header."""

    rows: int
    columns: int
    samples: int
    allocated: int
    stored: int
    high_bit: int
    signed: bool
    photometric: str

    @property
    def num_bytes(self) -> int:
        """The bytes of the film where it is not compressed."""
        bits = self.rows * self.columns * self.samples * self.allocated
        return (bits * 2 // 3 if self.photometric == "YBR_FULL_422" else bits) // 8


def number(dataset: Dataset, keyword: str, name: str, default: int | None = None) -> int:
    """Return an attribute that is a whole number.

    Raises:
        ImageError: it is absent and has no default, or is none.
    """
    text = text_of(dataset, keyword)
    if not text and default is not None:
        return default
    if not text:
        raise refusal(name, f"a DICOM file without {keyword}", "a complete header", "export the film again")
    try:
        return int(text)
    except ValueError:
        raise refusal(name, f"{keyword} {text[:40]}", "a whole number", "export the film again") from None


def read_layout(dataset: Dataset, name: str, num_bytes: int) -> Layout:
    """Read and check the header's word on the pixels, before any is decoded.

    Args:
        dataset: the film.
        name: what it is called in errors.
        num_bytes: of the file.

    Raises:
        ImageError: there is not one whole film; what is wrong is named.
    """
    if (frames := number(dataset, "NumberOfFrames", name, 1)) != 1:
        raise several_frames(name, frames)
    rows, columns, allocated = (number(dataset, word, name) for word in ("Rows", "Columns", "BitsAllocated"))
    if not (photometric := text_of(dataset, "PhotometricInterpretation").upper()):
        got = "a DICOM file without PhotometricInterpretation"
        raise refusal(name, got, "a complete header", "export the film again")
    check_size(name, columns, rows)
    check_density(name, rows * columns, num_bytes)
    stored = number(dataset, "BitsStored", name, allocated)
    high_bit = number(dataset, "HighBit", name, stored - 1)
    sign = number(dataset, "PixelRepresentation", name, 0)
    samples = number(dataset, "SamplesPerPixel", name, 1)
    if allocated not in (1, 8, 16, 32) or not 1 <= stored <= allocated or sign not in (0, 1) or samples not in (1, 3):
        got = (
            f"BitsAllocated {allocated}, BitsStored {stored}, PixelRepresentation {sign}, SamplesPerPixel {samples}, "
            "which do not go together: a damaged or truncated header"
        )
        raise refusal(name, got, "such as 16, 12, 0, 1", "export the film again")
    if samples != (3 if photometric.startswith(("RGB", "YBR")) else 1):
        got = f"SamplesPerPixel {samples}, {photometric}"
        raise refusal(name, got, "one sample for grey and three for colours", "export the film again")
    if not stored <= high_bit + 1 <= allocated:
        high_bit = stored - 1
    return Layout(
        rows=rows,
        columns=columns,
        samples=samples,
        allocated=allocated,
        stored=stored,
        high_bit=high_bit,
        signed=sign == 1,
        photometric=photometric,
    )


def several_frames(name: str, frames: int) -> ImageError:
    """Say that there is not one film in a file."""
    return refusal(name, f"{frames} frames", "one film", "save the frame you mean as a file of its own")


def check_density(name: str, num_pixels: int, num_bytes: int) -> None:
    """Refuse a film that a file of its size cannot hold: a few bytes that swell to hundreds of MB."""
    if num_pixels > 1_000_000 and num_pixels > _MOST_PIXELS_A_BYTE * num_bytes:
        expected = f"at most {_MOST_PIXELS_A_BYTE} pixels a byte"
        do = "check how it was made: there is nothing on it, or it is damaged; nothing was decoded"
        raise refusal(name, f"{num_pixels:,} pixels in {num_bytes:,} bytes", expected, do)
