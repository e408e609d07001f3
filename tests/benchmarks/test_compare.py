"""The loss of an artifact against another one: real exports, one of them slightly damaged."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny_artifact
from torch.nn import functional as F

from benchmarks.phantom.score import read_truth
from benchmarks.phantom.write import write_studies
from benchmarks.quality.command import main, read_films
from benchmarks.quality.compare import Candidate, Drafts, Films, Loss, Row, compare_artifacts, draft, keep_logits
from lite.artifact.open import Artifact
from lite.artifact.write import staged_artifact
from lite.config import DecodingDefaults, Preprocessing, PromptTemplate
from lite.console import short_names
from lite.errors import ArtifactError, ImageError, LiteError
from lite.eval.labels import read_labels
from lite.eval.metrics import label_f1
from lite.eval.record import check_belongs, settings_of
from lite.loading import load
from lite.model import FindingsModel
from lite.studies.readers import read_studies

NUM_FILMS = 6
DAMAGED = "model.layers.1.self_attn.o_proj.weight"


def scaled_copy(artifact: Artifact, out: Path, factor: float) -> Path:
    """Copy an artifact with one matrix of its decoder scaled: a complete artifact that computes a little else."""
    with staged_artifact(out) as staged:
        shutil.copytree(artifact.path, staged.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        for file in (staged.path / "decoder").glob("*.safetensors"):
            weights = load_file(file)
            if DAMAGED in weights:
                weights[DAMAGED] = (weights[DAMAGED].float() * factor).half()
                save_file(weights, file)
        staged.finish(artifact.manifest)
    return out


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_studies(tmp_path_factory.mktemp("loss") / "studies", count=NUM_FILMS, seed=90_001, dicom=False)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, demo_artifact: Artifact) -> Path:
    return scaled_copy(demo_artifact, tmp_path_factory.mktemp("damaged") / "artifact", 2.0)


@pytest.fixture(scope="module")
def films(listed: Path) -> Films:
    return read_films(listed)


@pytest.fixture(scope="module")
def rows(demo_artifact: Artifact, damaged: Path, films: Films) -> list[Row]:
    """The demo model, itself again, and the damaged one."""
    dropped: list[str] = []
    paths = {"fp16": demo_artifact.path, "again": demo_artifact.path, "damaged": damaged}

    def candidate(name: str) -> Candidate:
        def make() -> tuple[Path, None]:
            assert len(dropped) == list(paths).index(name)  # one after the other
            return paths[name], None

        return Candidate(name=name, make=make, drop=lambda: dropped.append(name))

    rows = list(compare_artifacts(map(candidate, paths), films, batch_size=4, device="cpu"))
    assert dropped == [row.name for row in rows] == list(paths)
    return rows


@pytest.fixture(scope="module")
def reference(demo_model: FindingsModel, films: Films, tmp_path_factory: pytest.TempPathFactory) -> Drafts:
    drafts = draft(demo_model, films.studies, name="fp16")
    return keep_logits(demo_model, films.studies, drafts, tmp_path_factory.mktemp("logits"))


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
    # Studies that share a batch have no time of their own.
    assert math.isnan(again.figures.total_s)
    assert first.loss is None
    assert repr(again.figures) == repr(first.figures)


def test_divergence_is_measured_along_the_references_text(
    reference: Drafts, rows: list[Row], demo_model: FindingsModel, damaged: Path, listed: Path
) -> None:
    candidate = load(damaged, device="cpu")
    kl, same_top, nll = [], [], []
    for index, study in enumerate(read_studies(listed)):
        token_ids = reference.token_ids(index)
        assert token_ids[:-1] == demo_model.findings(study.image, study.reason).token_ids
        assert token_ids[-1] == demo_model.artifact.manifest.decoding.eos_token_id
        p, q = (
            torch.from_numpy(model.score(study.image, token_ids, study.reason)).double()
            for model in (demo_model, candidate)
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


def test_texts_are_compared_and_scored_against_what_was_drawn(
    rows: list[Row], demo_model: FindingsModel, damaged: Path, listed: Path
) -> None:
    films = [(study.image, study.reason) for study in read_studies(listed)]
    theirs, ours = (
        [findings.text for findings in model.findings_batch(films)]
        for model in (demo_model, load(damaged, device="cpu"))
    )
    truth = list(read_truth(listed).values())
    for figures, texts in ((rows[0].figures, theirs), (rows[2].figures, ours)):
        expected = label_f1(truth, [read_labels(text) for text in texts])
        assert figures is not None
        assert (figures.micro_f1, figures.macro_f1) == (expected.micro, expected.macro)
    same = [a == b for a, b in zip(ours, theirs, strict=True)]
    loss = loss_of(rows[2])
    assert 0 < sum(same) < NUM_FILMS
    assert loss.same_text.value == pytest.approx(sum(same) / NUM_FILMS)
    assert loss.rouge_l.value < 1
    # Greedy decoding leaves the reference's text where teacher forcing says so, so equal texts diverge nowhere.
    assert loss.divergence.without_divergence.value == loss.same_text.value


def test_a_row_says_what_was_loaded(rows: list[Row], damaged: Path) -> None:
    row = rows[2]
    files = [file for file in (damaged / "decoder").rglob("*") if file.is_file()]
    assert row.figures is not None
    assert row.figures.decoder_bytes == sum(file.stat().st_size for file in files)
    assert row.figures.setting == "fp16, torch, float32 cache"


def test_the_logits_are_kept_study_by_study(reference: Drafts, demo_artifact: Artifact) -> None:
    assert reference.logits is not None
    kept = sorted(reference.logits.iterdir())
    assert [file.name for file in kept] == [f"{index}.npy" for index in range(NUM_FILMS)]
    for index, file in enumerate(kept):
        logits = np.load(file)
        assert logits.shape == (len(reference.token_ids(index)), demo_artifact.decoder_config().vocab_size)
        assert logits.dtype == np.float32
    with pytest.raises(LiteError, match="got drafts without logits"):
        dataclasses.replace(reference, logits=None).compare(0, np.zeros((1, 1)))


def test_a_text_that_was_cut_gets_no_end(tmp_path: Path, tokenizer_model: bytes, listed: Path) -> None:
    tiny = write_tiny_artifact(tmp_path / "tiny", tokenizer_model, decoding=DecodingDefaults(max_new_tokens=3))
    studies = read_films(listed, limit=2).studies
    assert len(studies) == 2
    drafts = draft(load(tiny.path, device="cpu"), studies, name="tiny")
    assert [len(drafts.token_ids(index)) for index in (0, 1)] == [3, 3]
    assert all(2 not in drafts.token_ids(index) for index in (0, 1))


def test_artifacts_of_different_checkpoints_are_refused(
    tmp_path: Path, tokenizer_model: bytes, tiny_artifact: Artifact, demo_artifact: Artifact
) -> None:
    with pytest.raises(ArtifactError, match=r"got tokenizer sha256 '[0-9a-f]{64}' · expected '[0-9a-f]{64}', as in"):
        check_belongs(demo_artifact, settings_of(tiny_artifact), reference=str(tiny_artifact.path))
    for number, (changes, message) in enumerate(
        (
            ({"prompt": PromptTemplate(question_without_reason="What is seen?")},
             r"got prompt.question_without_reason 'What is seen\?' · expected 'Provide a desc"),
            ({"preprocessing": Preprocessing(image_size=28, mean=(0.5, 0.5, 0.5))}, r"got preprocessing.mean \(0.5"),
            ({"decoding": DecodingDefaults(max_new_tokens=7)}, "got decoding.max_new_tokens 7 · expected 24"),
        )
    ):  # fmt: skip
        other = write_tiny_artifact(tmp_path / str(number), tokenizer_model, **changes)
        with pytest.raises(ArtifactError, match=message):
            check_belongs(other, settings_of(tiny_artifact), reference=str(tiny_artifact.path))
    same = write_tiny_artifact(tmp_path / "same", tokenizer_model)
    check_belongs(same, settings_of(tiny_artifact), reference=str(tiny_artifact.path))


def test_a_candidate_is_refused_before_anything_is_computed(
    tmp_path: Path, tiny_artifact: Artifact, demo_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    no_list = str(tmp_path / "none.json")
    command = ["artifacts", no_list, str(demo_artifact.path), "--reference", str(tiny_artifact.path)]
    assert main(command) == 1
    assert "error: " in (err := capsys.readouterr().err)
    assert "got tokenizer sha256" in err


def test_the_command_prints_a_table(
    listed: Path, demo_artifact: Artifact, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["artifacts", str(listed), "--reference", str(demo_artifact.path), str(damaged)]
    assert main([*command, "--limit", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    header, rule, *rows = printed.partition("\n\n")[0].splitlines()
    columns = [cell.strip() for cell in header.split("|")[1:-1]]
    assert {len(line) for line in (rule, *rows)} == {len(header)}
    cells = [dict(zip(columns, (cell.strip() for cell in row.split("|")[1:-1]), strict=True)) for row in rows]
    names = short_names([demo_artifact.path, damaged])
    assert [row["row"] for row in cells] == names
    assert [row["beside"] for row in cells] == ["–", names[0]]
    # Nothing was exported here, and nothing was timed.
    assert not {"export s", "study s"} & set(columns)
    assert f"- Films: 2 of {listed}.\n" in printed
    assert f"- Artifacts: {names[0]} {demo_artifact.id}, {names[1]} " in printed
    assert cells[0]["KL, nats/token"] == "–"
    assert "[" in cells[1]["KL, nats/token"]
    megabytes = sum(file.stat().st_size for file in (damaged / "decoder").iterdir()) / 1e6
    assert cells[0]["decoder MB"] == cells[1]["decoder MB"] == f"{megabytes:.2f}"


def test_a_candidate_that_cannot_compute_does_not_stop_the_others(
    listed: Path, demo_artifact: Artifact, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = scaled_copy(demo_artifact, tmp_path / "broken", math.inf)
    # Twice in the list: folders of one name are told apart by their paths.
    itself = str(demo_artifact.path)
    command = ["artifacts", str(listed), "--reference", itself, str(broken), str(damaged), itself]
    assert main([*command, "--limit", "2", "--device", "cpu", "--json"]) == 1

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
        draft(demo_model, read_films(own / listed.name, limit=2).studies, name="fp16")


def test_a_full_disk_is_found_before_it_is_full(
    reference: Drafts, films: Films, demo_model: FindingsModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(LiteError, match=r"got 0.0 GB of free disk .* --limit.*TMPDIR"):
        keep_logits(demo_model, films.studies, reference, tmp_path)
    assert not list(tmp_path.iterdir())
