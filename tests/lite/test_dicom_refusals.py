"""DICOM files that are no frontal film, or damaged, and what a film says of itself."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_films import dicom, film, grey

from lite.errors import BackendUnavailable, ImageError
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
        ({"ViewPosition": "LL"}, r"not frontal \(LL\).*PA or AP"),
        ({"ViewPosition": "LATERAL"}, "not frontal"),
        ({"ViewPosition": "L LAT"}, "not frontal"),
        ({"ViewPosition": "RAO"}, "not frontal"),
        ({"ViewPosition": None, "ViewCodeSequence": "left lateral"}, r"not frontal \(LEFT LATERAL\)"),
        ({"NumberOfFrames": 7}, "7 frames"),
        ({"PhotometricInterpretation": "HSV"}, "photometric interpretation HSV"),
        ({"PhotometricInterpretation": None}, "without PhotometricInterpretation"),
        ({"Rows": None}, "without Rows"),
        ({"Rows": 60_000, "Columns": 60_000}, "60000 x 60000 px.*nothing was decoded"),
        ({"Rows": 0}, "30 x 0 px"),
        ({"Rows": 41}, "damaged or truncated"),
        ({"BitsStored": 17}, "damaged or truncated"),
        ({"PixelRepresentation": 9}, "damaged or truncated"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # pydicom warns of the values that are wrong on purpose
def test_dicom_that_is_not_a_frontal_film_is_refused(tmp_path: Path, attributes: dict[str, Any], message: str) -> None:
    pydicom = pytest.importorskip("pydicom")
    if "ViewCodeSequence" in attributes:
        code = pydicom.Dataset()
        code.CodeMeaning = attributes["ViewCodeSequence"]
        attributes = attributes | {"ViewCodeSequence": [code]}
    path = tmp_path / "other.dcm"
    path.write_bytes(dicom(film(), **attributes))
    with pytest.raises(ImageError, match=message) as caught:
        load_image(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("modality", ["CR", "DX", "RG", "RF", "OT", "XRAY", "", None])
@pytest.mark.filterwarnings("ignore")
def test_films_and_unknown_modalities_are_read(modality: str | None) -> None:
    assert load_image(dicom(film(), Modality=modality)).rendering == "mimic-cxr-jpg"


@pytest.mark.parametrize(
    ("position", "meaning", "view"),
    [
        ("PA", None, "PA"),
        (None, None, None),
        ("", "antero-posterior", "AP"),
        (None, "postero-anterior", "PA"),
        ("LLD", None, "LLD"),
        (None, "left lateral decubitus", "LEFT LATERAL DECUBITUS"),
    ],
)
def test_the_view_is_reported(position: str | None, meaning: str | None, view: str | None) -> None:
    pydicom = pytest.importorskip("pydicom")
    code = pydicom.Dataset()
    code.CodeMeaning = meaning
    codes = [code] if meaning else None
    assert load_image(dicom(film(), ViewPosition=position, ViewCodeSequence=codes)).view == view


def test_dicom_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError, match=r"without pixel data.*a film"):
        load_image(dicom(None, Modality=None))


def test_dicom_without_a_preamble_needs_its_name(tmp_path: Path) -> None:
    stored = film()
    bare = dicom(stored, syntax="1.2.840.10008.1.2", preamble=True)
    # The data set alone, as some archives keep it: what follows the preamble and the file meta group.
    meta_length = struct.unpack("<I", bare[140:144])[0]
    path = tmp_path / "old.DCM"
    path.write_bytes(bare[144 + meta_length :])
    assert (grey(load_image(path)) == mimic_cxr_jpg(stored, monochrome1=False)).all()
    path.write_bytes(b"These are notes, not a film." * 9)
    with pytest.raises(ImageError, match=r"not DICOM|damaged"):
        load_image(path)


def test_deflated_dicom_is_refused_before_it_is_inflated() -> None:
    pytest.importorskip("pydicom")
    body = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    data = dicom(None, Modality=None)
    meta_end = 144 + struct.unpack("<I", data[140:144])[0]
    uid = b"1.2.840.10008.1.2.1.99"
    meta = data[:meta_end].replace(b"\x02\0\x10\0UI\x14\x001.2.840.10008.1.2.1\0", b"\x02\0\x10\0UI\x16\0" + uid)
    with pytest.raises(ImageError, match=r"deflated.*dcmconv"):
        load_image(meta + body.compress(b"\0" * 1_000_000) + body.flush())


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


def test_truncated_dicom_is_refused() -> None:
    whole = dicom(film())
    for kept in (140, 300, len(whole) - 1000):
        with pytest.raises(ImageError, match=r"damaged or truncated|without"):
            load_image(whole[:kept])
