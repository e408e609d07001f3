"""The stored values of a DICOM film: the same whatever transfer syntax they come in.

A header says which bits of a sample are the value: BitsStored of them, the highest of which is HighBit; the others may
hold an old overlay or noise. Decoders disagree on whether they apply that, so here they give what is in the file, and
one function makes values of it.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from lite.image.header import text_of
from lite.image.rendering import check_size, refusal

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pydicom.pixels.decoders.base import Decoder
    from pydicom.uid import UID

DICOM_EXTRA: Final = 'pip install "llava-rad-lite[dicom]"'
_EXTENDED: Final = "1.2.840.10008.1.2.4.51"
_LOSSLESS: Final = "1.2.840.10008.1.2.4.57"
_RLE: Final = "1.2.840.10008.1.2.5"
_JPEG_LS: Final = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
_JPEG_2000: Final = tuple(f"1.2.840.10008.1.2.4.{n}" for n in (90, 91, 92, 93, 201, 202, 203))
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


@dataclass(frozen=True, slots=True)
class Codestream:
    """What a compressed film says of itself."""

    kind: str  # "JPEG", "JPEG-LS" or "JPEG 2000"
    columns: int
    rows: int
    samples: int
    precision: int
    signed: bool = False


def _number(dataset: Dataset, keyword: str, name: str, default: int | None = None) -> int:
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
    if (frames := _number(dataset, "NumberOfFrames", name, 1)) != 1:
        raise refusal(name, f"{frames} frames", "one film", "save the frame you mean as a file of its own")
    rows, columns, allocated = (_number(dataset, word, name) for word in ("Rows", "Columns", "BitsAllocated"))
    if not (photometric := text_of(dataset, "PhotometricInterpretation").upper()):
        got = "a DICOM file without PhotometricInterpretation"
        raise refusal(name, got, "a complete header", "export the film again")
    check_size(name, columns, rows)
    check_density(name, rows * columns, num_bytes)
    stored = _number(dataset, "BitsStored", name, allocated)
    high_bit = _number(dataset, "HighBit", name, stored - 1)
    sign = _number(dataset, "PixelRepresentation", name, 0)
    samples = _number(dataset, "SamplesPerPixel", name, 1)
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


def check_density(name: str, num_pixels: int, num_bytes: int) -> None:
    """Refuse a film that a file of its size cannot hold: a few bytes that swell to hundreds of MB."""
    if num_pixels > 1_000_000 and num_pixels > _MOST_PIXELS_A_BYTE * num_bytes:
        expected = f"at most {_MOST_PIXELS_A_BYTE} pixels a byte"
        do = "check how it was made: there is nothing on it, or it is damaged; nothing was decoded"
        raise refusal(name, f"{num_pixels:,} pixels in {num_bytes:,} bytes", expected, do)


def read_codestream(data: bytes) -> Codestream | None:
    """Read what a JPEG, JPEG-LS or JPEG 2000 codestream says of itself; None: it is none of them.

    Source: ITU-T T.81 B.2.2 (frame header), T.87 C.2.2, T.800 A.5.1 (SIZ).
    """
    start = data.find(b"\xff\x4f\xff\x51", 0, 512)
    if start >= 0 and len(data) >= start + 43:
        width, height, left, top = struct.unpack(">4I", data[start + 8 : start + 24])
        (samples,) = struct.unpack(">H", data[start + 40 : start + 42])
        depth = data[start + 42]
        return Codestream("JPEG 2000", width - left, height - top, samples, (depth & 0x7F) + 1, depth > 0x7F)
    place = 2 if data[:2] == b"\xff\xd8" else len(data)
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            precision, height, width, samples = struct.unpack(">BHHB", data[place + 4 : place + 10])
            return Codestream("JPEG-LS" if marker == 0xF7 else "JPEG", width, height, samples, precision)
        # A marker may be filled up with 0xFF, and those without a length are two bytes.
        alone = marker == 0x01 or 0xD0 <= marker <= 0xD8
        place += 1 if marker == 0xFF else 2 if alone else 2 + struct.unpack(">H", data[place + 2 : place + 4])[0]
    return None


def stored_values(
    dataset: Dataset, layout: Layout, syntax: UID, name: str
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Decode the film.

    Args:
        dataset: with PixelData.
        layout: of it.
        syntax: the transfer syntax.
        name: what it is called in errors.

    Returns:
        The values, [rows, columns] of integers, or [rows, columns, 3] of colours as RGB; and where they are padding,
        bool [rows, columns], None where they are nowhere.

    Raises:
        ImageError: damaged, or compressed in a way that no installed decoder reads.
    """
    data = dataset.PixelData or b""
    if not data:
        got = f"pixel data of 0 bytes, expected {layout.num_bytes:,}"
        raise refusal(name, got, "a film", "export the film again, with its pixels")
    precision, signed = layout.allocated, layout.signed
    if not syntax.is_compressed and len(data) < layout.num_bytes:
        got = f"pixel data of {len(data):,} bytes, expected {layout.num_bytes:,}: it was cut short"
        raise refusal(name, got, "a whole film", "copy or export it again")
    decoder = _decoder(syntax, name)
    if syntax.is_compressed and (stream := _checked_codestream(data, layout, syntax, name)):
        precision, signed = stream.precision, stream.signed
        if syntax == _EXTENDED and precision > 8:
            # GDCM reads 12 bits as a process of lossless JPEG's family; pydicom does not ask it to.
            decoder = _decoder(_LOSSLESS, name)
    raw = _decoded(decoder, data, dataset, layout, name)
    if layout.samples == 3:
        return raw, None
    # A codestream of no more bits than are stored holds these alone, wherever HighBit would have them.
    shift = layout.high_bit + 1 - layout.stored if precision > layout.stored else 0
    bits = layout.stored if signed else min(layout.stored, precision)
    return _extract(raw, shift, bits, layout.signed), _padding(raw, dataset, layout, shift, bits, name)


def _extract(raw: NDArray[Any], shift: int, bits: int, signed: bool) -> NDArray[Any]:
    """Keep `bits` bits above `shift`; signed values keep their sign."""
    width = raw.dtype.itemsize * 8
    if shift == 0 and bits == width:
        return raw
    up = width - shift - bits
    kind = np.dtype(f"{'i' if signed else 'u'}{raw.dtype.itemsize}")
    values: NDArray[Any] = (raw.view(kind) << kind.type(up)) >> kind.type(up + shift)
    return values


def _padding(
    raw: NDArray[Any],
    dataset: Dataset,
    layout: Layout,
    shift: int,
    bits: int,
    name: str,
) -> NDArray[np.bool_] | None:
    """Find the samples that PixelPaddingValue says are no picture, up to PixelPaddingRangeLimit.

    Some files give the value as it is stored, others with the bits that are not used.
    """
    if not text_of(dataset, "PixelPaddingValue"):
        return None
    first = _number(dataset, "PixelPaddingValue", name)
    last = _number(dataset, "PixelPaddingRangeLimit", name, first)
    width = raw.dtype.itemsize * 8
    kind = np.dtype(f"{'i' if layout.signed else 'u'}{raw.dtype.itemsize}")
    ends = np.array([first % (1 << width), last % (1 << width)], f"u{raw.dtype.itemsize}").view(kind)
    fits = bool((_extract(ends, shift, bits, layout.signed) == ends).all())
    values = _extract(raw, shift, bits, layout.signed) if fits else raw.view(kind)
    found = (values >= ends.min()) & (values <= ends.max())
    return found if found.any() else None


def _checked_codestream(data: bytes, layout: Layout, syntax: UID, name: str) -> Codestream | None:
    """Hold the compressed film against its header; None where the syntax says nothing of itself (RLE)."""
    from pydicom.encaps import generate_frames

    again = "export or compress the film again"
    try:
        frame = next(generate_frames(data, number_of_frames=1), b"")
    except Exception as error:
        raise refusal(name, "damaged or truncated fragments", f"a whole {syntax.name} film", again) from error
    if not frame:
        got = f"pixel data of 0 bytes, expected a {syntax.name} codestream"
        raise refusal(name, got, "a film", "export the film again, with its pixels")
    if syntax == _RLE:
        segments, wanted = int.from_bytes(frame[:4], "little"), layout.samples * ((layout.allocated + 7) // 8)
        if segments != wanted:
            raise refusal(name, f"RLE data of {segments} segments", f"the header's {wanted}", again)
        return None
    kind = "JPEG-LS" if syntax in _JPEG_LS else "JPEG 2000" if syntax in _JPEG_2000 else "JPEG"
    if (stream := read_codestream(frame)) is None:
        raise refusal(name, f"no {kind} codestream ({syntax.name})", "a whole one: it is damaged or truncated", again)
    got = f"a {stream.kind} codestream of {stream.columns} x {stream.rows} px, {stream.samples} samples"
    if (stream.columns, stream.rows, stream.samples) != (layout.columns, layout.rows, layout.samples):
        expected = f"the header's {layout.columns} x {layout.rows} px, {layout.samples} samples"
        raise refusal(name, got, expected, again)
    if stream.kind != kind:
        raise refusal(name, got, f"{syntax.name}, as the header says", again)
    if stream.precision > layout.allocated or (stream.signed and not layout.signed):
        got = f"a {kind} codestream of {stream.precision} {'signed ' if stream.signed else ''}bits"
        expected = f"the header's BitsAllocated {layout.allocated}, PixelRepresentation {int(layout.signed)}"
        raise refusal(name, got, expected, again)
    return stream


def _decoder(syntax: str, name: str) -> Decoder:
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    called = f"{UID(syntax).name} pixel data"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        do = "convert it to an uncompressed or JPEG 2000 DICOM (gdcmconv --raw, dcmdjpeg), or to PNG"
        raise refusal(name, called, "a transfer syntax that pydicom reads", do) from None
    if not decoder.is_available:
        do = f"{DICOM_EXTRA}, or decompress it (dcmdjpeg, gdcmconv --raw)"
        raise refusal(name, called, "an installed decoder for it", do)
    return decoder


def _decoded(decoder: Decoder, data: bytes, dataset: Dataset, layout: Layout, name: str) -> NDArray[Any]:
    """Return the samples as they are in the file."""
    if gdcm := sys.modules.get("gdcm"):  # which pydicom has loaded; what is wrong it says by its exceptions, too
        gdcm.Trace.WarningOff()
        gdcm.Trace.ErrorOff()
    options: dict[str, Any] = {
        "rows": layout.rows,
        "columns": layout.columns,
        "number_of_frames": 1,
        "samples_per_pixel": layout.samples,
        "bits_allocated": layout.allocated,
        "bits_stored": layout.stored,
        "photometric_interpretation": layout.photometric,
        "pixel_representation": int(layout.signed),
        "pixel_keyword": "PixelData",
        "correct_unused_bits": False,
        "apply_j2k_sign_correction": False,
        "apply_jls_sign_correction": False,
    }
    if layout.samples == 3:
        options["planar_configuration"] = _number(dataset, "PlanarConfiguration", name, 0)
    pixels, _ = decoder.as_array(data, **options)
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
