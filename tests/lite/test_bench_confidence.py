"""Studies of a report that say which sentences are less likely true."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import lite
from lite.artifact.open import Artifact
from lite.bench.measure import Job, measure
from lite.bench.quality import Clinical
from lite.bench.results import Row
from lite.bench.studies import Writing, study_card
from lite.engines.options import LoadOptions
from lite.errors import LiteError
from lite.eval.calibration import Judged, beside, learn
from lite.eval.confidence import TOP, stated
from lite.studies.sources.listed import read_studies
from lite.studies.study import Study


def benched(artifact: Path, studies: tuple[Study, ...]) -> Row:
    job = Job(
        artifacts=(), ways={}, studies=studies, data="two", batch_sizes=(1,), min_runs=1, clinical=Clinical(),
        command="",
    )  # fmt: skip
    return measure(job, artifact, LoadOptions(), name="demo", on_progress=lambda *_: None)


def test_it_does_where_a_calibration_is_beside_the_artifact(
    tmp_path: Path, demo_onnx_artifact: Artifact, calibration: Path
) -> None:
    own = Path(shutil.copytree(demo_onnx_artifact.path, tmp_path / "demo"))
    study = read_studies(calibration)[0]
    studies = (study, Study("none.png", reference="No effusion."))
    with lite.load(own) as model:
        findings = model.findings(study.image, study.reason, top_logprobs=TOP)
        found = [one for one in stated(findings, model.tokenizer) if one.contrast is not None]
        judged = [Judged(one, index, index % 4 == place) for index in range(80) for place, one in enumerate(found)]
        learned = learn(judged, with_samples=False, settings=model.settings, data="made.json")
    assert benched(own, studies).drafts[0].sentences == (), "without one nothing is said"
    beside(own).write_text(learned.to_json())
    read, failed = benched(own, studies).drafts
    assert [sentence for sentence, _ in read.sentences] == [one.text.strip() for one in found]
    assert all(0 < likely < 1 for _, likely in read.sentences)
    assert (failed.text, failed.sentences) == ("", ())
    # One that cannot be read is refused before anything is measured.
    beside(own).write_text("{}")
    with pytest.raises(LiteError, match="make it again"):
        benched(own, (Study("none.png"),))


def test_a_card_names_the_least_likely_first() -> None:
    writing = Writing("tiny", "One. Two. Three.", sentences=[("One.", 0.8), ("Two.", 0.95), ("Three.", 0.3)])
    (text,) = study_card("a", "", "One.", [writing], marked=False).texts
    assert text.unsure == [("Three.", 0.3), ("One.", 0.8)]
