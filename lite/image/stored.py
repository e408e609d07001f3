"""The stored values of a DICOM film: the same whatever transfer syntax they come in.

A header says which bits of a sample are the value: BitsStored of them, the highest of which is HighBit; the others may
hold an old overlay or noise. Decoders disagree on whether they apply that, so here they give what is in the file, and
one function makes values of it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from lite.image.codestream import check_codestream
from lite.image.header import text_of
from lite.image.layout import number, several_frames
from lite.image.rendering import refusal

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pydicom.pixels.decoders.base import Decoder
    from pydicom.uid import UID

    from lite.image.layout import Layout

DICOM_EXTRA: Final = 'pip install "llava-rad-lite[dicom]"'
_EXTENDED: Final = "1.2.840.10008.1.2.4.51"
_BASELINE: Final = "1.2.840.10008.1.2.4.50"
_LOSSLESS: Final = "1.2.840.10008.1.2.4.57"


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
    if not syntax.is_compressed and (films := len(data) // max(layout.num_bytes, 2)) > 1:
        raise several_frames(name, films)
    decoder = _decoder(syntax, name)
    if syntax.is_compressed and (stream := check_codestream(data, layout, syntax, name)):
        precision, signed = stream.precision, stream.signed
        if syntax == _EXTENDED and precision > 8:
            # GDCM reads 12 bits as a process of lossless JPEG's family; pydicom does not ask it to.
            decoder = _decoder(_LOSSLESS, name)
    raw = _decoded(decoder, data, dataset, layout, precision, name)
    # A codestream of no more bits than are stored holds these alone, wherever HighBit would have them.
    shift = layout.high_bit + 1 - layout.stored if precision > layout.stored else 0
    bits = layout.stored if signed else min(layout.stored, precision)
    if layout.samples == 3:
        return _extract(raw, shift, bits, signed=False), None
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
    first = number(dataset, "PixelPaddingValue", name)
    last = number(dataset, "PixelPaddingRangeLimit", name, first)
    width = raw.dtype.itemsize * 8
    kind = np.dtype(f"{'i' if layout.signed else 'u'}{raw.dtype.itemsize}")
    ends = np.array([first % (1 << width), last % (1 << width)], f"u{raw.dtype.itemsize}").view(kind)
    values = _extract(raw, shift, bits, layout.signed)
    places = [(values, ends), (raw.view(kind), ends)]
    if layout.signed and min(first, last) >= 0 and max(first, last) < 1 << bits:  # a negative one, bit by bit
        places.insert(1, (values, _extract(ends, 0, bits, signed=True)))
    for values, limits in places:
        found: NDArray[np.bool_] = (values >= limits.min()) & (values <= limits.max())
        if found.any():
            return found
    return None


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


def _decoded(
    decoder: Decoder, data: bytes, dataset: Dataset, layout: Layout, precision: int, name: str
) -> NDArray[Any]:
    """Return the samples as they are in the file."""
    if gdcm := sys.modules.get("gdcm"):  # which pydicom has loaded; what is wrong it says by its exceptions, too
        gdcm.Trace.WarningOff()
        gdcm.Trace.ErrorOff()
    options: dict[str, Any] = {
        "rows": layout.rows,
        "columns": layout.columns,
        "number_of_frames": 1,
        "samples_per_pixel": layout.samples,
        # Baseline JPEG has 8 bits, also where they were to become 16.
        "bits_allocated": 8 if decoder.UID == _BASELINE else layout.allocated,
        "bits_stored": precision,  # by which GDCM chooses its decoder
        "photometric_interpretation": layout.photometric,
        "pixel_representation": int(layout.signed),
        "pixel_keyword": "PixelData",
        "pixel_vr": dataset["PixelData"].VR,  # big-endian words of two 8-bit samples
        "correct_unused_bits": False,
        "apply_j2k_sign_correction": False,
        "apply_jls_sign_correction": False,
    }
    if layout.samples == 3:
        # Codestreams keep colours together, whatever the header says; RLE never does, and its decoder knows.
        native = not decoder.UID.is_compressed
        options["planar_configuration"] = number(dataset, "PlanarConfiguration", name, 0) if native else 0
    pixels, _ = decoder.as_array(data, index=0, **options)
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
