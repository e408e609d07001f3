"""The phantom's towers for retrieval: what they find, and that findings are drafted by what they were."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import random_checkpoint
from exported import exported
from repository import CHECKPOINT, ROOT

from benchmarks.phantom.find import find, recall
from benchmarks.phantom.findings import Finding, Study
from benchmarks.phantom.queries import answers, describe
from benchmarks.phantom.retrieve import BERT_FOLDER, TOWER_FILE, vocabulary
from export import ExportSettings, export_artifact

if TYPE_CHECKING:
    from pathlib import Path

    from lite.artifact.open import Artifact

STUDIES = ROOT / "benchmarks" / "references" / "phantom" / "studies.json"
# Of all tensors of the trunk that findings run, as they were before there were towers for retrieval.
TRUNK_SHA256 = "6b7b6a8ef496665c0fbbb9ba554bc84e530b639ca72e59a3cad9fb4433283965"


def test_findings_are_drafted_by_the_same_weights() -> None:
    state = random_checkpoint.load(CHECKPOINT / "llava-rad-phantom" / TOWER_FILE)["state_dict"]
    digest = hashlib.sha256()
    for name in sorted(state):
        if ".trunk." in name and not name.startswith(("module.visual.trunk.blocks.4.", "module.visual.trunk.norm.")):
            digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
    assert digest.hexdigest() == TRUNK_SHA256


def test_the_vocabulary_is_a_function_of_its_seed() -> None:
    committed = (CHECKPOINT / BERT_FOLDER / "vocab.txt").read_text(encoding="utf-8")
    seed = json.loads((CHECKPOINT / "retrieval.json").read_text(encoding="utf-8"))["seed"]
    assert committed.splitlines() == vocabulary(seed=seed)


def test_the_phantom_finds_films_by_words() -> None:
    """Of the 24 films of the reference, a report's own one is among the first five far more often than by chance."""

    def make(out: Path) -> Artifact:
        settings = ExportSettings(
            vision_format="int8", text_format="int8", retrieval=True, text_vocab=CHECKPOINT / BERT_FOLDER,
            verify_data=STUDIES, verify_studies=24, verify_tokens=1,
        )  # fmt: skip
        return export_artifact(CHECKPOINT / "llava-rad-phantom", CHECKPOINT / "base", out, settings)

    artifact = exported("retrieval", make)
    part = artifact.manifest.parts.retrieval
    assert part is not None
    assert part.fidelity is not None
    assert part.fidelity.recall["text to film @5"] > 0.6  # 0.21 by chance
    page = find(artifact.path, STUDIES)
    assert "left pleural effusion" in page
    assert page.splitlines()[-1].startswith("mean")


def test_a_study_answers_what_leaves_some_of_it_out() -> None:
    effusion = Finding(label="Pleural Effusion", side="bilateral", size="large")
    found = answers(Study(seed=0, scenario="trauma", view="PA", findings=(effusion,)))
    assert ("pleural effusion", "left", None, None) in found
    assert ("pleural effusion", None, "large", None) in found
    assert ("pleural effusion", "left", "small", None) not in found
    assert describe(("cardiomegaly", None, "large", None)) == "severe cardiomegaly"
    assert describe(("mass", "left", None, "upper")) == "left upper zone mass"


def test_recall_counts_a_tie_as_lost() -> None:
    similarity = np.array([[1, 0, 0], [0, 0.5, 0.5], [0.9, 0.8, 0.1]], np.float32)
    assert recall(similarity) == pytest.approx([1 / 3, 1, 1])
