"""Reference records: taken and replayed with tiny models, one of them slightly another."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from recorded import take, three_studies
from tiny import write_tiny_artifact

from lite.artifact.open import Artifact
from lite.config import DecodingDefaults, Preprocessing, PromptTemplate
from lite.errors import ArtifactError, ImageError, LiteError
from lite.eval.divergence import compare_logits
from lite.eval.record import ReferenceRecord, check_belongs, check_record, check_studies, settings_of, studies_of
from lite.eval.record_file import read_record, write_record
from lite.loading import load
from lite.model import FindingsModel
from lite.studies.films import sha256_of_studies
from lite.studies.study import Study

EOS = 2


@pytest.fixture(scope="module")
def studies(films: list[Path]) -> list[Study]:
    return three_studies(films)


def like(model: FindingsModel, **changes: Any) -> Any:
    """What `take_record` uses of a model, some of it replaced."""
    names = ("artifact", "notice", "findings", "score")
    return SimpleNamespace(**({name: getattr(model, name) for name in names} | changes))


@pytest.fixture(scope="module")
def record(tiny_model: FindingsModel, studies: list[Study]) -> ReferenceRecord:
    return take(tiny_model, studies)


@pytest.fixture
def written(record: ReferenceRecord, tmp_path: Path) -> Path:
    return write_record(record, tmp_path / "R")


@pytest.fixture(scope="module")
def changed_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> FindingsModel:
    """A model with the same weights that computes a little else."""
    out = tmp_path_factory.mktemp("changed") / "artifact"
    return load(write_tiny_artifact(out, tokenizer_model, llama_changes={"rms_norm_eps": 0.1}).path, device="cpu")


def logits_of(model: FindingsModel, record: ReferenceRecord, index: int, study: Study) -> np.ndarray:
    return model.score(study.image, record.token_ids(index), study.reason)


def test_a_record_holds_what_the_model_wrote_and_found_probable(
    record: ReferenceRecord, tiny_model: FindingsModel, studies: list[Study]
) -> None:
    for index, study in enumerate(studies):
        findings = tiny_model.findings(study.image, study.reason)
        end = [EOS] if findings.finish_reason == "eos" else []
        assert list(record.token_ids(index)) == [*findings.token_ids, *end]
        assert record.texts[index] == findings.text
        kept = record.info.studies[index]
        assert (kept.id, kept.finish_reason) == (study.id, findings.finish_reason)
        assert min(dataclasses.astuple(kept.times)) > 0
        logits = logits_of(tiny_model, record, index, study).astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        tokens = slice(record.offsets[index], record.offsets[index + 1])
        order = np.argsort(-log_probs, axis=1)
        np.testing.assert_array_equal(record.top.ids[tokens], order[:, :64])
        ranked = np.take_along_axis(log_probs, order, axis=1)
        np.testing.assert_allclose(record.top.log_probs[tokens], ranked[:, :64], rtol=1e-6)
        np.testing.assert_allclose(record.top.tail_mass[tokens], np.exp(ranked[:, 64:]).sum(axis=1), rtol=1e-5)
    info, artifact = record.info, tiny_model.artifact
    assert (info.artifact_id, info.model, info.decoder_format) == (artifact.id, "tiny", "fp16")
    assert (info.engine, info.device, info.dtype, info.provider) == ("torch", "cpu", "float32", "CPUExecutionProvider")
    assert (info.data, info.data_sha256) == ("list.json", sha256_of_studies(studies))
    assert (info.machine, info.versions, info.notice) == ("a test", {"numpy": "2"}, artifact.manifest.notice)


def test_a_text_that_was_cut_has_no_end_and_one_that_was_not_has(
    record: ReferenceRecord, studies: list[Study], tiny_model: FindingsModel
) -> None:
    reasons = [study.finish_reason for study in record.info.studies]
    ends = [record.token_ids(index)[-1] == EOS for index in range(len(studies))]
    assert ends == [reason == "eos" for reason in reasons]
    short = tiny_model.findings(studies[0].image, studies[0].reason, max_new_tokens=2)
    for finish_reason, token_ids in (("eos", (*short.token_ids, EOS)), ("length", short.token_ids)):
        model = like(
            tiny_model,
            findings=Mock(return_value=dataclasses.replace(short, finish_reason=finish_reason)),
            score=Mock(return_value=np.eye(420, dtype=np.float32)[list(token_ids)]),
        )
        assert take(model, studies[:1]).token_ids(0) == token_ids
        assert model.score.call_args.args == (studies[0].image, token_ids, studies[0].reason)


def test_another_model_diverges_as_much_as_over_the_whole_vocabulary_but_for_the_gap(
    written: Path, tiny_model: FindingsModel, changed_model: FindingsModel, studies: list[Study]
) -> None:
    record, gaps = read_record(written), []
    for index, study in enumerate(studies):
        logits = logits_of(changed_model, record, index, study)
        full = compare_logits(logits_of(tiny_model, record, index, study), logits, record.token_ids(index))
        bound, limit = record.compare(index, logits), record.gap_limit(index, logits)
        gap = full.kl - bound.kl
        assert full.kl.mean() > 1e-4
        assert (gap > -1e-8).all()
        assert (gap < limit + 1e-8).all()
        assert gap.mean() < 0.5 * full.kl.mean()
        np.testing.assert_array_equal(bound.same_top, full.same_top)
        np.testing.assert_allclose(bound.reference_nll, full.reference_nll, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(bound.candidate_nll, full.candidate_nll)
        gaps.append(gap)
    assert np.concatenate(gaps).mean() > 0


def test_the_logits_of_one_study_are_in_memory_at_a_time(tiny_model: FindingsModel, studies: list[Study]) -> None:
    given: list[weakref.ref[np.ndarray]] = []
    done: list[int] = []

    def score(*arguments: Any) -> np.ndarray:
        assert [logits() for logits in given] == [None] * len(given)
        logits = tiny_model.score(*arguments).copy()
        given.append(weakref.ref(logits))
        return logits

    record = take(like(tiny_model, score=score), studies, on_progress=done.append)
    assert len(given) == len(studies)
    assert done == [1, 2, 3]
    assert record.top.log_probs.base is None


def test_a_model_that_contradicts_its_own_text_is_not_recorded(tiny_model: FindingsModel, studies: list[Study]) -> None:
    model = like(tiny_model, score=lambda *arguments: -tiny_model.score(*arguments))
    with pytest.raises(LiteError, match=r"study s0: got token \d+ at 0 of a greedy text.*among the 64 most probable"):
        take(model, studies)


def test_a_film_that_cannot_be_read_is_an_error_and_not_a_smaller_record(
    tiny_model: FindingsModel, studies: list[Study], tmp_path: Path
) -> None:
    bad = tmp_path / "noise.png"
    bad.write_bytes(b"noise")
    with pytest.raises(ImageError, match=r"noise\.png"):
        take(tiny_model, [studies[0], dataclasses.replace(studies[1], image=bad)])
    with pytest.raises(LiteError, match="got no studies"):
        take(tiny_model, [])


def test_artifacts_of_other_settings_are_refused_by_name(
    record: ReferenceRecord, tiny_artifact: Artifact, changed_model: FindingsModel, tokenizer_model: bytes,
    tmp_path: Path, studies: list[Study],
) -> None:  # fmt: skip
    check_studies(record, studies)
    check_record(record, tiny_artifact, studies)
    check_record(record, changed_model.artifact, studies)
    for number, (changes, message) in enumerate(
        (
            ({"prompt": PromptTemplate(question_without_reason="What is seen?")},
             r"got prompt.question_without_reason 'What is seen\?' · expected 'Provide a desc"),
            ({"preprocessing": Preprocessing(image_size=28, mean=(0.5, 0.5, 0.5))}, r"got preprocessing.mean \(0.5"),
            ({"decoding": DecodingDefaults(max_new_tokens=7)}, "got decoding.max_new_tokens 7 · expected 24"),
            ({"llama_changes": {"vocab_size": 448}}, "got vocab_size 448 · expected 420"),
        )
    ):  # fmt: skip
        other = write_tiny_artifact(tmp_path / str(number), tokenizer_model, **changes)
        with pytest.raises(ArtifactError, match=message) as caught:
            check_record(record, other, studies)
        assert f"as in the reference record fp16 tiny, artifact {tiny_artifact.id}, 3 studies" in str(caught.value)
        assert str(other.path) in str(caught.value)
    settings = dataclasses.replace(settings_of(tiny_artifact), tokenizer_sha256="0" * 64)
    with pytest.raises(
        ArtifactError, match=r"got tokenizer sha256 '[0-9a-f]{64}' · expected '0{64}', as in .* elsewhere"
    ):
        check_belongs(tiny_artifact, settings, reference="elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda studies: [dataclasses.replace(studies[0], reason="Fall."), *studies[1:]], "got studies of sha256"),
        (lambda studies: studies[::-1], r"expected .*, the first 3 of list\.json .* make a record for this one"),
        (lambda studies: studies[:2], "got 2 studies · expected the first 3, .* give --limit 3"),
        (lambda studies: [*studies, dataclasses.replace(studies[0], id="s4")], "got 4 studies .* give --limit 3"),
        (
            lambda studies: [dataclasses.replace(studies[0], image=Path("gone.png")), *studies[1:]],
            r"got 1 of 3 studies without their film, the first gone\.png",
        ),
    ],
)
def test_other_studies_are_refused(
    record: ReferenceRecord, tiny_model: FindingsModel, studies: list[Study], change: Any, message: str
) -> None:
    for refuse in (
        lambda replayed: check_studies(record, replayed),
        lambda replayed: check_record(record, tiny_model.artifact, replayed),
    ):
        with pytest.raises(LiteError, match=message):
            refuse(change(studies))


def test_a_record_knows_its_studies_at_the_start_of_a_longer_list(
    record: ReferenceRecord, studies: list[Study]
) -> None:
    more = [*studies, dataclasses.replace(studies[0], id="s4")]
    assert studies_of(record, more) == studies
    for other in (studies[:2], more[1:]):
        assert studies_of(record, other) == other


def test_a_record_says_what_it_is(record: ReferenceRecord, tiny_onnx_artifact: Artifact, studies: list[Study]) -> None:
    info = record.info
    assert record.describe() == (
        f"fp16 tiny, artifact {info.artifact_id}, 3 studies, made {info.date[:10]} on a test by {info.created_by}, "
        "torch engine"
    )
    mass = record.top.tail_mass
    assert record.describe_tail().startswith(f"top 64 of 420 tokens; all others have {mass.mean():.2g} ")
    assert record.describe_tail().endswith(f"over {len(mass)} tokens, {mass.max():.2g} at most")
    by_onnx = take(load(tiny_onnx_artifact.path, engine="onnx"), studies[:1])
    assert by_onnx.describe().endswith(", onnx engine")
    # Settings are the artifact's: whichever engine, a record is of the same tokens, words and pixels.
    check_record(by_onnx, tiny_onnx_artifact, studies[:1])
