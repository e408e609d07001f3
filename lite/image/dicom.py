"""DICOM files: read, held against the rules of a film, turned upright, rendered."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lite.errors import BackendUnavailable
from lite.image.film import FilmInfo, LoadedImage, Rendering
from lite.image.header import body_part_of, directions, orientation_of, text_of, turn_of, view_of
from lite.image.layout import Layout, read_layout
from lite.image.levels import count_levels
from lite.image.quiet import quietly
from lite.image.rendering import FORMATS_TEXT, decoding, grey_of, refusal, render
from lite.image.rules import check_header, check_values
from lite.image.stored import DICOM_EXTRA, stored_values
from lite.image.voi import render_voi

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pydicom.uid import UID

_DEFLATED: Final = "1.2.840.10008.1.2.1.99"
_MAX_INFLATED: Final = 256 * 1024**2
_GREY: Final = ("MONOCHROME1", "MONOCHROME2")
_COLOUR: Final = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_VRS: Final = "AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST TM UI UL UN US UT UV"


@dataclass(slots=True, kw_only=True)
class _Film:
    """A DICOM film between reading and rendering."""

    values: NDArray[Any]  # [H, W] stored, or [H, W, 3] colours
    layout: Layout
    info: dict[str, Any]  # of its FilmInfo
    remarks: list[str]
    picture: NDArray[np.uint8] | None = None  # where the file's own window has made one
    rendering: str = ""


def is_dicom(data: bytes) -> bool:
    """Say whether these bytes begin as a DICOM file does, with a preamble or without."""
    if data[128:132] == b"DICM":
        return True
    if len(data) < 16 or data[:2] not in (b"\x02\0", b"\x08\0", b"\0\x08"):
        return False
    if data[4:6].decode("latin-1") in _VRS.split():
        return True
    group, element, length = struct.unpack("<HHI", data[:8])
    return bool(group == 8 and element <= 0x18 and length < len(data))


def load_dicom(source: bytes | Dataset, name: str, rendering: Rendering, *, any_film: bool) -> LoadedImage:
    """Read a DICOM file, its bytes or what pydicom has made of them.

    Raises:
        ImageError: a rule refuses it (`lite.image.rules`), or it cannot be read.
        BackendUnavailable: pydicom is not installed.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        msg = f"{name}: got a DICOM file and no pydicom · expected pydicom · {DICOM_EXTRA}"
        raise BackendUnavailable(msg) from error
    with decoding(name, "a whole DICOM file"):
        with quietly() as complaints:
            film = _read_film(source, name, rendering, any_film=any_film)
        if complaints:
            got = f"damaged pixel data ({complaints[0]})"
            raise refusal(name, got, "a whole film", "copy or export it again")
        if film.picture is not None:
            picture = Image.fromarray(film.picture).convert("RGB")
        else:
            inverted = film.layout.photometric == "MONOCHROME1"
            picture, film.rendering = render(film.values, rendering, name, monochrome1=inverted)
        info = FilmInfo(format="DICOM", **film.info, remarks=tuple(film.remarks))
        return LoadedImage(image=picture, rendering=film.rendering, film=info)


def _read_film(source: bytes | Dataset, name: str, rendering: Rendering, *, any_film: bool) -> _Film:
    dataset, syntax, cut_short = _parsed(source, name)
    remarks = check_header(dataset, name, any_film=any_film)
    if "PixelData" not in dataset:
        if cut_short:
            raise refusal(name, "a file that was cut short", "a whole DICOM file", "copy or download it again")
        do = "pass the image itself, not its report, index or header; copy it again if it should have them"
        raise refusal(name, "a DICOM file without pixel data", "a film", do)
    num_bytes = len(source) if isinstance(source, bytes) else len(dataset.PixelData or b"")
    layout = read_layout(dataset, name, num_bytes)
    if layout.photometric not in (*_GREY, *_COLOUR, "PALETTE COLOR"):
        do = "convert the film to MONOCHROME2 (dcmconv, dcmdjpeg) or to PNG"
        raise refusal(name, f"photometric interpretation {layout.photometric}", "MONOCHROME1 or MONOCHROME2", do)
    values, padding = stored_values(dataset, layout, syntax, name)
    ways = directions(dataset)
    turn = turn_of(ways) if ways else None
    view, view_source, words = view_of(dataset)
    film = _Film(
        values=_turned(values, turn),
        layout=layout,
        info={
            "transfer_syntax": str(syntax.name),
            "view": (view if view in ("AP", "PA") else words or view) or None,
            "view_source": view_source or None,
            "body_part": body_part_of(dataset),
            "orientation": orientation_of(dataset),
            "turned": turn[0] if turn else None,
        },
        remarks=remarks,
    )
    padding = None if padding is None else _turned(padding, turn)
    if layout.photometric in _GREY:
        _leave_out_padding(film, padding, name)
    _check_shown(film, dataset, name, any_film=any_film)
    if layout.photometric in _GREY and rendering == "voi-lut":
        inverted = layout.photometric == "MONOCHROME1"
        film.picture, film.rendering, remark = render_voi(film.values, dataset, name, monochrome1=inverted)
        film.remarks += [remark] if remark else []
        if padding is not None:
            film.picture[padding] = 0
    return film


def _parsed(source: bytes | Dataset, name: str) -> tuple[Dataset, UID, bool]:
    """Return a data set, its transfer syntax, and whether the file ends before its last element does."""
    from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    dataset, told, cut_short = _parsed_bytes(source, name) if isinstance(source, bytes) else (source, "", False)
    told = told or str(getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", ""))
    implicit, little = dataset.original_encoding
    native = ImplicitVRLittleEndian if implicit else ExplicitVRBigEndian if little is False else ExplicitVRLittleEndian
    return dataset, UID(told) if told else native, cut_short


def _parsed_bytes(data: bytes, name: str) -> tuple[Dataset, str, bool]:
    from pydicom.filereader import read_dataset, read_partial

    known, has_magic = is_dicom(data), data[128:132] == b"DICM"
    last: list[int] = [0, 0, 0]  # tag, length and place of the last element
    told = ""
    stream = io.BytesIO(data)
    if has_magic or data[:2] == b"\x02\0":
        stream.seek(132 if has_magic else 0)
        meta = read_dataset(stream, False, True, stop_when=lambda tag, _vr, _length: tag >> 16 != 2)
        if (told := text_of(meta, "TransferSyntaxUID")) == _DEFLATED:
            # pydicom would inflate it before anyone can ask how large it is.
            inflater = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
            data = inflater.decompress(data[stream.tell() :], _MAX_INFLATED)
            if inflater.unconsumed_tail:
                expected = f"at most {_MAX_INFLATED:,} bytes once inflated"
                raise refusal(name, "a deflated DICOM file that is larger", expected, "inflate it: dcmconv +te IN OUT")
            stream = io.BytesIO(data)
        else:
            stream.seek(0)

    def note(tag: int, _vr: str | None, length: int) -> bool:
        last[:] = tag, length, stream.tell()
        return False

    dataset = read_partial(stream, stop_when=note, force=True)
    if not known and "Rows" not in dataset and "SOPClassUID" not in dataset:
        raise refusal(name, "a .dcm file that is not DICOM", FORMATS_TEXT, "check what the file is")
    tag, length, place = last
    cut_short = tag not in dataset or (length != 0xFFFFFFFF and place + length > len(data))
    return dataset, told, cut_short


def _turned(values: NDArray[Any], turn: tuple[str, bool, bool, bool] | None) -> NDArray[Any]:
    if turn is None:
        return values
    _, transpose, left_right, up_down = turn
    values = values.swapaxes(0, 1) if transpose else values
    return np.ascontiguousarray(values[:: -1 if up_down else 1, :: -1 if left_right else 1])


def _leave_out_padding(film: _Film, padding: NDArray[np.bool_] | None, name: str) -> None:
    """Give padding the value of the darkest pixel, so that it is black and spends none of the scale."""
    if padding is None:
        return
    if padding.all():
        do = "check PixelPaddingValue, and how the film was exported"
        raise refusal(name, "a film of nothing but padding, one grey level", "a film with something on it", do)
    rest = film.values[~padding]
    film.values = film.values.copy()
    film.values[padding] = rest.max() if film.layout.photometric == "MONOCHROME1" else rest.min()
    film.remarks.append(
        f"padding (PixelPaddingValue) in {padding.mean():.1%} of the film, left out of the scale: black"
    )


def _check_shown(film: _Film, dataset: Dataset, name: str, *, any_film: bool) -> None:
    """Follow the rules for values. Colours of 8 bits are a picture already; deeper ones become grey."""
    if film.layout.photometric == "PALETTE COLOR":
        from pydicom.pixels.processing import apply_color_lut

        film.values = apply_color_lut(film.values, dataset)
        if film.values.dtype == np.uint16 and film.layout.stored <= 8:  # a palette of deeper values holds stored ones
            film.values = (film.values >> max(int(film.values.max()).bit_length() - 8, 0)).astype(np.uint8)
    grey = film.values
    if grey.ndim == 3 and grey.dtype == np.uint8:
        film.picture, film.rendering = grey, "as-is"
        grey = np.asarray(Image.fromarray(grey).convert("L"))
    elif grey.ndim == 3:
        grey, remarks = grey_of(grey)
        film.values = grey
        film.remarks += remarks
    levels = count_levels(grey, monochrome1=film.layout.photometric == "MONOCHROME1")
    film.info["grey_levels"] = levels.num_levels
    film.remarks += check_values(levels, name, any_film=any_film, stored=film.picture is None)
