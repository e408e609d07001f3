"""DICOM films: their values, windows, colours and compressions."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_films import dicom, film, grey, noise, rgb, saved
from numpy.typing import NDArray
from PIL import Image

from lite.errors import ImageError
from lite.image import rendering as rendering_module
from lite.image.files import load_image
from lite.image.rendering import mimic_cxr_jpg

FINE = "1.2.840.10008.1.2.4."  # the JPEG family of transfer syntaxes


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
        assert (loaded.rendering, loaded.format, loaded.view) == ("mimic-cxr-jpg", "DICOM", "AP")


def test_monochrome1_is_the_negative_of_monochrome2() -> None:
    stored = film()
    one = grey(load_image(dicom(4095 - stored, PhotometricInterpretation="MONOCHROME1")))
    two = grey(load_image(dicom(stored)))
    # Truncation goes the other way, so a level's worth of difference before equalisation is all there may be.
    assert np.abs(one.astype(int) - two).mean() < 4
    assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.999


def test_unused_high_bits_are_masked() -> None:
    stored = film()
    noisy = stored | (noise(stored.shape).astype(np.uint16) << 12)
    assert (noisy != stored).any()
    wanted = mimic_cxr_jpg(stored, monochrome1=False)
    assert (grey(load_image(dicom(noisy))) == wanted).all()


def test_stored_bits_below_the_high_bit_are_found() -> None:
    stored = film()
    high = (stored << 3) | (noise(stored.shape).astype(np.uint16) & 0x8007)
    wanted = mimic_cxr_jpg(stored, monochrome1=False)
    assert (grey(load_image(dicom(high, HighBit=14))) == wanted).all()


def test_signed_values_are_signed_and_their_unused_bits_ignored() -> None:
    stored = film().astype(np.int16) - 2000
    wanted = mimic_cxr_jpg(stored, monochrome1=False)
    masked = (stored & 0x0FFF).astype(np.uint16)
    for pixels in (stored, masked, masked | 0x5000):
        assert (grey(load_image(dicom(pixels, PixelRepresentation=1))) == wanted).all()


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
    assert pydicom.dcmread(io.BytesIO(data)).PhotometricInterpretation == "PALETTE COLOR"


def test_run_length_encoding_is_read() -> None:
    pydicom = pytest.importorskip("pydicom")
    stored = film()
    dataset = pydicom.dcmread(io.BytesIO(dicom(stored)))
    dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    assert (grey(load_image(buffer.getvalue())) == mimic_cxr_jpg(stored, monochrome1=False)).all()


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_jpeg_2000_is_read(photometric: str) -> None:
    stored = film(64, 64, top=65535)
    codestream = saved(Image.fromarray(stored), "JPEG2000", irreversible=False, no_jp2=True)
    attributes = {"BitsStored": 16, "PhotometricInterpretation": photometric}
    data = dicom(stored, syntax=f"{FINE}90", encapsulated=codestream, **attributes)
    assert (grey(load_image(data)) == mimic_cxr_jpg(stored, monochrome1=photometric == "MONOCHROME1")).all()


def test_jpeg_baseline_is_read() -> None:
    stored = (film() >> 4).astype(np.uint8)
    jpeg = saved(Image.fromarray(stored), "JPEG", quality=100)
    data = dicom(stored, syntax=f"{FINE}50", encapsulated=jpeg, BitsStored=8)
    decoded = np.asarray(Image.open(io.BytesIO(jpeg)))
    assert (grey(load_image(data)) == mimic_cxr_jpg(decoded, monochrome1=False)).all()


@pytest.mark.parametrize(("kind", "syntax"), [("JPEGLSLossless", f"{FINE}80"), ("JPEGLosslessSV1", f"{FINE}70")])
def test_lossless_jpegs_are_read_with_gdcm(tmp_path: Path, kind: str, syntax: str) -> None:
    gdcm = pytest.importorskip("gdcm")
    stored = film()
    plain, packed = tmp_path / "plain.dcm", tmp_path / "packed.dcm"
    plain.write_bytes(dicom(stored))
    reader = gdcm.ImageReader()
    reader.SetFileName(str(plain))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    names = {"JPEGLSLossless": "JPEGLSLossless", "JPEGLosslessSV1": "JPEGLosslessProcess14_1"}
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, names[kind])))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(packed))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    assert syntax.encode() in packed.read_bytes()
    assert (grey(load_image(packed)) == mimic_cxr_jpg(stored, monochrome1=False)).all()


def test_a_missing_decoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    base = pytest.importorskip("pydicom.pixels.decoders.base")
    stored = film()
    data = dicom(stored, syntax=f"{FINE}70", encapsulated=b"\xff\xd8\xff\xd9")
    monkeypatch.setattr(base.JPEGLosslessSV1Decoder, "_available", {})
    with pytest.raises(ImageError, match=r'JPEG Lossless.*pip install "llava-rad-lite\[dicom\]"'):
        load_image(data)
    video = dicom(stored, syntax=f"{FINE}102", encapsulated=b"\0\0\0\1")
    with pytest.raises(ImageError, match=r"MPEG-4.*one that pydicom reads"):
        load_image(video)


def test_twelve_bit_jpeg_says_how_to_decompress_it() -> None:
    data = dicom(film(), syntax=f"{FINE}51", encapsulated=b"\xff\xd8\xff\xd9")
    with pytest.raises(ImageError, match=r"JPEG Extended.*dcmdjpeg"):
        load_image(data)
