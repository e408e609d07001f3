"""`python -m lite run`: its file is kept line by line and gone on with, with a stand-in for the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lite.__main__ import main
from lite.artifact.open import Artifact
from lite.cli import predict
from lite.errors import ImageError
from lite.memory.process import Peaks
from lite.studies.results import Findings, Memory, StudyError, Timings, read_results
from lite.studies.study import Study

PEAKS = Peaks(rss_bytes=1, vram_bytes=None)
FINDINGS = Findings(
    text="", finish_reason="eos", token_ids=(5,), num_prompt_tokens=7,
    timings=Timings(image_s=1.0, vision_s=1.0, prefill_s=1.0, decode_steps_s=(), batch_size=2),
    memory=Memory(image=PEAKS, vision=PEAKS, prefill=PEAKS, decode=PEAKS, cache_bytes=1),
    rendering="as-is", artifact_id="", engine="onnx", device="cpu", dtype="float32", cache_dtype="int8",
    provider="CPUExecutionProvider", backend="onnxruntime", fallbacks=("a slow core",), notice="All of it.",
)  # fmt: skip


class Model:
    """Answers with what it was asked. A film named bad.png cannot be read; stop.png is where Ctrl-C comes."""

    notice = "All of it."

    def __init__(self, artifact_id: str, **changes: Any) -> None:
        self.findings = dataclasses.replace(FINDINGS, artifact_id=artifact_id, **changes)
        self.asked: list[str] = []

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def findings_batch(self, studies: Sequence[Study], **settings: Any) -> Iterator[object]:
        assert settings == {"batch_size": 2, "max_new_tokens": None, "rendering": "mimic-cxr-jpg", "any_film": False}
        for index, study in enumerate(studies):
            if study.path.name == "stop.png":
                raise KeyboardInterrupt
            self.asked.append(study.id)
            if study.path.name == "bad.png":
                yield StudyError(index=index, error=ImageError(f"{study.path}: got noise"))
            else:
                yield dataclasses.replace(self.findings, text=f"Ödem, {study.reason}")


@pytest.fixture
def model(tiny_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> Model:
    made = Model(tiny_artifact.id)
    monkeypatch.setattr(predict, "load_model", lambda _: made)
    return made


class Place:
    """A folder with a list and its films, and the command that drafts it."""

    def __init__(self, folder: Path, artifact: Path) -> None:
        self.artifact = artifact
        self.list = folder / "list.json"
        self.films = folder / "films"
        self.films.mkdir()
        self.out = folder / "new" / "out.jsonl"
        self.write("0.png", "1.png", "2.png")

    def write(self, *names: str, reason: str = "Cough.") -> None:
        entries = [{"id": name[:-4], "image": name, "reason": reason} for name in names]
        entries[0]["conversations"] = [{"value": "<image>\nDescribe."}, {"value": "Reference."}]  # type: ignore[assignment]
        self.list.write_text(json.dumps(entries))
        for name in names:
            (self.films / name).touch()

    def run(self, *more: str, out: Path | None = None, images: bool = True) -> int:
        command = ["run", str(self.artifact), str(self.list), "--out", str(out or self.out), "--batch-size", "2"]
        return main([*command, *(["--image-folder", str(self.films)] if images else []), *more])


@pytest.fixture
def place(tmp_path: Path, tiny_artifact: Artifact) -> Place:
    return Place(tmp_path, tiny_artifact.path)


def test_each_study_is_a_line_and_a_bad_film_is_skipped(
    place: Place, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    place.write("0.png", "bad.png", "2.png")
    assert place.run() == 1
    first, bad, last = read_results(place.out)
    assert (first.prediction, first.study.question, first.study.reference) == (
        "Ödem, Cough.",
        "Describe.",
        "Reference.",
    )
    assert (bad.study.id, bad.prediction, bad.error) == ("bad", None, f"{place.films / 'bad.png'}: got noise")
    assert last.findings is not None
    assert (last.findings.cache_dtype, last.findings.engine) == ("int8", "onnx")
    assert "Ödem" in place.out.read_text(encoding="utf-8")
    out, err = capsys.readouterr()
    assert out == f"2 predictions in {place.out}, 1 skipped\n"
    assert err == f"note: All of it.\nnote: a slow core\nskipped: {place.films / 'bad.png'}: got noise\n"


def test_after_ctrl_c_the_same_command_goes_on(place: Place, model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    place.write("0.png", "bad.png", "stop.png", "3.png")
    assert place.run() == 130
    assert capsys.readouterr().err.endswith(
        f"results so far, in {place.out}: 1; the same command goes on there\ninterrupted\n"
    )
    assert [result.study.id for result in read_results(place.out)] == ["0", "bad"]
    with place.out.open("a") as file:
        file.write('{"id": "stop", "ima')  # as a crash leaves it
    place.write("0.png", "bad.png", "3.png")
    model.asked.clear()
    assert place.run() == 1
    assert model.asked == ["bad", "3"]
    assert [result.study.id for result in read_results(place.out)] == ["0", "bad", "3"]
    assert "note: 1 of 3 studies are in" in capsys.readouterr().err
    place.write("0.png", "3.png", "bad.png")
    assert place.run("--limit", "2") == 0
    assert model.asked == ["bad", "3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--rendering", "voi-lut"],
            "got results of {'max_new_tokens': None, 'rendering': 'mimic-cxr-jpg'} · expected",
        ),
        ("reason", "got another reason for 0 · expected results of this list"),
        ("studies", "got a study that the list does not have, 0 · expected results of this list"),
        ("engine", "got results with engine onnx · expected torch"),
        ("artifact", "got results with artifact_id "),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(
    place: Place, model: Model, change: str | list[str], message: str, own_artifact: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert place.run("--limit", "2") == 0
    before = place.out.read_bytes()
    more = change if isinstance(change, list) else []
    if change == "reason":
        place.write("0.png", "1.png", reason="Fever.")
    elif change == "studies":
        place.write("7.png")
    elif change == "engine":
        model.findings = dataclasses.replace(model.findings, engine="torch")
        message = "got results with engine torch · expected onnx"
    elif change == "artifact":
        manifest = json.loads((own_artifact / "manifest.json").read_text())
        (own_artifact / "manifest.json").write_text(json.dumps(manifest | {"model": "another"}))
        place.artifact = own_artifact
    model.asked.clear()
    assert place.run(*more) == 1
    assert model.asked == (["2"] if change == "engine" else [])
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert error.endswith("give another --out, or move this file away")
    assert place.out.read_bytes() == before


@pytest.mark.parametrize("content", ['[{"id": "1", "image": "1.png"}]', '{"id": "1", "prediction": "Clear."}\n', "no"])
def test_a_file_of_something_else_stays_as_it_is(
    place: Place, model: Model, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place.out.parent.mkdir()
    place.out.write_text(content)
    assert place.run() == 1
    assert f"error: {place.out}:1: got " in capsys.readouterr().err
    assert place.out.read_text() == content
    assert not model.asked


def test_a_forgotten_image_folder_is_named_and_nothing_is_written(
    place: Place, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run(images=False) == 1
    err = capsys.readouterr().err
    assert "got 3 of 3 films that are not there" in err
    assert "--image-folder" in err
    assert not place.out.parent.exists()
    (place.films / "1.png").unlink()
    assert place.run() == 0  # one that is missing is skipped when its turn comes
    assert "note: 1 of 3 films are not there, and will be skipped" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_one_line(place: Place, model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run(out=Path("/dev/full")) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: /dev/full: got No space left on device · expected room for a line · make some, and start again: the 0 "
        "results before it are kept"
    )


def test_a_folder_that_is_a_file_is_found_before_the_work(
    place: Place, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    place.out.parent.touch()
    assert place.run() == 1
    assert f"error: {place.out}: got " in capsys.readouterr().err
    assert not model.asked
