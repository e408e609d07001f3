"""Stored values of DICOM films: the same in every transfer syntax, and never those of a damaged one."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
import pytest
from made_films import (
    HTJ2K,
    HTJ2K_FILM,
    JPEG,
    JPEG_2000,
    JPEG_EXTENDED,
    JPEG_LOSSLESS,
    JPEG_LS,
    LOSSLESS,
    RLE,
    dicom,
    film,
    gdcm_frame,
    grey,
    noise,
    packed,
    saved,
)
from numpy.typing import NDArray
from PIL import Image

from lite.errors import ImageError
from lite.image.files import load_image
from lite.image.layout import read_layout
from lite.image.quiet import quietly
from lite.image.rendering import mimic_cxr_jpg
from lite.image.stored import stored_values

STORED = film()
OVERLAY = noise(STORED.shape).astype(np.uint16)
SIGNED = STORED.astype(np.int16) - 2000
# Samples as they lie in the file, what the header says of them, and the values that they are.
CASES: dict[str, tuple[NDArray[np.uint16], dict[str, Any], NDArray[Any]]] = {
    "plain": (STORED, {}, STORED),
    "overlay in the high bits": (STORED | (OVERLAY << 12), {}, STORED),
    "left-justified": (STORED << 4, {"HighBit": 15}, STORED),
    "between unused bits": ((STORED << 3) | (OVERLAY & 0x8007), {"HighBit": 14}, STORED),
    "no HighBit": (STORED, {"HighBit": None}, STORED),
    "16 bits": (STORED << 4, {"BitsStored": 16}, STORED << 4),
    "signed": (SIGNED.view(np.uint16), {"PixelRepresentation": 1}, SIGNED),
    "signed, high bits masked": (SIGNED.view(np.uint16) & 0x0FFF, {"PixelRepresentation": 1}, SIGNED),
    "signed, noise above": (SIGNED.view(np.uint16) & 0x0FFF | 0x5000, {"PixelRepresentation": 1}, SIGNED),
    "signed, left-justified": (SIGNED.view(np.uint16) << 4, {"PixelRepresentation": 1, "HighBit": 15}, SIGNED),
}


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("syntax", LOSSLESS)
def test_the_header_says_which_bits_are_values_in_every_syntax(syntax: str, case: str) -> None:
    samples, attributes, values = CASES[case]
    loaded = load_image(packed(samples, syntax, **attributes))
    assert (grey(loaded) == mimic_cxr_jpg(values, monochrome1=False)).all()
    assert loaded.film.grey_levels == len(np.unique(values))
    assert loaded.film.transfer_syntax


@pytest.mark.parametrize(
    "padding",
    [
        {"PixelPaddingValue": 0},
        {"PixelPaddingValue": 4095},
        {"PixelPaddingValue": 65535, "BitsStored": 16},
        {"PixelPaddingValue": 65535},  # a value that does not fit into 12 bits
        {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": 4095},
        {"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 4000},
    ],
)
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("syntax", LOSSLESS)
def test_padding_is_left_out_of_the_scale_and_black(syntax: str, photometric: str, padding: dict[str, int]) -> None:
    samples, wanted = STORED.copy(), STORED.copy()
    samples[:, :6] = padding["PixelPaddingValue"]
    if "PixelPaddingRangeLimit" in padding:
        samples[::2, :6] = padding["PixelPaddingRangeLimit"]
    inverted = photometric == "MONOCHROME1"
    wanted[:, :6] = wanted[:, 6:].max() if inverted else wanted[:, 6:].min()
    window = {"WindowCenter": 2000, "WindowWidth": 9000}  # in which nothing of the film is black
    data = packed(samples, syntax, PhotometricInterpretation=photometric, **padding, **window)
    loaded = load_image(data)
    assert (grey(loaded) == mimic_cxr_jpg(wanted, monochrome1=inverted)).all()
    assert loaded.film.remarks[0].startswith("padding (PixelPaddingValue) in 20.0% of the film")
    shown = grey(load_image(data, rendering="voi-lut"))
    assert (shown[:, :6] == 0).all()
    assert (shown[:, 6:] > 0).all()


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_padding_is_told_by_the_bits_that_are_stored(syntax: str) -> None:
    samples, wanted = STORED.copy(), STORED.copy()
    samples[:, :6] = 100
    wanted[:, :6] = wanted[:, 6:].min()
    loaded = load_image(packed((samples << 4) | (OVERLAY & 15), syntax, HighBit=15, PixelPaddingValue=100))
    assert (grey(loaded) == mimic_cxr_jpg(wanted, monochrome1=False)).all()


@pytest.mark.parametrize(("vr", "padding"), [("SS", -2048), ("US", 63488), ("US", 2048)])
@pytest.mark.parametrize("syntax", LOSSLESS)
def test_padding_of_signed_values_is_told_however_it_is_written(syntax: str, vr: str, padding: int) -> None:
    samples = SIGNED.copy()
    samples[:5] = -2048
    wanted = np.where(samples == -2048, samples[5:].min(), samples)
    packed_film = packed(samples.view(np.uint16) << 4, syntax, PixelRepresentation=1, HighBit=15)
    dataset = pytest.importorskip("pydicom").dcmread(io.BytesIO(packed_film))
    dataset.add_new(0x00280120, vr, padding)
    assert (grey(load_image(dataset)) == mimic_cxr_jpg(wanted, monochrome1=False)).all()


def test_padding_of_signed_values_and_of_the_whole_film() -> None:
    pydicom = pytest.importorskip("pydicom")
    samples = SIGNED.copy()
    samples[:5] = -2048
    plain = dicom(samples, PixelRepresentation=1)
    dataset = pydicom.dcmread(io.BytesIO(plain))
    dataset.add_new(0x00280120, "SS", -2048)
    wanted = samples.copy()
    wanted[:5] = wanted[5:].min()
    assert (grey(load_image(dataset)) == mimic_cxr_jpg(wanted, monochrome1=False)).all()
    dataset.PixelData = np.full_like(samples, -2048).tobytes()
    with pytest.raises(ImageError, match="nothing but padding, one grey level"):
        load_image(dataset)


def test_twelve_bit_jpeg_is_read() -> None:
    pytest.importorskip("gdcm")
    frame = gdcm_frame(dicom(STORED), JPEG_EXTENDED)
    loaded = load_image(dicom(STORED, syntax=JPEG_EXTENDED, encapsulated=frame))
    assert loaded.film.transfer_syntax == "JPEG Extended (Process 2 and 4)"
    lossless = mimic_cxr_jpg(STORED, monochrome1=False)
    assert np.abs(grey(loaded).astype(int) - lossless).mean() < 1
    assert np.corrcoef(grey(loaded).ravel(), lossless.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("name", ["JPEG-lossy.dcm", "JPGExtended.dcm"])
def test_twelve_bit_jpeg_of_other_makers_is_read(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Read bone scans that come with pydicom; the values at two places are those of its own tests."""
    pytest.importorskip("gdcm")
    dataset = pytest.importorskip("pydicom").dcmread(pytest.importorskip("pydicom.data").get_testdata_file(name))
    layout = read_layout(dataset, name, 1_000_000)
    values, _ = stored_values(dataset, layout, dataset.file_meta.TransferSyntaxUID, name)
    assert abs(int(values[420, 140]) - 244) <= 1
    assert abs(int(values[230, 120]) - 95) <= 1
    assert load_image(dataset, any_film=True).film.remarks[0].startswith("drafted although it is a nuclear medicine")
    capfd.readouterr()


@pytest.mark.parametrize("number", [201, 203])
def test_high_throughput_jpeg_2000_is_read(number: int) -> None:
    pytest.importorskip("openjpeg")
    stored = film(16, 12)
    data = dicom(stored, syntax=f"{JPEG}{number}", encapsulated=HTJ2K_FILM, HighBit=15)
    loaded = load_image(data)
    assert (grey(loaded) == mimic_cxr_jpg(stored, monochrome1=False)).all()
    assert str(loaded.film.transfer_syntax).startswith("High-Throughput JPEG 2000")


def _frame(syntax: str, stored: NDArray[np.uint16] = STORED) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    pixels = pydicom.dcmread(io.BytesIO(packed(stored, syntax))).PixelData
    frame: bytes = next(pydicom.encaps.generate_frames(pixels, number_of_frames=1))
    return frame


@pytest.mark.parametrize("syntax", [JPEG_LOSSLESS, JPEG_LS, JPEG_2000])
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"Rows": 41}, "codestream of 30 x 40 px, 1 samples · expected the header's 30 x 41 px"),
        ({"Columns": 15, "Rows": 80}, "codestream of 30 x 40 px, 1 samples · expected the header's 15 x 80 px"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "expected the header's 30 x 40 px, 3 samples"),
        ({"BitsAllocated": 8, "BitsStored": 8}, "codestream of 16 bits · expected the header's BitsAllocated 8"),
    ],
)
def test_a_codestream_that_disagrees_with_its_header_is_refused(
    syntax: str, attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(dicom(STORED, syntax=syntax, encapsulated=_frame(syntax), **attributes))


@pytest.mark.parametrize(
    ("name", "alike"),
    [
        ("MR_small_RLE.dcm", "MR_small.dcm"),
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
        ("MR_small_bigendian.dcm", "MR_small.dcm"),
        ("SC_rgb_small_odd_big_endian.dcm", "SC_rgb_small_odd.dcm"),
        ("GDCMJ2K_TextGBR.dcm", None),  # boxes of JP2 before the codestream
        ("J2K_pixelrep_mismatch.dcm", None),
    ],
)
def test_files_of_other_makers_are_read_as_pydicom_reads_them(name: str, alike: str | None) -> None:
    pydicom, data = pytest.importorskip("pydicom"), pytest.importorskip("pydicom.data")
    dataset = pydicom.dcmread(data.get_testdata_file(name))
    layout = read_layout(dataset, name, 1_000_000)
    values, _ = stored_values(dataset, layout, dataset.file_meta.TransferSyntaxUID, name)
    wanted = pydicom.dcmread(data.get_testdata_file(alike or name)).pixel_array
    assert (values == wanted).all()


def test_a_codestream_of_another_syntax_is_refused() -> None:
    with pytest.raises(ImageError, match="got a JPEG codestream .* expected JPEG-LS Lossless"):
        load_image(dicom(STORED, syntax=JPEG_LS, encapsulated=_frame(JPEG_LOSSLESS)))
    with pytest.raises(ImageError, match="got RLE data of 2 segments · expected the header's 1"):
        load_image(dicom(STORED, syntax=RLE, encapsulated=_frame(RLE), BitsAllocated=8, BitsStored=8))
    signed = saved(Image.fromarray(STORED), "JPEG2000", irreversible=False, no_jp2=True, signed=True)
    with pytest.raises(ImageError, match="JPEG 2000 codestream of 16 signed bits"):
        load_image(dicom(STORED, syntax=JPEG_2000, encapsulated=signed))
    with pytest.raises(ImageError, match="no JPEG 2000 codestream"):
        load_image(dicom(STORED, syntax=JPEG_2000, encapsulated=b"\0" * 90))


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_two_films_under_a_header_of_one_are_refused(syntax: str) -> None:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(io.BytesIO(packed(STORED, syntax)))
    pixels = [dataset.PixelData * 2]
    if dataset.file_meta.TransferSyntaxUID.is_compressed:
        pixels = [pydicom.encaps.encapsulate([_frame(syntax)] * 2, has_bot=has_table) for has_table in (True, False)]
    for dataset.PixelData in pixels:
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        with pytest.raises(ImageError, match="got 2 frames · expected one film"):
            load_image(buffer.getvalue())


def test_a_padded_byte_is_no_second_film() -> None:
    with pytest.raises(ImageError, match="got one grey level"):
        load_image(dicom(np.full((1, 1), 7, np.uint8), BitsStored=8))


def test_a_film_in_several_fragments_is_one() -> None:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(io.BytesIO(packed(STORED, JPEG_2000)))
    dataset.PixelData = pydicom.encaps.encapsulate([_frame(JPEG_2000)], fragments_per_frame=3, has_bot=False)
    assert (grey(load_image(dataset)) == mimic_cxr_jpg(STORED, monochrome1=False)).all()


def _emptied(data: bytes) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.PixelData = b"\xfe\xff\x00\xe0\0\0\0\0"  # an offset table, and no fragment
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("syntax", [RLE, JPEG_LOSSLESS, JPEG_LS, JPEG_2000, HTJ2K])
def test_a_cut_or_empty_codestream_is_named_and_nothing_else_is_said(
    syntax: str, capfd: pytest.CaptureFixture[str]
) -> None:
    stored = film(16, 12) if syntax == HTJ2K else STORED
    frame = HTJ2K_FILM if syntax == HTJ2K else _frame(syntax)
    whole = dicom(stored, syntax=syntax, encapsulated=frame)
    cases = {
        "a file that was cut short": whole[: len(whole) - 200],
        "pixel data of 0 bytes": _emptied(whole),
        "damaged|no .* codestream|RLE": dicom(stored, syntax=syntax, encapsulated=frame[:40]),
    }
    for message, data in cases.items():
        with pytest.raises(ImageError, match=message) as caught:
            load_image(data)
        assert "Error" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("syntax", [JPEG_EXTENDED, JPEG_LOSSLESS])
def test_a_damaged_scan_that_its_decoder_goes_on_with_is_refused(
    syntax: str, capfd: pytest.CaptureFixture[str]
) -> None:
    frame = gdcm_frame(dicom(STORED, BitsStored=12 if syntax == JPEG_EXTENDED else 16), syntax)
    damaged = frame[:-300] + b"\xff\xd9"
    with pytest.raises(ImageError, match=r"damaged pixel data \(Corrupt JPEG data"):
        load_image(dicom(STORED, syntax=syntax, encapsulated=damaged))
    assert capfd.readouterr() == ("", "")


def test_other_lines_on_stderr_are_handed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with quietly() as complaints:
        os.write(2, b"a line of another thread\nCorrupt JPEG data: bad Huffman code\n")
        os.write(2, b"Corrupt JPEG data: 3 extraneous bytes before marker 0xd9\n")
        os.write(2, b"Unsupported JPEG data precision 12\n")
    assert complaints == ["Corrupt JPEG data: bad Huffman code"]
    assert capfd.readouterr().err == "a line of another thread\n"


def test_a_film_that_its_file_cannot_hold_is_refused_before_it_is_decoded() -> None:
    tiny = saved(Image.new("L", (64, 64)), "JPEG2000", no_jp2=True)
    data = dicom(
        np.zeros((64, 64), np.uint8), syntax=JPEG_2000, encapsulated=tiny, BitsStored=8, Rows=8000, Columns=9000
    )
    with pytest.raises(ImageError, match=r"72,000,000 pixels in .* bytes .* nothing was decoded"):
        load_image(data)
