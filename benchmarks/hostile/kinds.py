"""The kinds of hostile input: for each, good material, a way to spoil it, and the public reading of it.

A kind is a function of a generator and a folder that writes an input there and returns its reading. The generator alone
decides what is written, so that a seed names an input.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import warnings
from typing import TYPE_CHECKING, Any, Final

from benchmarks.hostile.checkpoints import BASE, adapter, checkpoint, lora
from benchmarks.hostile.material import Kind, saved
from benchmarks.hostile.mutate import OUTSIDE, hostile_value, mutate_bytes, mutate_json
from lite.artifact.open import load_artifact
from lite.engines.onnx_session import open_session
from lite.image.files import load_image
from lite.loading import prompt_of
from lite.prompt import Tokenizer
from lite.studies.films import check_films
from lite.studies.results import read_results
from lite.studies.sources.listed import read_studies

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pydicom import Dataset

    from benchmarks.hostile.material import Material, Reading
    from lite.image.film import Rendering

_TAGS: Final = {
    "US": (0, 1, 2, 3, 7, 8, 12, 15, 16, 17, 32, 64, 255, 4096, 65535),
    "DS": ("", "0", "-1", "1e400", "nan", "4096", "0.0000001", "-99999999", "1\\2\\3"),
    "IS": ("", "0", "-1", "2", "99999999999", "1.5"),
    "CS": ("", "MONOCHROME1", "RGB", "PALETTE COLOR", "YBR_FULL_422", "SIGMOID", "LATERAL", "x" * 64, "L\\P", "R\\F"),
    "UI": ("", "1.2", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.201", "9" * 64),
}
_KEYWORDS: Final = (
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"),
    *("PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "PixelPaddingValue", "WindowCenter"),
    *("WindowWidth", "VOILUTFunction", "RescaleSlope", "RescaleIntercept", "ViewPosition", "BodyPartExamined"),
    *(
        "Modality",
        "SOPClassUID",
        "PatientOrientation",
        "ImageLaterality",
        "SpecificCharacterSet",
        "PresentationLUTShape",
    ),
)


# -- Films -----------------------------------------------------------------------------------------------------------


def picture(material: Material, rng: random.Random, folder: Path) -> Reading:
    """Spoil the bytes of a PNG, a JPEG, a TIFF or the like."""
    data = mutate_bytes(rng, rng.choice(material.pictures), material.pictures)
    return _film(rng, folder / f"film{rng.choice(('.png', '.jpg', '.tif', '.dcm', ''))}", data)


def dicom(material: Material, rng: random.Random, folder: Path) -> Reading:
    """Spoil the bytes of a DICOM film, or give it tags that do not go with its pixels."""
    data = rng.choice(material.films)
    if rng.random() < 0.6:
        import pydicom

        film = pydicom.dcmread(io.BytesIO(data))
        for keyword in rng.sample(_KEYWORDS, rng.choice((1, 1, 2, 3))):
            _spoil_tag(film, keyword, rng)
        # What pydicom refuses to write is spoilt as bytes below.
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
            data = saved(film)
    if rng.random() < 0.5:
        data = mutate_bytes(rng, data, material.films)
    return _film(rng, folder / f"film{rng.choice(('.dcm', '.dcm', '.png', ''))}", data)


def _spoil_tag(film: Dataset, keyword: str, rng: random.Random) -> None:
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    tag = tag_for_keyword(keyword) or 0
    vr = dictionary_VR(tag)
    values = _TAGS.get("US" if vr in ("US or SS", "SS") else vr, _TAGS["CS"])
    if rng.random() < 0.2:
        film.pop(tag, None)
    else:
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
            film.add_new(tag, "US" if vr == "US or SS" else vr, rng.choice(values))


def _film(rng: random.Random, file: Path, data: bytes) -> Reading:
    file.write_bytes(data)
    rendering: Rendering = rng.choice(("mimic-cxr-jpg", "voi-lut"))
    return lambda: load_image(file if rng.random() < 0.5 else data, rendering=rendering)


# -- Artifacts -------------------------------------------------------------------------------------------------------


def manifest(material: Material, rng: random.Random, folder: Path) -> Reading:
    """Spoil manifest.json, and read the artifact."""
    return _artifact(material, rng, folder, "manifest.json")


def decoder_config(material: Material, rng: random.Random, folder: Path) -> Reading:
    """Spoil the decoder's config.json, and read the artifact."""
    return _artifact(material, rng, folder, "decoder/config.json")


def _artifact(material: Material, rng: random.Random, folder: Path, spoilt: str) -> Reading:
    path = folder / "artifact"
    shutil.copytree(material.artifact, path, copy_function=os.link)
    file = path / spoilt
    data = mutate_json(rng, file.read_text(encoding="utf-8"))
    file.unlink()
    file.write_bytes(data)
    if spoilt != "manifest.json":
        listed = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for part in listed["parts"].values():
            if part and spoilt in part.get("files", ()):
                part["files"][spoilt]["bytes"] = len(data)
        (path / "manifest.json").unlink()
        (path / "manifest.json").write_text(json.dumps(listed), encoding="utf-8")

    def read() -> None:
        artifact = load_artifact(path)
        prompt_of(artifact)[1].encode("Cough.")
        for name in artifact.manifest.files:
            artifact.file(name).stat()

    return read


def graph(material: Material, rng: random.Random, folder: Path) -> Reading:
    """Spoil an ONNX graph, or let it name a file of others as its weights."""
    import onnx

    file = folder / "graph.onnx"
    data = (material.artifact / "vision.onnx").read_bytes()
    if rng.random() < 0.5:
        file.write_bytes(mutate_bytes(rng, data))
    else:
        model = onnx.load_model_from_string(data)
        for tensor in rng.sample(list(model.graph.initializer), 2):
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.ClearField("raw_data")
            entries = {
                "location": rng.choice((OUTSIDE, "/etc/passwd", str(folder / OUTSIDE), "data", "")),
                "offset": "0",
            }
            for key, value in entries.items():
                entry = tensor.external_data.add()
                entry.key, entry.value = key, value
        data = model.SerializeToString()
        file.write_bytes(mutate_bytes(rng, data) if rng.random() < 0.2 else data)
    return lambda: open_session(file, provider="CPUExecutionProvider")


def tokenizer(material: Material, rng: random.Random, folder: Path) -> Reading:
    """Spoil a SentencePiece model, and tokenise with it."""
    file = folder / "tokenizer.model"
    file.write_bytes(mutate_bytes(rng, (BASE / "tokenizer.model").read_bytes()))
    decoding = load_artifact(material.artifact).manifest.decoding

    def read() -> None:
        pieces = Tokenizer(file, decoding)
        pieces.decode(pieces.encode("Cough and fever. \N{HOT BEVERAGE}"))

    return read


def reason(material: Material, rng: random.Random, folder: Path) -> Reading:  # noqa: ARG001 - it takes no file
    """Ask with a reason, or a query, that is no sentence."""
    text: Any = hostile_value(rng)
    if rng.random() < 0.7:
        text = "".join(
            chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) for _ in range(rng.choice((1, 9, 999)))
        )
        text += rng.choice(("", "<image>", "</s>", "USER:", "\n", "\0", "\u202e", "ASSISTANT: The lungs"))
    prompt = prompt_of(load_artifact(material.artifact))[1]
    return lambda: prompt.encode(text) if rng.random() < 0.5 else prompt.encode(query=text)


# -- Lists -----------------------------------------------------------------------------------------------------------


def studies(material: Material, rng: random.Random, folder: Path) -> Reading:
    """Spoil a list of studies."""
    file, films = folder / "studies.json", material.studies.parent
    file.write_bytes(mutate_json(rng, material.studies.read_text(encoding="utf-8")))
    return lambda: check_films(read_studies(file, image_folder=films), file, every=False)


def predictions(material: Material, rng: random.Random, folder: Path) -> Reading:
    """Spoil the lines of drafted studies."""
    file = folder / "predictions.jsonl"
    lines = material.predictions.read_text(encoding="utf-8").splitlines()
    at = rng.randrange(len(lines))
    spoilt = [line.encode() for line in lines]
    spoilt[at] = mutate_json(rng, lines[at])
    file.write_bytes(rng.choice((b"\n", b"\r\n", b"", b"\n\n")).join(spoilt))
    return lambda: read_results(file)


KINDS: Final[dict[str, Kind]] = {
    kind.__name__: kind
    for kind in (
        *(
            picture,
            dicom,
            manifest,
            decoder_config,
            graph,
            tokenizer,
            reason,
            studies,
            predictions,
            checkpoint,
            lora,
            adapter,
        ),
    )
}


@contextlib.contextmanager
def input_folder(work: Path) -> Iterator[Path]:
    """Make the folder of an input, beside one that no reading may look into; both are gone after it."""
    folder, outside = work / "input", work / "outside"
    for path in (folder, outside):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    os.mkfifo(work / "input" / OUTSIDE)  # who opens it waits, and is seen to hang
    yield folder
