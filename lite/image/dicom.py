"""DICOM files: is it a frontal film, and what are its stored values."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lite.errors import BackendUnavailable

if TYPE_CHECKING:
    pass
from lite.image.rendering import (
    FORMATS_TEXT,
    LoadedImage,
    Rendering,
    check_size,
    check_stored,
    decoding,
    min_max,
    refusal,
    render,
)

_DICOM_EXTRA: Final = 'pip install "llava-rad-lite[dicom]"'

# DICOM says what took the picture. What is not listed (CR, DX, secondary captures, nothing at all) may be a film.
_OTHER_MODALITIES: Final = {
    "CT": "a CT slice",
    "MR": "an MR slice",
    "PT": "a PET slice",
    "NM": "a nuclear medicine image",
    "US": "an ultrasound image",
    "IVUS": "an ultrasound image",
    "MG": "a mammogram",
    "XA": "an angiogram",
    "IO": "a dental film",
    "PX": "a panoramic dental film",
    "BMD": "a bone densitometry image",
    "ES": "an endoscopy image",
    "GM": "a microscopy image",
    "SM": "a microscopy image",
    "OP": "an ophthalmic photograph",
    "OPT": "an ophthalmic tomogram",
    "XC": "a photograph",
    "ECG": "an electrocardiogram",
    "SEG": "a segmentation",
    "SR": "a structured report",
    "PR": "a presentation state",
    "KO": "a key object note",
    "DOC": "a document",
    "RTIMAGE": "a radiotherapy image",
    "RTDOSE": "a radiotherapy dose grid",
    "RTSTRUCT": "a radiotherapy structure set",
    "RTPLAN": "a radiotherapy plan",
}
_OTHER_SOP_CLASSES: Final = {
    "1.2.840.10008.5.1.4.1.1.1.2": "MG",
    "1.2.840.10008.5.1.4.1.1.1.2.1": "MG",
    "1.2.840.10008.5.1.4.1.1.1.3": "IO",
    "1.2.840.10008.5.1.4.1.1.1.3.1": "IO",
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "CT",
    "1.2.840.10008.5.1.4.1.1.3.1": "US",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.4.3": "MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "MR",
    "1.2.840.10008.5.1.4.1.1.6.1": "US",
    "1.2.840.10008.5.1.4.1.1.6.2": "US",
    "1.2.840.10008.5.1.4.1.1.12.1": "XA",
    "1.2.840.10008.5.1.4.1.1.12.1.1": "XA",
    "1.2.840.10008.5.1.4.1.1.13.1.3": "MG",
    "1.2.840.10008.5.1.4.1.1.20": "NM",
    "1.2.840.10008.5.1.4.1.1.66.4": "SEG",
    "1.2.840.10008.5.1.4.1.1.104.1": "DOC",
    "1.2.840.10008.5.1.4.1.1.128": "PT",
    "1.2.840.10008.5.1.4.1.1.130": "PT",
    "1.2.840.10008.5.1.4.1.1.481.1": "RTIMAGE",
    "1.2.840.10008.5.1.4.1.1.481.2": "RTDOSE",
}
_OBLIQUE_VIEWS: Final = frozenset({"LAO", "RAO", "LPO", "RPO", "LLO", "RLO"})
_DEFLATED: Final = "1.2.840.10008.1.2.1.99"
_GREY: Final = ("MONOCHROME1", "MONOCHROME2")
_COLOUR: Final = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


# -- DICOM -----------------------------------------------------------------------------------------------------------


def load_dicom(data: bytes, name: str, rendering: Rendering) -> LoadedImage:
    """Read the bytes of a DICOM file.

    Raises:
        ImageError: it is not a frontal film, or cannot be read.
        BackendUnavailable: pydicom is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        msg = f"{name}: got a DICOM file and no pydicom · expected pydicom · {_DICOM_EXTRA}"
        raise BackendUnavailable(msg) from error
    with decoding(name, "a whole DICOM file"):
        # pydicom inflates such a file before anyone can ask how large it is.
        if _DEFLATED.encode() in data:
            raise refusal(name, "a deflated DICOM file", "any other transfer syntax", "inflate it: dcmconv +te IN OUT")
        has_magic = data[128:132] == b"DICM"
        dataset = pydicom.dcmread(io.BytesIO(data), force=not has_magic)
        if not has_magic and "Rows" not in dataset and "SOPClassUID" not in dataset:
            raise refusal(name, "a .dcm file that is not DICOM", FORMATS_TEXT, "check what the file is")
        view = _check_film(dataset, name)
        return _render_dicom(dataset, name, rendering, view)


def _check_film(dataset: Any, name: str) -> str | None:  # noqa: ANN401 - pydicom is imported only where it is needed
    """Refuse, by its header, what is not one frontal film; return the view."""
    frontal = "a frontal chest film (CR or DX)"
    modality = str(dataset.get("Modality") or "").strip().upper()
    by_class = _OTHER_SOP_CLASSES.get(str(dataset.get("SOPClassUID") or "").strip(), "")
    other = modality if modality in _OTHER_MODALITIES else by_class
    if other:
        got = f"{_OTHER_MODALITIES[other]} (modality {modality or 'absent'})"
        raise refusal(name, got, frontal, "pass a film of the chest; LLaVA-Rad reads nothing else")
    view = _view(dataset)
    if view and _is_not_frontal(view):
        do = "pass the PA or AP film of the study; LLaVA-Rad was trained on frontal films only"
        raise refusal(name, f"a view that is not frontal ({view})", frontal, do)
    if (frames := int(dataset.get("NumberOfFrames") or 1)) > 1:
        raise refusal(name, f"{frames} frames", "one film", "save the frame you mean as a file of its own")
    if "PixelData" not in dataset:
        got = "a DICOM file without pixel data"
        raise refusal(name, got, "a film", "pass the image itself, not its report, index or header")
    for keyword in ("Rows", "Columns", "BitsAllocated", "PhotometricInterpretation"):
        if dataset.get(keyword) in (None, ""):
            raise refusal(name, f"a DICOM file without {keyword}", "a complete header", "export the film again")
    check_size(name, int(dataset.Columns), int(dataset.Rows))
    return view


def _view(dataset: Any) -> str | None:  # noqa: ANN401 - see _check_film
    if view := str(dataset.get("ViewPosition") or "").strip().upper():
        return view
    codes = dataset.get("ViewCodeSequence") or []
    meaning = str(codes[0].get("CodeMeaning") or "").strip().lower() if len(codes) else ""
    return {"antero-posterior": "AP", "postero-anterior": "PA"}.get(meaning, meaning.upper() or None)


def _is_not_frontal(view: str) -> bool:
    # A decubitus film (LLD, RLD) is taken from the front, of a patient who lies on one side.
    lateral = view in ("LL", "RL") or ("LAT" in view and "DECUB" not in view)
    return lateral or view in _OBLIQUE_VIEWS or "OBLIQUE" in view


def _render_dicom(
    dataset: Any,  # noqa: ANN401 - see _check_film
    name: str,
    rendering: Rendering,
    view: str | None,
) -> LoadedImage:
    photometric = str(dataset.PhotometricInterpretation).strip().upper()
    if photometric not in (*_GREY, *_COLOUR, "PALETTE COLOR"):
        do = "convert the film to MONOCHROME2 (dcmconv, dcmdjpeg) or to PNG"
        raise refusal(name, f"photometric interpretation {photometric}", "MONOCHROME1 or MONOCHROME2", do)
    pixels = _stored_values(dataset, name)
    if photometric == "PALETTE COLOR":
        from pydicom.pixels.processing import apply_color_lut

        pixels = apply_color_lut(pixels, dataset)
        if pixels.dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
    grey = photometric in _GREY
    size = (int(dataset.Rows), int(dataset.Columns))
    if pixels.shape != (size if grey else (*size, 3)):
        got = f"pixel data of shape {list(pixels.shape)}"
        raise refusal(name, got, f"the header's {size[0]} rows and {size[1]} columns", "export the film again")
    if not grey:
        if pixels.dtype != np.uint8:
            do = "convert it to 8 bits a channel"
            raise refusal(name, f"a colour DICOM of {pixels.dtype}", "8 bits a channel", do)
        return LoadedImage(image=Image.fromarray(pixels), rendering="as-is", format="DICOM", view=view)
    monochrome1 = photometric == "MONOCHROME1"
    if rendering == "mimic-cxr-jpg":
        picture, used = render(pixels, rendering, name, monochrome1=monochrome1)
    else:
        picture, used = _render_voi(pixels, dataset, name, monochrome1=monochrome1)
    return LoadedImage(image=picture, rendering=used, format="DICOM", view=view)


def _stored_values(dataset: Any, name: str) -> NDArray[Any]:  # noqa: ANN401 - see _check_film
    """Decode the pixels, unused high bits masked (signed values sign-extended), colours turned into RGB.

    Bits above BitsStored may hold an old-style overlay or noise; left in, they would own the maximum and blacken the
    film. pydicom masks them, but takes the stored bits to be the lowest ones; HighBit says where they really are.
    """
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    syntax = getattr(dataset.file_meta, "TransferSyntaxUID", None)
    if not syntax:
        implicit, little = dataset.original_encoding
        native = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        syntax = ImplicitVRLittleEndian if implicit else native
        dataset.file_meta.TransferSyntaxUID = syntax
    if syntax.is_compressed:
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:
            do = "convert it to an uncompressed or JPEG 2000 DICOM, or to PNG"
            raise refusal(name, f"transfer syntax {syntax.name}", "one that pydicom reads", do) from None
        if not available:
            do = f"{_DICOM_EXTRA}, or decompress it (dcmdjpeg, gdcmconv --raw)"
            raise refusal(name, f"{syntax.name} pixel data", "an installed decoder for it", do)
        try:
            return pixel_array(dataset)
        except RuntimeError as error:
            if "does not support" not in str(error):
                raise
            do = "decompress it first (dcmdjpeg IN OUT)"
            raise refusal(name, f"{syntax.name} pixel data of this depth", "a decoder for it", do) from error
    allocated, stored = int(dataset.BitsAllocated), int(dataset.get("BitsStored") or dataset.BitsAllocated)
    high_bit = int(dataset.get("HighBit") or stored - 1)
    if high_bit == stored - 1 or not stored <= high_bit + 1 <= allocated:
        return pixel_array(dataset)
    raw = np.array(pixel_array(dataset, correct_unused_bits=False))
    return (raw << (allocated - 1 - high_bit)) >> (allocated - stored)


def _render_voi(
    stored: NDArray[Any],
    dataset: Any,  # noqa: ANN401 - see _check_film
    name: str,
    *,
    monochrome1: bool,
) -> tuple[Image.Image, str]:
    """Render as a viewer first shows the film: rescale to modality units, then the first VOI LUT or window.

    Source: DICOM PS3.3 C.11.2.1.2 (LINEAR, LINEAR_EXACT and SIGMOID windows).
    """
    from pydicom.pixels.processing import apply_modality_lut

    values = np.asarray(apply_modality_lut(stored, dataset))
    used = "voi-lut"
    if dataset.get("VOILUTSequence"):
        shown = _looked_up(values, dataset.VOILUTSequence[0], dataset.original_encoding[1])
    elif (window := _first_window(dataset)) is not None:
        shown = _windowed(values.astype(np.float64), *window, name)
    else:
        used = "min-max"
        check_stored(values, name)
        shown = min_max(values) / 255
    if monochrome1:
        shown = 1 - shown
    picture = np.rint(shown.clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(picture).convert("RGB"), used


def _looked_up(values: NDArray[Any], item: Any, little_endian: bool) -> NDArray[np.float64]:  # noqa: ANN401
    """Map values through one item of a VOI LUT sequence, to 0..1.

    pydicom 3.0's apply_voi keeps the index in the type of the entries, so that an 8-bit table wraps around at 256.
    """
    num_entries, first, bits = (int(v) for v in item.LUTDescriptor)
    entries = item.LUTData
    if isinstance(entries, bytes):
        two_bytes = np.dtype("<u2" if little_endian else ">u2")
        entries = np.frombuffer(entries, np.uint8 if len(entries) <= num_entries + 1 else two_bytes)
    table = np.asarray(entries, dtype=np.float64)[: num_entries or 1 << 16] / ((1 << bits) - 1)
    return table[np.clip(values.astype(np.int64) - first, 0, len(table) - 1)]


def _first_window(dataset: Any) -> tuple[float, float, str] | None:  # noqa: ANN401 - see _check_film
    centre, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if centre in (None, "") or width in (None, ""):
        return None
    # Several windows make a list; the first is the one to show.
    first_centre, first_width = (float(v[0]) if isinstance(v, Sequence) else float(v) for v in (centre, width))
    return first_centre, first_width, str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()


def _windowed(
    values: NDArray[np.float64], centre: float, width: float, function: str, name: str
) -> NDArray[np.float64]:
    """Map a window to 0..1."""
    narrowest = 1 if function == "LINEAR" else 0
    if not (np.isfinite(centre) and np.isfinite(width) and width >= narrowest and width > 0):
        got = f"window centre {centre}, width {width} ({function})"
        raise refusal(name, got, "a window of some width", 'use rendering="mimic-cxr-jpg", which needs none')
    if function == "LINEAR":
        if width == 1:
            return (values > centre - 0.5).astype(np.float64)
        return (values - (centre - 0.5)) / (width - 1) + 0.5
    if function == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    if function == "SIGMOID":
        return cast("NDArray[np.float64]", 1 / (1 + np.exp((-4 * (values - centre) / width).clip(-700, 700))))
    do = 'use rendering="mimic-cxr-jpg", which needs none'
    raise refusal(name, f"VOI LUT function {function}", "LINEAR, LINEAR_EXACT or SIGMOID", do)
