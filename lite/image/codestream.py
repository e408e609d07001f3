"""What a compressed film says of itself."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lite.image.layout import several_frames
from lite.image.rendering import refusal

if TYPE_CHECKING:
    from pydicom.uid import UID

    from lite.image.layout import Layout

RLE: Final = "1.2.840.10008.1.2.5"
_JPEG_LS: Final = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
_JPEG_2000: Final = tuple(f"1.2.840.10008.1.2.4.{n}" for n in (90, 91, 92, 93, 201, 202, 203))


@dataclass(frozen=True, slots=True)
class Codestream:
    """What a compressed film says of itself."""

    kind: str  # "JPEG", "JPEG-LS" or "JPEG 2000"
    columns: int
    rows: int
    samples: int
    precision: int
    signed: bool = False


def read_codestream(data: bytes) -> Codestream | None:
    """Read what a JPEG, JPEG-LS or JPEG 2000 codestream says of itself; None: it is none of them.

    Source: ITU-T T.81 B.2.2 (frame header), T.87 C.2.2, T.800 A.5.1 (SIZ).
    """
    boxed = data[4:8] == b"jP  "  # a JP2 file, which has boxes before the codestream
    start = data.find(b"\xff\x4f\xff\x51", 0, 1 << 16 if boxed else 4)
    if start >= 0 and len(data) >= start + 43:
        width, height, left, top = struct.unpack(">4I", data[start + 8 : start + 24])
        (samples,) = struct.unpack(">H", data[start + 40 : start + 42])
        depth = data[start + 42]
        return Codestream("JPEG 2000", width - left, height - top, samples, (depth & 0x7F) + 1, depth > 0x7F)
    found: Codestream | None = None
    place = 2 if data[:2] == b"\xff\xd8" else len(data)
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            precision, height, width, samples = struct.unpack(">BHHB", data[place + 4 : place + 10])
            found = Codestream("JPEG-LS" if marker == 0xF7 else "JPEG", width, height, samples, precision)
        if marker == 0xDA:  # the scan: without it the frame is cut short
            return found
        # A marker may be filled up with 0xFF, and those without a length are two bytes.
        alone = marker == 0x01 or 0xD0 <= marker <= 0xD8
        place += 1 if marker == 0xFF else 2 if alone else 2 + struct.unpack(">H", data[place + 2 : place + 4])[0]
    return None


def check_codestream(data: bytes, layout: Layout, syntax: UID, name: str) -> Codestream | None:
    """Hold the compressed film against its header; None where the syntax says nothing of itself (RLE)."""
    from pydicom.encaps import generate_fragments, generate_frames, parse_basic_offsets

    again = "export or compress the film again"
    try:
        frame = next(generate_frames(data, number_of_frames=1), b"")
        fragments = io.BytesIO(data)
        parse_basic_offsets(fragments)
        starts = sum(fragment[:4] == frame[:4] for fragment in generate_fragments(fragments))
    except Exception as error:
        raise refusal(name, "damaged or truncated fragments", f"a whole {syntax.name} film", again) from error
    if not frame:
        got = f"pixel data of 0 bytes, expected a {syntax.name} codestream"
        raise refusal(name, got, "a film", "export the film again, with its pixels")
    if starts > 1:
        raise several_frames(name, starts)
    if syntax == RLE:
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
