"""Films for tests, as pictures and as DICOM files of every kind, and what they were loaded to."""

from __future__ import annotations

import base64
import io
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lite.image.film import LoadedImage


def noise(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def film(height: int = 40, width: int = 30, *, top: int = 4095) -> NDArray[np.uint16]:
    """Stored values with a slope and noise, minimum above 0 and maximum below `top`."""
    rng = np.random.default_rng(7)
    slope = np.linspace(0.1, 0.8, height)[:, None] + np.linspace(0, 0.1, width)
    return (top * (slope + 0.02 * rng.random((height, width)))).astype(np.uint16)


def rgb(loaded: LoadedImage) -> NDArray[np.uint8]:
    assert loaded.image.mode == "RGB"
    return np.asarray(loaded.image)


def grey(loaded: LoadedImage) -> NDArray[np.uint8]:
    pixels = rgb(loaded)
    assert (pixels[:, :, 0] == pixels[:, :, 1]).all()
    assert (pixels[:, :, 0] == pixels[:, :, 2]).all()
    return pixels[:, :, 0]


def saved(picture: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


JPEG = "1.2.840.10008.1.2.4."  # the family of transfer syntaxes
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
RLE, JPEG_EXTENDED, JPEG_LOSSLESS, JPEG_LS, JPEG_2000, HTJ2K = (
    "1.2.840.10008.1.2.5", f"{JPEG}51", f"{JPEG}70", f"{JPEG}80", f"{JPEG}90", f"{JPEG}201",
)  # fmt: skip
LOSSLESS = (*NATIVE, RLE, JPEG_LOSSLESS, JPEG_LS, JPEG_2000)
# `film(16, 12) << 4` as OpenJPH makes it, through imagecodecs: nothing here writes this format.
HTJ2K_FILM = base64.b85decode(
    "|4;u>04YEK0000C0000G00000000000000C0000G0000000000009pH0sl|{2mk^A000XAQUDA90ssL31q1{@0smY86Cj9?kdTm&kdTm&kdTmw"
    "h=~7W02crOPjF>!N>E53R%LP^FfKASE;BCwkN^q*00001od5y<lfVEb6~_dJbN~Rr024p}6F>kH0Qlzw2Xp|Y*#!r503QAV2Xp|y024p}6>tCq"
    ";3DY(3v>WXfQUOI0A>P4v;fB)`2vG<0KfniyZ`}hzyKD&P!MYbRKdHuj3I+zv4y_=KlDI=eU|{kX=)hje|$_3B(H0rrbmNT{r~`H9Ag1^xd1fC"
    "N(P(UmP9TPRKobEROA7Zq+<a8H~_!^FG+v^UYh^_y+AT`umwz>b>X6hmsj|*s8j$#4@1xIg%2^|u9wy;O{i_)IFcC}!$s-AYnZ7O+UL@BkTt0W"
    "4~WMt6O<tL5Mv|VNdydFYM%g`J)dy_fYywsdMULeIQ)#Nw4v|&y#bdMl(R$A5$;`FFkBTZ8}t)uch!?+vD8xW$@39MvJ$k+(UE6xrWg+(G5X^X"
    "sJTWAKnFhnxAB`RegAW2`0mbIeEu_!JnV3nf5zwD@G2kt*%lt~?$!R_`)fMrgHCh6Z=B&+cV6__zj~#2eszGCeCG=u^3VXKb3uZHQqh78fC-)e"
    "|Je"
)


def packed(samples: NDArray[np.uint16], syntax: str, **attributes: Any) -> bytes:
    """Write 16-bit samples as they are in any lossless syntax, whatever the header says of their bits."""
    if syntax in NATIVE:
        return dicom(samples, syntax=syntax, **attributes)
    if syntax == JPEG_2000:
        frame = saved(Image.fromarray(samples), "JPEG2000", irreversible=False, no_jp2=True)
    elif syntax == RLE:
        pydicom = pytest.importorskip("pydicom")
        dataset = pydicom.dcmread(io.BytesIO(dicom(samples, BitsStored=16)))
        dataset.compress(RLE, generate_instance_uid=False)
        frame = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    else:
        frame = gdcm_frame(dicom(samples, BitsStored=16), syntax)
    return dicom(samples, syntax=syntax, encapsulated=frame, **attributes)


def gdcm_frame(plain: bytes, syntax: str) -> bytes:
    """Compress a film with GDCM; return its codestream."""
    gdcm, pydicom = pytest.importorskip("gdcm"), pytest.importorskip("pydicom")
    names = {
        JPEG_EXTENDED: "JPEGExtendedProcess2_4", JPEG_LOSSLESS: "JPEGLosslessProcess14_1", JPEG_LS: "JPEGLSLossless",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "before.dcm"), Path(folder, "after.dcm")
        before.write_bytes(plain)
        reader, writer, change = gdcm.ImageReader(), gdcm.ImageWriter(), gdcm.ImageChangeTransferSyntax()
        reader.SetFileName(str(before))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, names[syntax])))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(after))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        pixels = pydicom.dcmread(after).PixelData
    frame: bytes = next(pydicom.encaps.generate_frames(pixels, number_of_frames=1))
    return frame


def coded(keyword: str, value: str, meaning: str, **inside: Any) -> dict[str, Any]:
    """Return a sequence of one code as an attribute for `dicom`."""
    item = pytest.importorskip("pydicom").Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", meaning
    for name, sequence in inside.items():
        setattr(item, name, sequence)
    return {keyword: [item]}


def dicom(
    stored: NDArray[Any] | None,
    *,
    syntax: str = "1.2.840.10008.1.2.1",
    encapsulated: bytes | None = None,
    preamble: bool = True,
    **attributes: Any,
) -> bytes:
    """Write a small CR film; an attribute of None is left out."""
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    dataset.file_meta.MediaStorageSOPInstanceUID = "2.25.1"
    values: dict[str, Any] = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1",
        "SOPInstanceUID": "2.25.1",
        "Modality": "CR",
        "ViewPosition": "PA",
        "PhotometricInterpretation": "MONOCHROME2",
        "SamplesPerPixel": 1,
        "BitsStored": 12,
        "PixelRepresentation": 0,
    }
    if stored is not None:
        values |= {"Rows": stored.shape[0], "Columns": stored.shape[1], "BitsAllocated": stored.dtype.itemsize * 8}
    values |= attributes
    values.setdefault("HighBit", values["BitsStored"] - 1)
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    if stored is not None:
        if encapsulated is None:
            big = "<>"[syntax == "1.2.840.10008.1.2.2"]
            pixels = stored.astype(stored.dtype.newbyteorder(big)).tobytes()
            dataset.PixelData = pixels + b"\0" * (len(pixels) % 2)
        else:
            dataset.PixelData = pydicom.encaps.encapsulate([encapsulated])
        dataset["PixelData"].VR = "OB" if encapsulated is not None or stored.dtype.itemsize == 1 else "OW"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=preamble)
    return buffer.getvalue()


def png_of(width: int, height: int, rows: bytes, *, depth: int = 8, colour_type: int = 0) -> bytes:
    """Write a PNG of these rows, each behind its filter byte, whatever the header says."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
