"""Write phantom studies to disk: films, and a JSON list in the form of LLaVA-Rad's evaluation data.

    OUT/studies.json                 one entry per study; `image` is relative to OUT
    OUT/films/phantom-7-00003.png    the film as the model's training films were made: 8 bits, equalised, JPEG'd
    OUT/films/phantom-7-00003.dcm    with --dicom: the 12-bit film behind it, alternately MONOCHROME2 and MONOCHROME1

An entry holds what the evaluation format asks for (id, image, view, reason, generate_method, conversations) and, under
`phantom`, the truth: `labels` with the status, side, zone and size that the text states of each of the 14 labels,
`findings` as drawn, `scenario`, `seed`, and `dicom`, the path of the DICOM film or null.

Study i of seed S is drawn from the seed that numpy's SeedSequence spawns as child i of S. Such children are spread over
63 bits, so two different S share no study in practice (a million studies: a chance of 1 in 20 million), which
neighbouring numbers such as S + i would do at once.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from benchmarks.phantom.film import draw_film
from benchmarks.phantom.findings import Study, sample_study
from benchmarks.phantom.hospital import HOSPITALS, Hospital, HospitalName
from benchmarks.phantom.report import write_reason
from lite.config import IMAGE_TOKEN, PromptTemplate
from lite.errors import BackendUnavailable, LiteError
from lite.files import staged_folder
from lite.image.rendering import mimic_cxr_jpg

if TYPE_CHECKING:
    from pydicom import Dataset

LIST_NAME: Final = "studies.json"
FILM_FOLDER: Final = "films"

_BITS_STORED: Final = 12
_DETECTOR_MM: Final = 430
# UIDs are the 2.25 form of name-based UUIDs: unique, the same on every run, and no root of anybody's.
_UID_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_URL, "llava-rad-lite/benchmarks/phantom")
_CR_IMAGE: Final = "1.2.840.10008.5.1.4.1.1.1"
_DX_IMAGE_FOR_PRESENTATION: Final = "1.2.840.10008.5.1.4.1.1.1.1"
_VIEW_CODES: Final = {"AP": ("399348003", "antero-posterior"), "PA": ("272479007", "postero-anterior")}


def study_seed(seed: int, index: int) -> int:
    """Return the seed of study `index` (from 0) of the set with seed `seed`: see the module's docstring.

    Returns:
        An integer below 2**63.

    Raises:
        LiteError: a negative seed or index.
    """
    if seed < 0 or index < 0:
        msg = f"got seed {seed}, study {index} · expected non-negative integers · choose another seed"
        raise LiteError(msg)
    child = np.random.SeedSequence(seed, spawn_key=(index,))
    return int(child.generate_state(1, np.uint64)[0]) >> 1


def write_studies(out: Path, *, count: int, seed: int, dicom: bool, hospital: HospitalName = "home") -> Path:
    """Write `count` studies to a new folder, whole or not at all.

    The PNG is always what `load_image` makes of the stored values: with `dicom`, of exactly what the DICOM
    file stores, so both files load to identical pixels.

    Args:
        out: the folder; must not exist, or be empty.
        count: at least 1. The first studies of a longer set are those of a shorter one.
        seed: any non-negative integer.
        dicom: write a DICOM film beside each PNG.
        hospital: whose films and texts. The studies of a seed are the same everywhere.

    Returns:
        The path of the JSON list.

    Raises:
        LiteError: `out` is a file or not empty, `count` is below 1, or `seed` is negative.
        BackendUnavailable: `dicom`, and pydicom is not installed.
    """
    if count < 1:
        msg = f"got a count of {count} · expected at least 1 · say how many studies to write"
        raise LiteError(msg)
    study_seed(seed, 0)
    if dicom:
        _require_pydicom()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        msg = f"{out}: got a {'folder with files in it' if out.is_dir() else 'file'} · expected a new or empty folder"
        msg += " · name another one, or remove it first"
        raise LiteError(msg)
    with staged_folder(out, replace=True) as staged:
        (staged.path / FILM_FOLDER).mkdir()
        progress = tqdm(range(count), desc="writing studies", unit="study", disable=None)
        entries = [_write_study(staged.path, seed, index, HOSPITALS[hospital], dicom=dicom) for index in progress]
        # One study a line: as short as JSON gets, and still to be read with head and grep.
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        (staged.path / LIST_NAME).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        staged.finish()
    return out / LIST_NAME


def _write_study(folder: Path, seed: int, index: int, hospital: Hospital, *, dicom: bool) -> dict[str, Any]:
    study = sample_study(study_seed(seed, index))
    name = f"phantom-{seed}-{index:05d}"
    film = hospital.develop(draw_film(study).stored)
    monochrome1 = dicom and index % 2 == 1
    stored = ((1 << _BITS_STORED) - 1 - film).astype(np.uint16) if monochrome1 else film
    picture = Image.fromarray(mimic_cxr_jpg(stored, monochrome1=monochrome1))
    picture.save(folder / FILM_FOLDER / f"{name}.png")
    if dicom:
        _write_dicom(folder / FILM_FOLDER / f"{name}.dcm", stored, study, name, index, monochrome1=monochrome1)
    return _entry(study, name, hospital, dicom=f"{FILM_FOLDER}/{name}.dcm" if dicom else None)


def _entry(study: Study, name: str, hospital: Hospital, *, dicom: str | None) -> dict[str, Any]:
    # Words 0 and 1 beside the study's seed are those of its findings and its film.
    report = hospital.write(study, np.random.default_rng([study.seed, 2]))
    reason = write_reason(study, np.random.default_rng([study.seed, 3]))
    prompt = PromptTemplate()
    question = prompt.question_without_reason if reason is None else prompt.question_with_reason.format(reason=reason)
    return {
        "id": name,
        "image": f"{FILM_FOLDER}/{name}.png",
        "view": study.view,
        "reason": reason,
        "generate_method": "rule-based",
        "conversations": [
            {"from": "human", "value": f"{IMAGE_TOKEN}\n{question}"},
            {"from": "gpt", "value": report.text},
        ],
        "phantom": {
            "labels": {label: asdict(reading) for label, reading in report.readings.items()},
            "findings": [asdict(finding) for finding in study.findings],
            "scenario": study.scenario,
            "seed": study.seed,
            "dicom": dicom,
        },
    }


# -- DICOM -----------------------------------------------------------------------------------------------------------


def _require_pydicom() -> None:
    try:
        import pydicom  # noqa: F401 - asked for now rather than after the first film is drawn
    except ImportError as error:
        msg = 'got no pydicom · expected it for DICOM films · pip install "llava-rad-lite[dicom]"'
        raise BackendUnavailable(msg) from error


def _uid(*parts: object) -> str:
    return f"2.25.{uuid.uuid5(_UID_NAMESPACE, '/'.join(str(part) for part in parts)).int}"


_OF_ALL_FILMS: Final[Mapping[str, Any]] = {
    "SpecificCharacterSet": "ISO_IR 192",
    "PatientBirthDate": "",
    "PatientSex": "O",
    # The standard's way to say that no human being was examined.
    "QualityControlSubject": "YES",
    **dict.fromkeys(("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"), "20000101"),
    **dict.fromkeys(("StudyTime", "ContentTime"), "120000"),
    **dict.fromkeys(("AccessionNumber", "ReferringPhysicianName"), ""),
    "Manufacturer": "llava-rad-lite phantom",
    "SeriesNumber": 1,
    "InstanceNumber": 1,
    "ImageType": ["ORIGINAL", "PRIMARY", ""],
    "BodyPartExamined": "CHEST",
    "PatientOrientation": ["L", "F"],
    "BurnedInAnnotation": "NO",
    "LossyImageCompression": "00",
    "SamplesPerPixel": 1,
    "BitsAllocated": 16,
    "BitsStored": _BITS_STORED,
    "HighBit": _BITS_STORED - 1,
    "PixelRepresentation": 0,
}


def _write_dicom(
    path: Path, stored: NDArray[np.uint16], study: Study, name: str, index: int, *, monochrome1: bool
) -> None:
    """Write one film: a portable AP film as Computed Radiography, an upright PA film as Digital X-Ray.

    Source: DICOM PS3.3 A.2 (CR Image IOD) and A.26 (Digital X-Ray Image IOD); checked with dciodvfy.
    """
    from pydicom import dcmwrite
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian

    digital, low, high = study.view == "PA", int(stored.min()), int(stored.max())
    dataset = _dataset(
        **_OF_ALL_FILMS,
        SOPClassUID=_DX_IMAGE_FOR_PRESENTATION if digital else _CR_IMAGE,
        SOPInstanceUID=_uid(study.seed, "image", monochrome1),
        SeriesInstanceUID=_uid(study.seed, "series", monochrome1),
        StudyInstanceUID=_uid(study.seed, "study"),
        StudyID=str(index),
        PatientName=f"Phantom^{index:05d}",
        PatientID=name,
        Modality="DX" if digital else "CR",
        ViewPosition=study.view,
        PhotometricInterpretation="MONOCHROME1" if monochrome1 else "MONOCHROME2",
        Rows=stored.shape[0],
        Columns=stored.shape[1],
        ImagerPixelSpacing=[round(_DETECTOR_MM / side, 4) for side in stored.shape],
        WindowCenter=(low + high + 1) // 2,
        WindowWidth=high - low + 1,
        PixelData=stored.astype("<u2").tobytes(),
        **(_digital_x_ray_modules(study, monochrome1=monochrome1) if digital else {}),
    )
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(_uid("implementation"))
    meta.ImplementationVersionName = "LLAVARADLITE"
    dcmwrite(path, FileDataset(str(path), dataset, file_meta=meta, preamble=b"\0" * 128), enforce_file_format=True)


def _digital_x_ray_modules(study: Study, *, monochrome1: bool) -> Mapping[str, Any]:
    """Return what the Digital X-Ray IOD asks for beyond Computed Radiography."""
    code, meaning = _VIEW_CODES[study.view]
    view = _dataset(CodeValue=code, CodingSchemeDesignator="SCT", CodeMeaning=meaning, ViewModifierCodeSequence=[])
    return {
        "PresentationIntentType": "FOR PRESENTATION",
        "ImageLaterality": "U",
        "AnatomicRegionSequence": [_dataset(CodeValue="51185008", CodingSchemeDesignator="SCT", CodeMeaning="Chest")],
        "ViewCodeSequence": [view],
        "AcquisitionContextSequence": [],
        "DetectorType": "DIRECT",
        "PositionerType": "NONE",
        # More dose gives higher values in MONOCHROME1, lower ones in MONOCHROME2.
        "PixelIntensityRelationship": "LOG",
        "PixelIntensityRelationshipSign": 1 if monochrome1 else -1,
        "RescaleIntercept": 0,
        "RescaleSlope": 1,
        "RescaleType": "US",
        "PresentationLUTShape": "INVERSE" if monochrome1 else "IDENTITY",
    }


def _dataset(**attributes: Any) -> Dataset:
    from pydicom.dataset import Dataset

    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset
