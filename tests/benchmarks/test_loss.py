"""The loss of an artifact against another one: real exports, one of them slightly damaged."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny_artifact
from torch.nn import functional as F

from benchmarks.phantom.score import read_truth
from benchmarks.phantom.write import write_studies
from benchmarks.quality import artifacts
from benchmarks.quality.artifacts import Loss, Reference, measure_loss, take_reference
from lite.artifact.open import Artifact
from lite.artifact.write import staged_artifact
from lite.config import DecodingDefaults, Preprocessing, PromptTemplate
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
def reference(demo_artifact: Artifact, listed: Path) -> Iterator[Reference]:
    with take_reference(demo_artifact.path, listed, name="fp16", batch_size=4, device="cpu") as reference:
        yield reference


@pytest.fixture(scope="module")
def loss(reference: Reference, damaged: Path) -> Loss:
    return measure_loss(reference, damaged)


def test_an_artifact_loses_nothing_against_itself(reference: Reference, demo_artifact: Artifact) -> None:
    loss = measure_loss(reference, demo_artifact.path, name="again")
    divergence = loss.divergence
    assert (divergence.mean_kl.value, divergence.p99_kl.high, divergence.same_top.low) == (0, 0, 1)
    assert (divergence.perplexity_ratio.low, divergence.perplexity_ratio.high, loss.same_text.low) == (1, 1, 1)
    assert math.isnan(divergence.first_divergent_token.value)
    assert loss.figures == dataclasses.replace(reference.figures, name="again")
    assert loss.figures.artifact_id == demo_artifact.id


def test_divergence_is_measured_along_the_references_text(
    reference: Reference, loss: Loss, demo_model: FindingsModel, damaged: Path, listed: Path
) -> None:
    candidate = load(damaged, device="cpu")
    kl, same_top, nll = [], [], []
    for study, token_ids in zip(read_studies(listed), reference.drafts.token_ids, strict=True):
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
    divergence = loss.divergence
    assert divergence.num_tokens == sum(map(len, reference.drafts.token_ids))
    assert divergence.mean_kl.value == pytest.approx(float(torch.cat(kl).mean()), rel=1e-6)
    assert divergence.mean_kl.value > 1e-3
    assert divergence.same_top.value == pytest.approx(float(torch.cat(same_top).double().mean()))
    assert divergence.same_top.value < 1
    assert divergence.perplexity_ratio.value == pytest.approx(float(torch.cat(nll).mean().exp()), rel=1e-6)
    first = [int((~same).nonzero()[0]) for same in same_top if not bool(same.all())]
    assert divergence.first_divergent_token.value == np.quantile(first, 0.5, method="inverted_cdf")
    assert divergence.first_divergent_token.count == len(first)


def test_texts_are_compared_and_scored_against_what_was_drawn(
    reference: Reference, loss: Loss, demo_model: FindingsModel, damaged: Path, listed: Path
) -> None:
    films = [(study.image, study.reason) for study in read_studies(listed)]
    theirs, ours = (
        [findings.text for findings in model.findings_batch(films)]
        for model in (demo_model, load(damaged, device="cpu"))
    )
    truth = list(read_truth(listed).values())
    for figures, texts in ((reference.figures, theirs), (loss.figures, ours)):
        expected = label_f1(truth, [read_labels(text) for text in texts])
        assert (figures.micro_f1, figures.macro_f1) == (expected.micro, expected.macro)
    same = [a == b for a, b in zip(ours, theirs, strict=True)]
    assert 0 < sum(same) < NUM_FILMS
    assert loss.same_text.value == pytest.approx(sum(same) / NUM_FILMS)
    # Greedy decoding leaves the reference's text where teacher forcing says so, so equal texts diverge nowhere.
    assert loss.divergence.without_divergence.value == loss.same_text.value


def test_bytes_are_those_of_the_decoder_on_disk(loss: Loss, damaged: Path) -> None:
    files = [file for file in (damaged / "decoder").rglob("*") if file.is_file()]
    assert loss.figures.decoder_bytes == sum(file.stat().st_size for file in files)
    assert loss.figures.decoder_format == "fp16"
    assert loss.figures.name == "artifact"


def test_only_the_logits_of_the_reference_are_kept_and_only_for_the_block(
    demo_artifact: Artifact, listed: Path
) -> None:
    with take_reference(demo_artifact.path, listed, limit=2, device="cpu") as reference:
        assert len(reference.studies) == len(reference.truth) == len(reference.drafts.texts) == 2
        vocab_size = demo_artifact.decoder_config().vocab_size
        for index, token_ids in enumerate(reference.drafts.token_ids):
            assert reference.logits(index).shape == (len(token_ids), vocab_size)
            assert reference.logits(index).dtype == np.float32
        assert len(list(reference.folder.iterdir())) == 2
    assert not reference.folder.exists()


def test_a_text_that_was_cut_gets_no_end(
    tmp_path: Path, tokenizer_model: bytes, listed: Path, demo_artifact: Artifact
) -> None:
    tiny = write_tiny_artifact(tmp_path / "tiny", tokenizer_model, decoding=DecodingDefaults(max_new_tokens=3))
    with take_reference(tiny.path, listed, limit=2, device="cpu") as reference:
        assert [len(token_ids) for token_ids in reference.drafts.token_ids] == [3, 3]
        assert all(2 not in token_ids for token_ids in reference.drafts.token_ids)


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
    command = [no_list, str(demo_artifact.path), "--reference", str(tiny_artifact.path)]
    assert artifacts.main(command) == 1
    assert "error: " in (err := capsys.readouterr().err)
    assert "got tokenizer sha256" in err


def test_the_command_prints_a_table(
    listed: Path, demo_artifact: Artifact, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(listed), "--reference", str(demo_artifact.path), str(damaged)]
    assert artifacts.main([*command, "--limit", "2", "--device", "cpu"]) == 0
    header, rule, *rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    columns = [cell.strip() for cell in header.split("|")[1:-1]]
    assert {len(line) for line in (rule, *rows)} == {len(header)}
    # Two folders of one name are told apart by their paths.
    cells = [dict(zip(columns, (cell.strip() for cell in row.split("|")[1:-1]), strict=True)) for row in rows]
    assert [row["artifact"] for row in cells] == [str(demo_artifact.path), str(damaged)]
    assert cells[0]["KL, nats/token"] == "–"
    assert "[" in cells[1]["KL, nats/token"]
    megabytes = sum(file.stat().st_size for file in (damaged / "decoder").iterdir()) / 1e6
    assert cells[0]["decoder MB"] == cells[1]["decoder MB"] == f"{megabytes:.2f}"


def test_a_candidate_that_cannot_compute_does_not_stop_the_others(
    listed: Path, demo_artifact: Artifact, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = scaled_copy(demo_artifact, tmp_path / "broken", math.inf)
    itself = str(demo_artifact.path)
    command = [str(listed), "--reference", itself, str(broken), str(damaged), itself]
    assert artifacts.main([*command, "--limit", "2", "--device", "cpu", "--json"]) == 1
    shown = capsys.readouterr()
    assert f"error: {broken}: " in shown.err

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    values = json.loads(shown.out, parse_constant=refuse)
    assert values["num_studies"] == 2
    candidate, same = values["candidates"]
    assert candidate["figures"]["name"] == str(damaged)
    assert candidate["figures"]["artifact_id"] != values["reference"]["artifact_id"] == demo_artifact.id
    assert 0 < candidate["divergence"]["mean_kl"]["low"] <= candidate["divergence"]["mean_kl"]["value"]
    assert same["divergence"]["first_divergent_token"] == {"value": None, "low": None, "high": None, "count": 0}


def test_a_film_that_cannot_be_read_is_an_error_and_not_a_smaller_list(
    listed: Path, tmp_path: Path, demo_artifact: Artifact
) -> None:
    own = Path(shutil.copytree(listed.parent, tmp_path / "studies"))
    film = read_studies(own / listed.name)[1].image
    film.write_bytes(b"noise")
    with (
        pytest.raises(ImageError, match=film.name),
        take_reference(demo_artifact.path, own / listed.name, limit=2, device="cpu"),
    ):
        pass


def test_a_full_disk_is_found_before_it_is_full(
    listed: Path, demo_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(listed.parent)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with (
        pytest.raises(LiteError, match=r"got 0.0 GB of free disk .* --limit.*TMPDIR"),
        take_reference(demo_artifact.path, listed, limit=1, device="cpu"),
    ):
        pass
