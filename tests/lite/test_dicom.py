"""DICOM films: their values, windows, colours and compressions."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_films import JPEG, dicom, film, grey, noise, rgb, saved
from numpy.typing import NDArray
from PIL import Image

from lite.errors import ImageError
from lite.image import rendering as rendering_module
from lite.image.files import load_image
from lite.image.film import FilmInfo
from lite.image.rendering import mimic_cxr_jpg


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize(
    "syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"], ids=["implicit", "explicit", "big"]
)
def test_dicom_goes_the_way_of_mimic_cxr_jpg(tmp_path: Path, photometric: str, syntax: str) -> None:
    stored = film()
    data = dicom(stored, syntax=syntax, PhotometricInterpretation=photometric, ViewPosition="AP")
    path = tmp_path / "film"
    path.write_bytes(data)
    wanted = mimic_cxr_jpg(stored, monochrome1=photometric == "MONOCHROME1")
    for source in (data, path):
        loaded = load_image(source)
        assert (grey(loaded) == wanted).all()
        assert (loaded.rendering, loaded.film.format, loaded.film.view) == ("mimic-cxr-jpg", "DICOM", "AP")


def test_monochrome1_is_the_negative_of_monochrome2() -> None:
    stored = film()
    one = grey(load_image(dicom(4095 - stored, PhotometricInterpretation="MONOCHROME1")))
    two = grey(load_image(dicom(stored)))
    # Truncation goes the other way, so a level's worth of difference before equalisation is all there may be.
    assert np.abs(one.astype(int) - two).mean() < 4
    assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.999


@pytest.mark.parametrize(("border", "noted"), [(0, True), (4095, False)])
def test_a_border_of_monochrome1_is_bright_where_it_is_low(border: int, noted: bool) -> None:
    stored = film()
    stored[:4] = stored[-4:] = border
    assert bool(load_image(dicom(stored, PhotometricInterpretation="MONOCHROME1")).film.remarks) == noted
    assert bool(load_image(dicom(stored)).film.remarks) != noted


def test_eight_bit_dicom_is_rendered_the_same_way() -> None:
    stored = (film(41, 31) >> 5).astype(np.uint8)
    got = grey(load_image(dicom(stored, BitsStored=8)))
    assert (got == mimic_cxr_jpg(stored, monochrome1=False)).all()


def test_rescaling_changes_nothing_by_default() -> None:
    stored = film()
    data = dicom(stored, RescaleSlope="2.5", RescaleIntercept="-100", RescaleType="US", WindowCenter=9, WindowWidth=5)
    assert (grey(load_image(data)) == mimic_cxr_jpg(stored, monochrome1=False)).all()


def _window(values: NDArray[Any], centre: float, width: float) -> NDArray[np.uint8]:
    """Compute PS3.3 C.11.2.1.2.1 pixel by pixel."""

    def level(x: float) -> float:
        if x <= centre - 0.5 - (width - 1) / 2:
            return 0
        if x > centre - 0.5 + (width - 1) / 2:
            return 255
        return ((x - (centre - 0.5)) / (width - 1) + 0.5) * 255

    return np.rint(np.vectorize(level, otypes=[float])(values.astype(float))).astype(np.uint8)


def test_the_first_window_is_applied_after_rescaling() -> None:
    stored = film()
    data = dicom(
        stored,
        RescaleSlope="0.5",
        RescaleIntercept="-100",
        WindowCenter=[900, 1],
        WindowWidth=[1200, 2],
        RescaleType="US",
    )
    loaded = load_image(data, rendering="voi-lut")
    assert loaded.rendering == "voi-lut"
    wanted = _window(stored * 0.5 - 100, 900, 1200)
    assert 0 < wanted.mean() < 255
    assert np.abs(grey(loaded).astype(int) - wanted).max() == 0
    inverted = dicom(stored, PhotometricInterpretation="MONOCHROME1", WindowCenter=2000, WindowWidth=3000)
    assert (grey(load_image(inverted, rendering="voi-lut")) == 255 - _window(stored, 2000, 3000)).all()


def test_other_window_functions() -> None:
    stored = film()
    exact = dicom(stored, WindowCenter=2000, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT")
    wanted = np.rint(((stored - 2000.0) / 1000 + 0.5).clip(0, 1) * 255)
    assert (grey(load_image(exact, rendering="voi-lut")) == wanted).all()
    sigmoid = dicom(stored, WindowCenter=2000, WindowWidth=1000, VOILUTFunction="SIGMOID")
    wanted = np.rint(255 / (1 + np.exp(-4 * (stored - 2000.0) / 1000)))
    assert (grey(load_image(sigmoid, rendering="voi-lut")) == wanted).all()
    step = dicom(stored, WindowCenter=2000, WindowWidth=1)
    assert (grey(load_image(step, rendering="voi-lut")) == np.where(stored > 1999.5, 255, 0)).all()
    for wrong, message in (
        ({"WindowWidth": 0}, "window centre 2000.0, width 0.0"),
        ({"WindowWidth": 9, "VOILUTFunction": "CURVED"}, "VOI LUT function CURVED"),
    ):
        with pytest.raises(ImageError, match=message):
            load_image(dicom(stored, WindowCenter=2000, **wrong), rendering="voi-lut")


@pytest.mark.parametrize("bits", [8, 12])
def test_a_voi_lut_goes_before_a_window(bits: int) -> None:
    pydicom = pytest.importorskip("pydicom")
    stored = film()
    # 3,000 entries from 500 on: below and above, the first and the last entry hold.
    table = (((1 << bits) - 1) * np.linspace(0, 1, 3000) ** 2).astype(np.uint16)
    item = pydicom.Dataset()
    item.LUTDescriptor = [3000, 500, bits]
    item["LUTDescriptor"].VR = "US"
    item.add_new("LUTData", "OW", table.astype("<u2").tobytes())
    data = dicom(stored, VOILUTSequence=[item], WindowCenter=5, WindowWidth=9)
    loaded = load_image(data, rendering="voi-lut")
    wanted = np.rint(table[np.clip(stored.astype(int) - 500, 0, 2999)] / ((1 << bits) - 1) * 255)
    assert loaded.rendering == "voi-lut"
    assert (grey(loaded) == wanted).all()


def test_without_a_window_the_result_says_min_max() -> None:
    stored = film()
    for photometric in ("MONOCHROME2", "MONOCHROME1"):
        loaded = load_image(dicom(stored, PhotometricInterpretation=photometric), rendering="voi-lut")
        plain = rendering_module.min_max(stored)
        assert loaded.rendering == "min-max"
        assert (grey(loaded) == (plain if photometric == "MONOCHROME2" else 255 - plain)).all()


def test_colour_dicom_is_a_picture() -> None:
    pydicom = pytest.importorskip("pydicom")
    pixels = noise((10, 8, 3))
    data = dicom(pixels, PhotometricInterpretation="RGB", SamplesPerPixel=3, BitsStored=8, PlanarConfiguration=0)
    loaded = load_image(data)
    assert loaded.rendering == "as-is"
    assert (rgb(loaded) == pixels).all()

    index = noise((10, 8)) & 3
    palette = np.array([[0, 100, 200, 255], [9, 8, 7, 6], [1, 2, 3, 4]], np.uint16)
    luts = dict(zip(("Red", "Green", "Blue"), palette, strict=True))
    descriptors = {f"{name}PaletteColorLookupTableDescriptor": [4, 0, 16] for name in luts}
    tables = {
        f"{name}PaletteColorLookupTableData": (lut * 256 + 17).astype("<u2").tobytes() for name, lut in luts.items()
    }
    data = dicom(index, PhotometricInterpretation="PALETTE COLOR", BitsStored=8, **descriptors, **tables)
    assert (rgb(load_image(data)) == palette[:, index].transpose(1, 2, 0)).all()
    for name, lut in luts.items():  # entries of 8 bits in words of 16
        tables[f"{name}PaletteColorLookupTableData"] = lut.astype("<u2").tobytes()
    data = dicom(index, PhotometricInterpretation="PALETTE COLOR", BitsStored=8, **descriptors, **tables)
    assert (rgb(load_image(data)) == palette[:, index].transpose(1, 2, 0)).all()
    assert pydicom.dcmread(io.BytesIO(data)).PhotometricInterpretation == "PALETTE COLOR"


def test_deep_colours_of_any_kind_are_stored_values() -> None:
    stored = film()
    wanted = mimic_cxr_jpg(stored, monochrome1=False)
    channels = np.stack([stored | noise(stored.shape).astype(np.uint16) << 12] * 3, -1)  # an overlay in the high bits
    data = dicom(channels, PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0)
    assert (grey(load_image(data)) == wanted).all()
    tables = {
        f"{name}PaletteColorLookupTable{what}": value
        for name in ("Red", "Green", "Blue")
        for what, value in (("Descriptor", [4096, 0, 16]), ("Data", np.arange(4096, dtype="<u2").tobytes()))
    }
    assert (grey(load_image(dicom(stored, PhotometricInterpretation="PALETTE COLOR", **tables))) == wanted).all()


@pytest.mark.parametrize("planar", [0, 1])  # which says nothing of a codestream
def test_colours_of_jpeg_are_read(planar: int) -> None:
    pixels = np.stack([film(40, 32) >> 4, film(40, 32)[::-1] >> 4, film(40, 32) >> 5], -1).astype(np.uint8)
    jpeg = saved(Image.fromarray(pixels), "JPEG", quality=98)
    attributes = {"PhotometricInterpretation": "YBR_FULL_422", "SamplesPerPixel": 3, "PlanarConfiguration": planar}
    data = dicom(pixels, syntax=f"{JPEG}50", encapsulated=jpeg, BitsStored=8, **attributes)
    assert np.abs(rgb(load_image(data)).astype(int) - pixels).mean() < 4


def test_jpeg_baseline_is_read() -> None:
    stored = (film() >> 4).astype(np.uint8)
    jpeg = saved(Image.fromarray(stored), "JPEG", quality=100)
    decoded = np.asarray(Image.open(io.BytesIO(jpeg)))
    for header in ({"BitsStored": 8}, {"BitsAllocated": 16, "BitsStored": 12}):
        data = dicom(stored, syntax=f"{JPEG}50", encapsulated=jpeg, **header)
        assert (grey(load_image(data)) == mimic_cxr_jpg(decoded, monochrome1=False)).all()


def test_a_missing_decoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    base = pytest.importorskip("pydicom.pixels.decoders.base")
    stored = film()
    data = dicom(stored, syntax=f"{JPEG}70", encapsulated=b"\xff\xd8\xff\xd9")
    monkeypatch.setattr(base.JPEGLosslessSV1Decoder, "_available", {})
    with pytest.raises(ImageError, match=r'JPEG Lossless.*pip install "llava-rad-lite\[dicom\]"'):
        load_image(data)
    video = dicom(stored, syntax=f"{JPEG}102", encapsulated=b"\0\0\0\1")
    with pytest.raises(ImageError, match=r"MPEG-4.*a transfer syntax that pydicom reads"):
        load_image(video)


def test_a_window_that_holds_nothing_is_noted() -> None:
    stored = film()
    loaded = load_image(dicom(stored, WindowCenter=40_000, WindowWidth=100), rendering="voi-lut")
    assert (loaded.rendering, grey(loaded).max()) == ("voi-lut", 0)
    assert loaded.film.remarks[0].startswith("blank film: the window (centre 40000, width 100) holds hardly any")
    assert load_image(dicom(stored, WindowCenter=40_000, WindowWidth=100)).film.remarks == ()


def test_what_the_result_says_of_a_film() -> None:
    data = dicom(film(), BodyPartExamined="CHEST", PatientOrientation=["L", "F"], ImageLaterality="U")
    assert load_image(data).film == FilmInfo(
        format="DICOM",
        transfer_syntax="Explicit VR Little Endian",
        view="PA",
        view_source="ViewPosition",
        body_part="CHEST",
        orientation="L\\F",
        grey_levels=len(np.unique(film())),
    )


def test_a_data_set_of_pydicom_is_a_film_and_left_alone() -> None:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(io.BytesIO(dicom(film(), PatientOrientation=["R", "F"])))
    before = dataset.to_json_dict()
    loaded = load_image(dataset)
    assert (grey(loaded) == mimic_cxr_jpg(film()[:, ::-1], monochrome1=False)).all()
    assert dataset.to_json_dict() == before
    made = pydicom.Dataset()
    made.update({element.tag: element for element in dataset})
    assert (grey(load_image(made)) == grey(loaded)).all()
    del dataset.PixelData
    with pytest.raises(ImageError, match="<dataset>: got a DICOM file without pixel data"):
        load_image(dataset)
