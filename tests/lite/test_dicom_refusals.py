"""DICOM files that are no frontal film, or damaged, and what a film says of itself."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_films import NATIVE, dicom, film, grey, noise, saved
from PIL import Image

from lite.errors import BackendUnavailable, ImageError
from lite.image import dicom as dicom_module
from lite.image.files import load_image
from lite.image.rendering import mimic_cxr_jpg


def test_a_missing_pydicom_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\0" * 128 + b"DICM" + b"\0" * 40
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(BackendUnavailable, match=r'pip install "llava-rad-lite\[dicom\]"'):
        load_image(data)


CT, MAMMOGRAPHY = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.1.2"


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"Modality": "CT"}, "a CT slice"),
        ({"Modality": "MR"}, "an MR slice"),
        ({"Modality": "PT"}, "a PET slice"),
        ({"Modality": "US"}, "an ultrasound"),
        ({"Modality": "NM"}, "a nuclear medicine image"),
        ({"Modality": "MG"}, "a mammogram"),
        ({"Modality": None, "SOPClassUID": CT}, r"a CT slice \(modality absent\)"),
        ({"Modality": "OT", "SOPClassUID": MAMMOGRAPHY}, "a mammogram"),
        ({"ViewPosition": "LL"}, r"a lateral view \(ViewPosition LL\).*PA or AP"),
        ({"NumberOfFrames": 7}, "7 frames"),
        ({"NumberOfFrames": 0}, "0 frames"),
        ({"PhotometricInterpretation": "HSV"}, "photometric interpretation HSV"),
        ({"PhotometricInterpretation": None}, "without PhotometricInterpretation"),
        ({"Rows": None}, "without Rows"),
        ({"Rows": 60_000, "Columns": 60_000}, "60000 x 60000 px.*nothing was decoded"),
        ({"Rows": 0}, "30 x 0 px"),
        ({"Rows": 41}, "pixel data of 2,400 bytes, expected 2,460: it was cut short"),
        ({"SamplesPerPixel": 3}, "SamplesPerPixel 3, MONOCHROME2"),
        ({"BitsAllocated": 12}, "BitsAllocated 12, BitsStored 12"),
        ({"BitsStored": 17}, "damaged or truncated"),
        ({"PixelRepresentation": 9}, "damaged or truncated"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # pydicom warns of the values that are wrong on purpose
def test_dicom_that_is_not_a_frontal_film_is_refused(tmp_path: Path, attributes: dict[str, Any], message: str) -> None:
    path = tmp_path / "other.dcm"
    path.write_bytes(dicom(film(), **attributes))
    with pytest.raises(ImageError, match=message) as caught:
        load_image(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("modality", ["CR", "DX", "RG", "RF", "OT", "XRAY", "", None])
@pytest.mark.filterwarnings("ignore")
def test_films_and_unknown_modalities_are_read(modality: str | None) -> None:
    assert load_image(dicom(film(), Modality=modality)).rendering == "mimic-cxr-jpg"


def test_dicom_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError, match=r"without pixel data.*a film"):
        load_image(dicom(None, Modality=None))


@pytest.mark.parametrize("syntax", NATIVE)
@pytest.mark.parametrize("kept", ["data set", "file meta and data set"])
def test_dicom_is_known_without_preamble_and_suffix(tmp_path: Path, syntax: str, kept: str) -> None:
    stored = film()
    whole = dicom(stored, syntax=syntax)
    # The data set alone, as some archives keep it: what follows the preamble and the file meta group.
    meta_length = struct.unpack("<I", whole[140:144])[0]
    path = tmp_path / "old"
    path.write_bytes(whole[144 + meta_length :] if kept == "data set" else whole[132:])
    loaded = load_image(path)
    assert (grey(loaded) == mimic_cxr_jpg(stored, monochrome1=False)).all()
    assert (loaded.film.format, loaded.film.view) == ("DICOM", "PA")


def test_a_name_alone_makes_no_dicom(tmp_path: Path) -> None:
    path = tmp_path / "old.DCM"
    path.write_bytes(b"These are notes, not a film." * 9)
    with pytest.raises(ImageError, match=r"not DICOM|damaged"):
        load_image(path)
    path.write_bytes(saved(Image.fromarray(noise((12, 9)))))
    assert load_image(path).film.format == "PNG"


def _deflated(data: bytes) -> bytes:
    meta_end = 144 + struct.unpack("<I", data[140:144])[0]
    uid = b"1.2.840.10008.1.2.1.99"
    meta = data[:meta_end].replace(b"\x02\0\x10\0UI\x14\x001.2.840.10008.1.2.1\0", b"\x02\0\x10\0UI\x16\0" + uid)
    body = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return meta + body.compress(data[meta_end:]) + body.flush()


def test_deflated_dicom_is_read_and_never_inflated_without_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydicom")
    stored = film()
    # The UID of the syntax is only that where it stands in its place.
    loaded = load_image(_deflated(dicom(stored, ImageComments="1.2.840.10008.1.2.1.99")))
    assert (grey(loaded) == mimic_cxr_jpg(stored, monochrome1=False)).all()
    assert loaded.film.transfer_syntax == "Deflated Explicit VR Little Endian"
    plain = load_image(dicom(stored, ImageComments="1.2.840.10008.1.2.1.99"))
    assert plain.film.transfer_syntax == "Explicit VR Little Endian"
    monkeypatch.setattr(dicom_module, "_MAX_INFLATED", 2_000)
    with pytest.raises(ImageError, match=r"deflated.*at most 2,000 bytes once inflated.*dcmconv"):
        load_image(_deflated(dicom(stored)))


@pytest.mark.filterwarnings("ignore")
def test_damaged_dicom_raises_nothing_but_image_errors() -> None:
    rng = np.random.default_rng(5)
    whole = dicom(film(), WindowCenter=2000, WindowWidth=1000)
    for case in range(150):
        damaged = bytearray(whole[: int(rng.integers(133, len(whole) + 1))])
        for position in rng.integers(132, min(len(damaged), 600), 3):
            damaged[position] = int(rng.integers(256))
        try:
            load_image(bytes(damaged), rendering="voi-lut" if case % 2 else "mimic-cxr-jpg")
        except ImageError as error:
            assert " · expected " in str(error)  # noqa: PT017 - either outcome is right, nothing else is


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (140, "cut short|damaged or truncated"),
        (300, "cut short"),
        (-1000, "pixel data of 1,400 bytes, expected 2,400: it was cut short"),
    ],
)
@pytest.mark.parametrize("syntax", NATIVE)
def test_truncated_dicom_is_refused(syntax: str, kept: int, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load_image(dicom(film(), syntax=syntax)[:kept])
    assert "Error" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_empty_pixel_data_is_named() -> None:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(io.BytesIO(dicom(film())))
    dataset.PixelData = b""
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    with pytest.raises(ImageError, match="pixel data of 0 bytes, expected 2,400"):
        load_image(buffer.getvalue())
