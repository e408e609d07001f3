"""The rules of a film: views and parts in any tag, code and language, which way up, and the table that shows them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from made_films import coded, dicom, film, grey
from repository import ROOT

from lite.errors import ImageError
from lite.image.files import load_image
from lite.image.rendering import mimic_cxr_jpg
from lite.image.rules import RULES
from lite.image.words import other_part_in, part_of_words, view_of_words

WITHOUT: dict[str, Any] = {"ViewPosition": None}


def test_the_documented_table_is_the_list_of_rules() -> None:
    text = (ROOT / "docs/films.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    table = rows[rows.index(["a film …", "read from", "what happens", "how to override"]) + 2 :]
    assert table[: len(RULES)] == [[rule.rule, rule.source, rule.happens, rule.override] for rule in RULES]


@pytest.mark.parametrize(
    ("text", "view"),
    [
        ("PA", "PA"), ("ap", "AP"), ("AP SUPINE", "AP"), ("Thorax p.a.", "PA"), ("A-P", "AP"), ("PA ERECT", "PA"),
        ("antero-posterior", "AP"), ("Postero-anterior", "PA"), ("Frontal", "FRONTAL"), ("胸部正面", "FRONTAL"),
        ("AP/PA", "FRONTAL"), ("LL", "LATERAL"), ("LL ERECT", "LATERAL"), ("L LAT", "LATERAL"), ("LLAT", "LATERAL"),
        ("LATERAL", "LATERAL"), ("CHEST LATERAL", "LATERAL"), ("Thorax seitl.", "LATERAL"), ("Profil", "LATERAL"),
        ("perfil", "LATERAL"), ("RX TORACE LATERALE", "LATERAL"), ("boczne", "LATERAL"), ("боковая", "LATERAL"),
        ("胸部側面", "LATERAL"), ("胸部侧位", "LATERAL"), ("흉부 측면", "LATERAL"), ("X-table lat", "LATERAL"),
        ("RAO", "OBLIQUE"), ("left anterior oblique", "OBLIQUE"), ("schräg", "OBLIQUE"), ("OBLICUA", "OBLIQUE"),
        ("LLD", "DECUBITUS"), ("AP left lateral decubitus", "DECUBITUS"), ("Linksseitenlage", "DECUBITUS"),
        ("DECUBITO SUPINO AP", "AP"), ("décubitus latéral", "DECUBITUS"), ("PA AND LATERAL", "SEVERAL"),
        ("APSUPINE", "AP"), ("PAERECT", "PA"), ("AP1", "AP"), ("ChestPA", "PA"), ("CHESTPA", "PA"),
        ("ANTERO_POSTERIOR", "AP"), ("Anterior-Posterior", "AP"), ("POSTERIOR_ANTERIOR", "PA"),
        ("Poumons de face", "FRONTAL"),
        ("THORAX FACE ET PROFIL", "SEVERAL"), ("AP CHEST (LATERALITY UNKNOWN)", "AP"), ("ChestLat", "LATERAL"),
        ("LATCHEST", "LATERAL"), ("胸部正侧位", "SEVERAL"),
        ("LLATERAL", "LATERAL"), ("LATLEFT", "LATERAL"), ("TORACE L-L", "LATERAL"), ("CROSS-TABLE", "LATERAL"),
        ("XTL", "LATERAL"), ("SWIMMERS", "LATERAL"), ("Thorax links anliegend", "LATERAL"), ("van opzij", "LATERAL"),
        ("MLO", "OBLIQUE"), ("obliquity corrected", None), ("AXIAL", "AXIAL"), ("tangential", "AXIAL"),
        ("AP AXIAL", "AP"), ("LDECUB", "DECUBITUS"), ("R DEC", "DECUBITUS"), ("AP DECUBITUS", "DECUBITUS"),
        ("TORAX AP EN DECUBITO", "AP"), ("décubitus dorsal, face", "FRONTAL"), ("DECUBITO LATERAL", "DECUBITUS"),
        ("CHEST 2 VIEWS", None), ("BILATERAL", None), ("ERECT", None), ("", None), ("PLATE", None), ("APEX", None),
    ],
)  # fmt: skip
def test_views_are_read_in_any_words(text: str, view: str | None) -> None:
    assert view_of_words(text) == view


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("CHEST", "chest"), ("THORAX", "chest"), ("Brustkorb", "chest"), ("TORAX PA", "chest"), ("tórax", "chest"),
        ("PORT CHEST", "chest"), ("CHESTABDOMEN", "chest"), ("LUNGS", "chest"), ("poumons", "chest"), ("胸部", "chest"),
        ("klatka piersiowa", "chest"), ("HIP", "other"), ("Hüfte", "other"), ("PELVIS", "other"), ("TSPINE", "other"),
        ("THORACIC SPINE", "other"), ("BWS", "other"), ("Brustwirbelsäule", "other"), ("KNEE", "other"),
        ("TH", "chest"), ("CHST", "chest"), ("TRUNK", "chest"), ("BABYGRAM", "chest"), ("Poitrine", "chest"),
        ("CARDIAC", "chest"), ("RIBS", "other"), ("BREAST", "other"), ("0", "unknown"), ("ICU", "unknown"),
        ("NOT SPECIFIED", "unknown"), ("HERZ", "chest"), ("CHESTAP", "chest"),
        ("ABDOMEN", "other"), ("genou", "other"), ("UNKNOWN", "unknown"), ("", "unknown"), ("WHOLE BODY", "unknown"),
    ],
)  # fmt: skip
def test_parts_are_read_in_any_words(text: str, part: str) -> None:
    assert part_of_words(text) == part


def test_a_description_has_to_name_another_part_to_be_believed() -> None:
    assert all(map(other_part_in, ("XR HIP LEFT", "Becken a.p.", "RX LUMBAR SPINE", "RIBS LEFT AP", "CLAVICLE")))
    assert not any(map(other_part_in, ("XR CHEST PA", "PORTABLE", "CHEST AND ABDOMEN", "", "SHIPPED", "HANDOVER")))


DECUBITUS = coded("PatientOrientationModifierCodeSequence", "102536004", "links")
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ViewPosition": "LATERAL"}, r"a lateral view \(ViewPosition LATERAL\)"),
    ({"ViewPosition": "RLO"}, "an oblique view"),
    ({"ViewPosition": "LLD"}, "a decubitus view"),
    (coded("ViewCodeSequence", "399173006", "vue de gauche") | WITHOUT, r"a lateral view \(ViewCodeSequence VUE DE"),
    (coded("ViewCodeSequence", "R-10232", ""), r"a lateral view \(ViewCodeSequence R-10232\)"),  # beside a PA
    (coded("ViewCodeSequence", "x", "left lateral") | WITHOUT, "a lateral view"),
    (coded("ViewCodeSequence", "399135007", ""), "an oblique view"),
    (
        coded("ViewCodeSequence", "399348003", "", **coded("ViewModifierCodeSequence", "399182000", "")) | WITHOUT,
        "an oblique view",
    ),
    (coded("PatientOrientationCodeSequence", "102538003", "recumbent", **DECUBITUS), "a decubitus view"),
    (coded("PatientOrientationCodeSequence", "102536004", ""), "a decubitus view"),
    (coded("ViewCodeSequence", "", "axial") | WITHOUT, "an axial view"),
    ({"PatientPosition": "HFDL"}, "a decubitus view"),
    ({"PatientOrientation": ["A", "F"]}, r"a lateral view \(PatientOrientation A\\F\)"),
    ({"SeriesDescription": "Thorax seitlich"} | WITHOUT, "a lateral view"),
    ({"ProtocolName": "TORAX PERFIL", "ViewPosition": ""}, "a lateral view"),
    ({"StudyDescription": "XR CHEST LATERAL DECUBITUS"} | WITHOUT, "a decubitus view"),
    ({"BodyPartExamined": "HIP"}, r"body part HIP \(BodyPartExamined\)"),
    ({"BodyPartExamined": "BECKEN"}, "body part BECKEN"),
    (coded("AnatomicRegionSequence", "29836001", "hanche"), r"body part hanche \(AnatomicRegionSequence 29836001\)"),
    (coded("AnatomicRegionSequence", "T-D8700", "") | {"BodyPartExamined": "CHEST"}, "body part T-D8700"),
    ({"StudyDescription": "XR THORACIC SPINE AP"}, "body part XR THORACIC SPINE AP"),
    ({"StudyDescription": "CHEST AND ABDOMEN", "SeriesDescription": "ABDOMEN AP"}, "body part ABDOMEN AP"),
    ({"SeriesDescription": "HIP LEFT AP"}, r"body part HIP LEFT AP \(SeriesDescription\)"),
    ({"Modality": "CT"}, "a CT slice"),
    ({"Modality": "BDUS"}, "an ultrasound image"),
    ({"Modality": "OT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.5.1"}, "a photograph"),
    ({"Modality": None, "SOPClassUID": "1.2.840.10008.5.1.4.1.1.13.1.4"}, "a mammogram"),
]


@pytest.mark.parametrize(("attributes", "message"), REFUSED)
def test_what_is_no_frontal_chest_film_is_refused_unless_any_film_will_do(
    attributes: dict[str, Any], message: str
) -> None:
    data = dicom(film(), **attributes)
    with pytest.raises(ImageError, match=message):
        load_image(data)
    loaded = load_image(data, any_film=True)
    assert (grey(loaded) == mimic_cxr_jpg(film(), monochrome1=False)).all()
    assert loaded.film.remarks[0].startswith("drafted although it is ")


@pytest.mark.parametrize(
    ("attributes", "view", "source"),
    [
        ({}, "PA", "ViewPosition"),
        ({"ViewPosition": "AP SUPINE"}, "AP", "ViewPosition"),
        (WITHOUT, None, None),
        ({"ViewPosition": "ERECT"}, "ERECT", "ViewPosition"),
        (coded("ViewCodeSequence", "399348003", "de face") | WITHOUT, "AP", "ViewCodeSequence"),
        (coded("ViewCodeSequence", "R-10214", "") | WITHOUT, "PA", "ViewCodeSequence"),
        (coded("ViewCodeSequence", "1", "antero-posterior") | WITHOUT, "AP", "ViewCodeSequence"),
        ({"SeriesDescription": "Thorax a.p. liegend"} | WITHOUT, "AP", "SeriesDescription"),
        ({"StudyDescription": "CHEST PA AND LATERAL", "SeriesDescription": "PA"} | WITHOUT, "PA", "SeriesDescription"),
        ({"SeriesDescription": "CHEST LATERAL"}, "PA", "ViewPosition"),  # a code goes before words
        ({"PatientPosition": "HFS", "BodyPartExamined": "THORAX"}, "PA", "ViewPosition"),
        ({"Laterality": "BOTH", "ImageLaterality": "UNPAIRED"}, "PA", "ViewPosition"),
        ({"PatientOrientation": ["", ""]}, "PA", "ViewPosition"),
        ({"StudyDescription": "CHEST AND ABDOMEN"}, "PA", "ViewPosition"),
        (coded("AnatomicRegionSequence", "22943007", "tronc"), "PA", "ViewPosition"),
        (coded("AnatomicRegionSequence", "", ""), "PA", "ViewPosition"),
        ({"Modality": "OT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.12.2"}, "PA", "ViewPosition"),
        ({"StudyDescription": "HIP FRACTURE WORKUP", "SeriesDescription": "CHEST"}, "PA", "ViewPosition"),
    ],
)
def test_the_view_and_where_it_was_read_are_in_the_result(
    attributes: dict[str, Any], view: str | None, source: str | None
) -> None:
    loaded = load_image(dicom(film(), **attributes))
    assert (loaded.film.view, loaded.film.view_source) == (view, source)
    assert loaded.film.remarks == ()


@pytest.mark.parametrize(
    ("attributes", "remark"),
    [
        ({"StudyDescription": "CHEST PA AND LATERAL"} | WITHOUT, "the file does not say which view this is"),
        ({"BodyPartExamined": "UNKNOWN"}, "BodyPartExamined UNKNOWN does not say chest"),
        ({"Laterality": "L"}, "Laterality L: a chest film shows both sides"),
        ({"ImageLaterality": "R"}, "ImageLaterality R"),
        ({"PatientOrientation": ["L", "L"]}, r"PatientOrientation L\L: no way that a frontal film can lie; left as"),
        ({"PatientOrientation": "L"}, "PatientOrientation L: no way"),
    ],
)
def test_what_is_odd_is_noted(attributes: dict[str, Any], remark: str) -> None:
    loaded = load_image(dicom(film(), **attributes))
    assert len(loaded.film.remarks) == 1
    assert loaded.film.remarks[0].startswith(remark)
    assert (grey(loaded) == mimic_cxr_jpg(film(), monochrome1=False)).all()


def _lying(rows: str, columns: str) -> np.ndarray:
    """Return the film as it lies when its rows and columns run these ways, pixel by pixel."""
    upright = film()
    height, width = upright.shape
    along = {"L": (0, 1), "R": (0, -1), "F": (1, 0), "H": (-1, 0)}
    (down_r, right_r), (down_c, right_c) = along[columns], along[rows]
    shape = (height, width) if rows in "LR" else (width, height)
    lying = np.empty(shape, upright.dtype)
    for i in range(shape[0]):
        for j in range(shape[1]):
            y, x = i * down_r + j * down_c, i * right_r + j * right_c
            lying[i, j] = upright[y if down_r + down_c > 0 else y - 1, x if right_r + right_c > 0 else x - 1]
    return lying


@pytest.mark.parametrize("ways", ["LF", "RF", "LH", "RH", "FL", "FR", "HL", "HR"])
def test_a_film_is_turned_so_that_the_left_side_is_on_the_right(ways: str) -> None:
    data = dicom(_lying(*ways), PatientOrientation=[f"{ways[0]}A", ways[1]] if ways == "FR" else list(ways))
    loaded = load_image(data)
    assert (grey(loaded) == mimic_cxr_jpg(film(), monochrome1=False)).all()
    assert loaded.film.orientation is not None
    if ways == "LF":
        assert (loaded.film.turned, loaded.film.remarks) == (None, ())
    else:
        assert loaded.film.turned
        assert loaded.film.remarks == (f"PatientOrientation {loaded.film.orientation}; turned so that it is L\\F",)
