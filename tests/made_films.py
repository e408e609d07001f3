"""Films for tests, as pictures and as DICOM files of every kind, and what they were loaded to."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lite.image.rendering import LoadedImage


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
