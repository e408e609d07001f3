"""The loss of artifacts and engines beside others: real exports, one of them slightly damaged."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny_artifact
from torch.nn import functional as F

import lite
from benchmarks import demo
from benchmarks.phantom.write import write_studies
from benchmarks.quality import command
from benchmarks.quality.command import main
from benchmarks.quality.compare import Candidate, Loss, Row, compare, decided_tokens, draft
from benchmarks.quality.engines import BESIDE
from lite.artifact.open import Artifact
from lite.artifact.write import staged_artifact
from lite.config import DecodingDefaults
from lite.console import short_names
from lite.errors import ImageError
from lite.eval.labels import read_labels
from lite.eval.metrics import label_f1
from lite.loading import load
from lite.model import FindingsModel
from lite.studies.sources.listed import read_studies
from lite.studies.study import Study

NUM_FILMS = 4
DAMAGED = r"model\.layers\.1\.self_attn\.o_proj\.weight"


def scaled_copy(artifact: Artifact, out: Path, names: str, factor: float) -> Path:
    """Copy an artifact, the tensors of its decoder whose names match scaled: complete, and computing a little else."""
    with staged_artifact(out) as staged:
        shutil.copytree(artifact.path, staged.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        for file in (staged.path / "decoder").glob("*.safetensors"):
            tensors = load_file(file)
            tensors |= {name: (t.float() * factor).half() for name, t in tensors.items() if re.fullmatch(names, name)}
            save_file(tensors, file, metadata={"format": "pt"})
        staged.finish(artifact.manifest)
    return out


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_studies(tmp_path_factory.mktemp("loss") / "studies", count=NUM_FILMS, seed=90_001, dicom=False)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, demo_artifact: Artifact) -> Path:
    return scaled_copy(demo_artifact, tmp_path_factory.mktemp("damaged") / "artifact", DAMAGED, 2.0)


@pytest.fixture(scope="module")
def studies(listed: Path) -> Sequence[Study]:
    return read_studies(listed)


@pytest.fixture(scope="module")
def damaged_model(damaged: Path) -> FindingsModel:
    return load(damaged, device="cpu")


@pytest.fixture(scope="module")
def rows(
    demo_artifact: Artifact, damaged: Path, studies: Sequence[Study], tmp_path_factory: pytest.TempPathFactory
) -> list[Row]:
    """The demo model, itself again, and the damaged one, each in a folder that is there for its turn only."""
    folder = tmp_path_factory.mktemp("turns") / "artifact"
    dropped: list[str] = []

    def candidate(name: str, path: Path) -> Candidate:
        def make() -> tuple[FindingsModel, None]:
            return load(Path(shutil.copytree(path, folder)), device="cpu"), None

        def drop() -> None:
            shutil.rmtree(folder)
            dropped.append(name)

        return Candidate(name=name, load=make, drop=drop)

    paths = {"fp16": demo_artifact.path, "again": demo_artifact.path, "damaged": damaged}
    rows = list(compare((candidate(*item) for item in paths.items()), studies, batch_size=4))
    assert dropped == [row.name for row in rows] == list(paths)
    assert [row.error for row in rows] == [None] * 3
    return rows


@pytest.fixture(scope="module")
def drafts(demo_model: FindingsModel, studies: Sequence[Study]) -> list[lite.Findings]:
    return draft(demo_model, studies, name="fp16")


def loss_of(row: Row) -> Loss:
    assert row.loss is not None
    return row.loss


def test_an_artifact_loses_nothing_against_itself(rows: list[Row], demo_artifact: Artifact) -> None:
    first, again, _ = rows
    loss, divergence = loss_of(again), loss_of(again).divergence
    assert (divergence.mean_kl.value, divergence.p99_kl.high, divergence.same_top.low) == (0, 0, 1)
    assert (divergence.perplexity_ratio.low, divergence.perplexity_ratio.high) == (1, 1)
    assert (loss.reference, loss.same_text.low, loss.rouge_l.low) == ("fp16", 1, 1)
    assert math.isnan(divergence.first_divergent_token.value)
    assert again.figures is not None
    assert again.figures.artifact_id == demo_artifact.id
    assert first.loss is None
    assert repr(again.figures) == repr(first.figures)


def test_divergence_is_measured_along_the_references_text(
    drafts: list[lite.Findings], rows: list[Row], demo_model: FindingsModel, damaged_model: FindingsModel,
    studies: Sequence[Study],
) -> None:  # fmt: skip
    kl, same_top, nll = [], [], []
    for study, found in zip(studies, drafts, strict=True):
        token_ids = decided_tokens(found, demo_model.artifact.manifest.decoding)
        assert token_ids[:-1] == found.token_ids
        assert token_ids[-1] == demo_model.artifact.manifest.decoding.eos_token_id
        p, q = (
            torch.from_numpy(model.score(study.image, token_ids, study.reason)).double()
            for model in (demo_model, damaged_model)
        )
        kl.append(F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1))
        same_top.append(p.argmax(-1) == q.argmax(-1))
        targets = torch.tensor(token_ids)
        nll.append(F.cross_entropy(q, targets, reduction="none") - F.cross_entropy(p, targets, reduction="none"))
    divergence = loss_of(rows[2]).divergence
    assert divergence.num_tokens == sum(map(len, kl))
    assert divergence.mean_kl.value == pytest.approx(float(torch.cat(kl).mean()), rel=1e-6)
    assert divergence.mean_kl.value > 1e-3
    assert divergence.same_top.value == pytest.approx(float(torch.cat(same_top).double().mean()))
    assert divergence.same_top.value < 1
    assert divergence.perplexity_ratio.value == pytest.approx(float(torch.cat(nll).mean().exp()), rel=1e-6)
    first = [int((~same).nonzero()[0]) for same in same_top if not bool(same.all())]
    assert divergence.first_divergent_token.value == np.quantile(first, 0.5, method="inverted_cdf")
    assert divergence.first_divergent_token.count == len(first)


def test_texts_are_compared_and_scored_against_the_reports(
    rows: list[Row], drafts: list[lite.Findings], damaged_model: FindingsModel, studies: Sequence[Study]
) -> None:
    theirs = [found.text for found in drafts]
    ours = [found.text for found in draft(damaged_model, studies, name="damaged")]
    truth = [read_labels(study.reference) for study in studies]
    for figures, texts in ((rows[0].figures, theirs), (rows[2].figures, ours)):
        expected = label_f1(truth, [read_labels(text) for text in texts])
        assert figures is not None
        assert (figures.micro_f1, figures.macro_f1) == (expected.micro, expected.macro)
        assert figures.setting == "fp16, torch, float32 cache"
    same = [a == b for a, b in zip(ours, theirs, strict=True)]
    loss = loss_of(rows[2])
    assert 0 < sum(same) < NUM_FILMS
    assert loss.same_text.value == pytest.approx(sum(same) / NUM_FILMS)
    assert loss.rouge_l.value < 1
    # Greedy decoding leaves the reference's text where teacher forcing says so, so equal texts diverge nowhere.
    assert loss.divergence.without_divergence.value == loss.same_text.value


def test_a_text_that_was_cut_gets_no_end(tmp_path: Path, tokenizer_model: bytes, studies: Sequence[Study]) -> None:
    tiny = write_tiny_artifact(tmp_path / "tiny", tokenizer_model, decoding=DecodingDefaults(max_new_tokens=3))
    (found,) = draft(load(tiny.path, device="cpu"), studies[:1], name="tiny")
    assert len(decided_tokens(found, tiny.manifest.decoding)) == 3
    assert 2 not in decided_tokens(found, tiny.manifest.decoding)


def test_a_candidate_is_refused_before_anything_is_computed(
    tmp_path: Path, tiny_artifact: Artifact, demo_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    no_list = str(tmp_path / "none.json")
    arguments = ["artifacts", no_list, str(demo_artifact.path), "--reference", str(tiny_artifact.path)]
    assert main(arguments) == 1
    assert "error: " in (err := capsys.readouterr().err)
    assert "got tokenizer sha256" in err


def test_the_command_prints_a_table(
    listed: Path, demo_artifact: Artifact, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["artifacts", str(listed), "--reference", str(demo_artifact.path), str(damaged)]
    assert main([*arguments, "--limit", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    header, rule, *rows = printed.partition("\n\n")[0].splitlines()
    columns = [cell.strip() for cell in header.split("|")[1:-1]]
    assert {len(line) for line in (rule, *rows)} == {len(header)}
    cells = [dict(zip(columns, (cell.strip() for cell in row.split("|")[1:-1]), strict=True)) for row in rows]
    names = short_names([demo_artifact.path, damaged])
    assert [row["row"] for row in cells] == names
    assert [row["beside"] for row in cells] == ["–", names[0]]
    assert "export s" not in columns  # nothing was exported here
    assert f"- Films: 2 of {listed}.\n" in printed
    assert f"- Artifacts: {names[0]} {demo_artifact.id}, {names[1]} " in printed
    assert cells[0]["KL, nats/token"] == "–"
    assert "[" in cells[1]["KL, nats/token"]
    megabytes = sum(file.stat().st_size for file in (damaged / "decoder").iterdir()) / 1e6
    assert cells[0]["decoder MB"] == cells[1]["decoder MB"] == f"{megabytes:.2f}"


def test_a_candidate_that_cannot_compute_does_not_stop_the_others(
    listed: Path, demo_artifact: Artifact, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = scaled_copy(demo_artifact, tmp_path / "broken", DAMAGED, math.inf)
    # Twice in the list: folders of one name are told apart by their paths.
    itself = str(demo_artifact.path)
    arguments = ["artifacts", str(listed), "--reference", itself, str(broken), str(damaged), itself]
    assert main([*arguments, "--limit", "2", "--device", "cpu", "--json"]) == 1

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    values = json.loads(capsys.readouterr().out, parse_constant=refuse)
    reference, failed, candidate, same = values["artifacts"]
    assert reference["figures"]["artifact_id"] == demo_artifact.id
    assert (failed["name"], failed["figures"], failed["loss"]) == (str(broken), None, None)
    assert "not finite" in failed["error"]
    assert candidate["name"] == str(damaged)
    assert candidate["figures"]["artifact_id"] != demo_artifact.id
    assert 0 < candidate["loss"]["divergence"]["mean_kl"]["low"] <= candidate["loss"]["divergence"]["mean_kl"]["value"]
    nothing = {"value": None, "low": None, "high": None, "count": 0}
    assert same["loss"]["divergence"]["first_divergent_token"] == nothing


def test_a_film_that_cannot_be_read_is_an_error_and_not_a_smaller_list(
    listed: Path, tmp_path: Path, demo_model: FindingsModel
) -> None:
    own = Path(shutil.copytree(listed.parent, tmp_path / "studies"))
    film = read_studies(own / listed.name)[1].path
    film.write_bytes(b"noise")
    with pytest.raises(ImageError, match=film.name):
        draft(demo_model, read_studies(own / listed.name)[:2], name="fp16")


def test_films_without_reports_are_refused(
    listed: Path, tmp_path: Path, demo_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [entry | {"conversations": []} for entry in json.loads(listed.read_text(encoding="utf-8"))]
    (tmp_path / "bare.json").write_text(json.dumps(entries), encoding="utf-8")
    own = str(demo_artifact.path)
    assert main(["artifacts", str(tmp_path / "bare.json"), "--reference", own, own]) == 1
    assert "without findings · expected the report of each film" in capsys.readouterr().err


# -- Engines ---------------------------------------------------------------------------------------------------------


def test_both_engines_draft_films_of_their_own_and_the_table_says_how_far_they_agree(
    demo_onnx_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["engines", str(demo_onnx_artifact.path), "--films", "2", "--seed", "7", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == f"python -m benchmarks quality {' '.join(arguments)}"
    assert found["films"] == "2 of seed 7"
    tables = {reference: found[f"beside {reference}"] for reference in BESIDE}
    kl = {}
    for reference, (own, *others) in tables.items():
        assert (own["name"], own["loss"]) == (reference, None)
        assert [(row["name"], row["loss"]["reference"]) for row in others] == [
            (name, reference) for name in BESIDE[reference]
        ]
        kl |= {(row["name"], reference): row["loss"]["divergence"]["mean_kl"]["value"] for row in others}
    # Two engines, and two caches of each: near, and not the same twice.
    assert 0 < kl["onnx", "torch"] < 2e-3
    assert 0 < kl["onnx-int8-cache", "onnx"] < 1e-3
    assert 0 < kl["torch-int8-cache", "torch"] < 1e-3
    decoder = "gptq-int4 (groups of 128, calibrated on 64 studies of studies.json)"
    caches = ("torch, float32", "torch, int8", "onnx, float32", "onnx, int8")
    assert [row["figures"]["setting"] for row in tables["torch"]] == [f"{decoder}, {cache} cache" for cache in caches]


def test_an_artifact_without_decoder_onnx_is_an_error(
    demo_int4_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["engines", str(demo_int4_artifact.path), "--films", "1"]) == 1
    assert "got an artifact without decoder.onnx" in capsys.readouterr().err
    for wrong in ([], ["engines"], ["engines", str(demo_int4_artifact.path), "--films", "0"]):
        with pytest.raises(SystemExit, match="^2$"):
            main(wrong)


def test_no_other_set_has_these_films() -> None:
    others = {demo.SEED, demo.CALIBRATION_SEED, command.FORMATS_SEED, command.CALIBRATION_SEED, 20_261_301}
    assert command.ENGINES_SEED not in others
