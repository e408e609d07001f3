"""The façade: one way in, one result out, whatever the batch, and no torch before it is needed."""

from __future__ import annotations

import ast
import dataclasses
import gc
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from repository import ROOT
from tiny import film, relist, write_tiny_artifact

import lite
from lite.artifact.open import Artifact, load_artifact
from lite.engines.cores import available_cores
from lite.engines.protocol import Sampling
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.errors import (
    ArtifactError,
    BackendUnavailable,
    Cancelled,
    ContextLengthError,
    DeadlineExceeded,
    ImageError,
    LiteError,
    MemoryBudgetError,
    PromptError,
)
from lite.image.files import load_image
from lite.image.preprocess import preprocess
from lite.loading import load
from lite.model import FindingsModel
from lite.session.draft import as_completed
from lite.session.request import Progress
from lite.studies.results import Findings, StudyError
from lite.studies.study import Study
from lite.vision import VisionEncoder

REASONS = [None, "cough", "Fever and shortness of breath for three days, rule out pneumonia.", "", "chest pain"]


def texts(results: Iterator[Findings | StudyError]) -> list[str]:
    found = []
    for result in results:
        assert isinstance(result, Findings), result
        found.append(result.text)
    return found


def test_findings_are_complete(tiny_model: FindingsModel, tiny_artifact: Artifact, films: list[Path]) -> None:
    findings = tiny_model.findings(films[0], "cough", reuse=False)
    assert findings.text == tiny_model.tokenizer.decode(findings.token_ids)
    assert findings.text
    assert findings.finish_reason in {"eos", "length"}
    assert findings.num_new_tokens == len(findings.token_ids) <= tiny_artifact.manifest.decoding.max_new_tokens
    assert findings.num_prompt_tokens == tiny_model.prompt.num_tokens(tiny_model.prompt.encode("cough"))
    assert findings.artifact_id == tiny_artifact.id
    assert (findings.device, findings.dtype, findings.provider) == ("cpu", "float32", "CPUExecutionProvider")
    assert (findings.cache_dtype, findings.backend, findings.fallbacks) == ("float32", "torch", ())
    assert findings.rendering == "as-is"
    assert findings.notice == "For tests. Not for clinical use."
    assert findings.memory.peak_rss_bytes is not None
    assert findings.memory.peak_rss_bytes > 10_000_000
    assert findings.memory.peak_vram_bytes is None
    memory = findings.memory
    peaks = [peaks.rss_bytes or 0 for peaks in (memory.image, memory.vision, memory.prefill, memory.decode)]
    assert peaks == sorted(peaks)
    assert peaks[0] > 10_000_000
    slots = tiny_model.session.loop.max_seq_len
    assert slots >= findings.num_prompt_tokens + 24
    assert findings.memory.cache_bytes == 2 * 2 * 1 * 2 * slots * 16 * 4, "one row of the session's"
    timings = findings.timings
    assert min(timings.image_s, timings.vision_s, timings.prefill_s, timings.decode_s) > 0
    assert timings.ttft_s == timings.image_s + timings.vision_s + timings.prefill_s
    assert timings.total_s == timings.ttft_s + timings.decode_s
    # EOS takes a step and is not among the tokens; the first token is prefill's.
    assert len(timings.decode_steps_s) == findings.num_new_tokens - (findings.finish_reason == "length")
    assert timings.batch_size == 1
    json.dumps(dataclasses.asdict(findings))


def test_image_and_reason_matter(tiny_model: FindingsModel, films: list[Path]) -> None:
    """Otherwise every equality below would prove nothing."""
    made = {tiny_model.findings(image, reason).text for image in films[:3] for reason in REASONS[:3]}
    assert len(made) == 9


def test_stream_is_findings(tiny_model: FindingsModel, films: list[Path]) -> None:
    stream = tiny_model.stream(films[0], "cough")
    pieces = list(stream)
    assert len(pieces) > 3
    assert all(pieces)
    expected = tiny_model.findings(films[0], "cough")
    assert stream.findings is not None
    assert "".join(pieces) == stream.findings.text == expected.text
    assert stream.findings.token_ids == expected.token_ids
    assert list(stream) == []
    assert stream.result() is stream.findings


def test_stream_checks_before_the_first_piece(tiny_model: FindingsModel, films: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        tiny_model.stream(tmp_path / "nothing.png")
    with pytest.raises(ContextLengthError):
        tiny_model.stream(films[0], "long " * 1000)


def test_an_abandoned_stream_has_no_findings(tiny_model: FindingsModel, films: list[Path]) -> None:
    stream = tiny_model.stream(films[0])
    next(stream)
    assert stream.findings is None


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 16])
def test_a_batch_says_what_each_says_alone(tiny_model: FindingsModel, films: list[Path], batch_size: int) -> None:
    alone = [tiny_model.findings(image, reason) for image, reason in zip(films, REASONS, strict=True)]
    assert len({findings.num_prompt_tokens for findings in alone}) > 2, "prompts of one length would prove nothing"
    studies = [Study(image, reason) for image, reason in zip(films, REASONS, strict=True)]
    together = list(tiny_model.findings_batch(studies, batch_size=batch_size))
    for one, other in zip(alone, together, strict=True):
        assert isinstance(other, Findings)
        assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
        assert other.timings.batch_size <= batch_size


def test_a_batch_takes_studies_tuples_and_images(tiny_model: FindingsModel, films: list[Path]) -> None:
    studies: list[Any] = [Study(films[0], "cough"), (films[0], "cough"), films[0], (films[0],), film(0), str(films[0])]
    made = texts(tiny_model.findings_batch(studies, batch_size=4))
    assert made[0] == made[1] == tiny_model.findings(films[0], "cough").text
    assert len(set(made[2:])) == 1


def test_query_in_a_batch(tiny_model: FindingsModel, films: list[Path]) -> None:
    question = "What is seen?\n"
    (got,) = tiny_model.findings_batch([Study(films[0], query=question)])
    assert isinstance(got, Findings)
    assert got.text == tiny_model.findings(films[0], query=question).text != tiny_model.findings(films[0]).text


def test_one_bad_study_does_not_lose_the_others(tiny_model: FindingsModel, films: list[Path], tmp_path: Path) -> None:
    not_an_image = tmp_path / "notes.png"
    not_an_image.write_text("not a picture")
    studies = [
        Study(films[0]),
        Study(not_an_image),
        Study(films[1], "cough <image>"),
        Study(films[2], "long " * 1000),
        Study(films[3]),
    ]
    results = list(tiny_model.findings_batch(studies, batch_size=2))
    assert [type(result) for result in results] == [Findings, StudyError, StudyError, StudyError, Findings]
    errors = [result for result in results if isinstance(result, StudyError)]
    assert [error.index for error in errors] == [1, 2, 3]
    assert [type(error.error) for error in errors] == [ImageError, PromptError, ContextLengthError]
    assert "notes.png" in str(errors[0].error)
    good = [result.text for result in results if isinstance(result, Findings)]
    assert good == [tiny_model.findings(films[0]).text, tiny_model.findings(films[3]).text]


def test_a_batch_goes_on_without_pydicom(
    tiny_model: FindingsModel, films: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    dicom = tmp_path / "film.dcm"
    dicom.write_bytes(b"\0" * 128 + b"DICM")
    results = list(tiny_model.findings_batch([films[0], dicom, films[1]], batch_size=3))
    assert [type(result) for result in results] == [Findings, StudyError, Findings]
    error = results[1]
    assert isinstance(error, StudyError)
    assert (error.index, type(error.error)) == (1, BackendUnavailable)
    assert "film.dcm: got a DICOM file and no pydicom" in str(error.error)
    with pytest.raises(BackendUnavailable):
        tiny_model.findings(dicom)


class BlindFor:
    """A vision tower whose features of one film are not numbers."""

    def __init__(self, vision: VisionEncoder, pixel_values: np.ndarray) -> None:
        self.vision = vision
        self.provider = vision.provider
        self.pixel_values = pixel_values
        self.calls = 0

    def writes_to(self, device: object) -> bool:
        return self.vision.writes_to(device)

    def __call__(self, pixel_values: np.ndarray, out: Any) -> Any:
        self.calls += 1
        features = self.vision(pixel_values, out)
        if np.array_equal(pixel_values[0], self.pixel_values):
            features[0] = float("nan")
        return features


def test_a_study_that_overflows_does_not_lose_the_others(tiny_artifact: Artifact, films: list[Path]) -> None:
    with load(tiny_artifact.path, device="cpu") as other:
        expected = [other.findings(image).text for image in films]
    pixel_values = preprocess(load_image(films[1]).image, tiny_artifact.manifest.preprocessing)
    sighted = load(tiny_artifact.path, device="cpu")
    blind: Any = BlindFor(sighted.vision, pixel_values)
    tiny_model = dataclasses.replace(sighted, vision=blind)  # whose rows hold none of the films
    with pytest.raises(LiteError, match="not finite"):
        tiny_model.findings(films[1])
    blind.calls = 0
    results = list(tiny_model.findings_batch([films[0], "nowhere.png", *films[1:]], batch_size=4))
    assert blind.calls == 5, "nothing is done again for the bad study"
    errors = [result for result in results if isinstance(result, StudyError)]
    assert [(error.index, type(error.error)) for error in errors] == [(1, ImageError), (2, LiteError)]
    assert "not finite" in str(errors[1].error)
    assert [result.text for result in results if isinstance(result, Findings)] == [expected[0], *expected[2:]]


def test_a_study_of_another_form_is_its_own_error(tiny_model: FindingsModel, films: list[Path]) -> None:
    studies: list[Any] = [(), films[0], (films[0], None, None, "more"), None, (films[1], 3)]
    results = list(tiny_model.findings_batch(studies, batch_size=5, max_new_tokens=2))
    assert [type(result) for result in results] == [StudyError, Findings, StudyError, StudyError, StudyError]
    messages = [str(result.error) for result in results if isinstance(result, StudyError)]
    assert messages[0].startswith("got a study of 0 values")
    assert messages[1].startswith("got a study of 4 values · expected (image,), (image, reason)")


def test_one_study_is_not_several(tiny_model: FindingsModel, films: list[Path]) -> None:
    picture = film(0)
    alone: list[Any] = [str(films[0]), films[0], films[0].read_bytes(), picture, np.asarray(picture), Study(films[0])]
    for study in alone:
        with pytest.raises(LiteError, match=rf"a {type(study).__name__}\) .* wrap it in a list"):
            tiny_model.findings_batch(study)


def test_a_batch_reads_no_further_than_it_must(tiny_model: FindingsModel, films: list[Path]) -> None:
    taken = 0

    def endless() -> Iterator[Study]:
        nonlocal taken
        for image in itertools.cycle(films):
            taken += 1
            yield Study(image)

    results = tiny_model.findings_batch(endless(), batch_size=2, max_new_tokens=2)
    assert taken == 0
    list(itertools.islice(results, 3))
    # Two that are under way, one that is read and seen meanwhile.
    assert 3 <= taken <= 3 + 2 + 1


def test_no_studies_no_findings(tiny_model: FindingsModel) -> None:
    assert list(tiny_model.findings_batch([])) == []


def test_bad_numbers_are_refused(tiny_model: FindingsModel, films: list[Path]) -> None:
    wrong: list[Any] = [0, -1, "5", 2.5, True]
    for value in wrong:
        for call in (tiny_model.findings, tiny_model.stream):
            with pytest.raises(LiteError, match=f"max_new_tokens={value!r} · expected a whole number"):
                call(films[0], max_new_tokens=value)
        with pytest.raises(LiteError, match=f"max_new_tokens={value!r} · expected a whole number"):
            tiny_model.findings_batch([], max_new_tokens=value)
        with pytest.raises(LiteError, match=f"batch_size={value!r} · expected a whole number"):
            tiny_model.findings_batch([], batch_size=value)


def test_max_new_tokens_cuts_the_same_text(tiny_model: FindingsModel, films: list[Path]) -> None:
    long = tiny_model.findings(films[0])
    short = tiny_model.findings(films[0], max_new_tokens=3)
    assert short.token_ids == long.token_ids[:3]
    assert short.finish_reason == "length"


def test_a_long_reason_fails_before_the_image_is_read(tiny_model: FindingsModel, tmp_path: Path) -> None:
    with pytest.raises(ContextLengthError, match="640"):
        tiny_model.findings(tmp_path / "nowhere.png", "long " * 1000)


def test_score_agrees_with_greedy_decoding(tiny_model: FindingsModel, films: list[Path]) -> None:
    findings = tiny_model.findings(films[0], "cough")
    logits = tiny_model.score(films[0], findings.token_ids, "cough")
    assert logits.shape == (len(findings.token_ids), tiny_model.decoder.config.vocab_size)
    assert logits.dtype == np.float32
    assert tuple(logits.argmax(-1)) == findings.token_ids


def test_score_checks_its_tokens(tiny_model: FindingsModel, films: list[Path]) -> None:
    for wrong in ([], [-200], [5, 10**6]):
        with pytest.raises(PromptError, match="token_ids"):
            tiny_model.score(films[0], wrong)
    with pytest.raises(ContextLengthError, match="shorten the answer"):
        tiny_model.score(films[0], [5] * 700)


def test_threads_share_a_model(tiny_model: FindingsModel, films: list[Path]) -> None:
    expected = [tiny_model.findings(image).text for image in films]
    got: list[str | None] = [None] * len(films)

    def run(index: int) -> None:
        got[index] = tiny_model.findings(films[index]).text

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(films))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_any_form_of_one_picture(tiny_model: FindingsModel, films: list[Path]) -> None:
    with Image.open(films[0]) as opened:
        picture = opened.convert("RGB")
    forms: list[Any] = [films[0], str(films[0]), films[0].read_bytes(), picture, np.asarray(picture)]
    assert len({tiny_model.findings(form).text for form in forms}) == 1


@pytest.fixture(scope="module")
def ending_model(tiny_artifact: Artifact, films: list[Path]) -> FindingsModel:
    """Another model: one whose EOS comes early, for some films earlier than for others."""
    model = load(tiny_artifact.path, device="cpu")
    token_id = model.findings(films[0]).token_ids[4]
    (head,) = model.decoder.lm_head.weights
    head[[2, token_id]] = head[[token_id, 2]]
    return model


def test_the_eos_token_ends_the_text(ending_model: FindingsModel, films: list[Path]) -> None:
    model = ending_model
    findings = model.findings(films[0])
    assert findings.finish_reason == "eos"
    assert findings.num_new_tokens < 5
    assert 2 not in findings.token_ids
    together = list(model.findings_batch([Study(image) for image in films], batch_size=5))
    alone = [model.findings(image) for image in films]
    assert [getattr(one, "token_ids", None) for one in together] == [one.token_ids for one in alone]


def all_pairs(films: list[Path]) -> list[Study]:
    return [Study(image, reason) for reason in REASONS for image in films]


@pytest.mark.parametrize("batch_size", [2, 4])
def test_results_come_in_order_although_later_studies_end_first(
    ending_model: FindingsModel, films: list[Path], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(study, ending_model.findings(study.image, study.reason)) for study in all_pairs(films)]
    by_length = sorted(found, key=lambda pair: pair[1].num_new_tokens)
    # A long one, a short one, and so on.
    pairs = [pair for two in zip(reversed(by_length), by_length, strict=True) for pair in two][: len(found)]
    studies, alone = [study for study, _ in pairs], [one for _, one in pairs]
    ended: list[str] = []
    end = Progress.end
    monkeypatch.setattr(Progress, "end", lambda self, reason: ended.append(self.id) or end(self, reason))
    together = list(ending_model.findings_batch(studies, batch_size=batch_size))
    assert ended != sorted(ended, key=int), "all that end in order would prove nothing"
    assert len(set(ended)) == len(ended) == len(studies)
    for one, other in zip(alone, together, strict=True):
        assert isinstance(other, Findings)
        assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
        assert other.num_prompt_tokens == one.num_prompt_tokens
        assert 1 <= other.timings.batch_size <= batch_size
        assert len(other.timings.decode_steps_s) == len(one.timings.decode_steps_s)
        assert min(other.timings.image_s, other.timings.prefill_s) > 0
    assert max(result.timings.batch_size for result in together if isinstance(result, Findings)) == batch_size


def test_a_result_does_not_wait_for_the_whole_batch(ending_model: FindingsModel, films: list[Path]) -> None:
    """Nor are films read that are not needed yet."""
    read = 0

    def studies() -> Iterator[Study]:
        nonlocal read
        for study in all_pairs(films):
            read += 1
            yield study

    results = ending_model.findings_batch(studies(), batch_size=2)
    first = next(results)
    assert isinstance(first, Findings)
    assert read < 25
    assert len(list(results)) == 24
    assert read == 25


class NotedThreads:
    """The tower, and which thread runs it on which film; the third time there is no memory for it."""

    def __init__(self, vision: VisionEncoder, *, full: bool = False) -> None:
        self.vision, self.full = vision, full
        self.provider = vision.provider
        self.threads: list[str] = []

    def writes_to(self, device: object) -> bool:
        return self.vision.writes_to(device)

    def __call__(self, pixel_values: np.ndarray, out: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        if self.full and len(self.threads) == 3:
            raise MemoryBudgetError("got no memory")
        return self.vision(pixel_values, out)


def an_ending_model(artifact: Artifact, films: list[Path], **named: Any) -> FindingsModel:
    """Return one like `ending_model` whose rows hold no film."""
    model = load(artifact.path, device="cpu", **named)
    token_id = model.findings(films[0], max_new_tokens=5).token_ids[4]
    (head,) = model.decoder.lm_head.weights
    head[[2, token_id]] = head[[token_id, 2]]
    return model


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("run_ahead", [0, 1])
def test_running_ahead_and_making_room_change_no_text(
    ending_model: FindingsModel, tiny_artifact: Artifact, films: list[Path], batch_size: int, run_ahead: int,
    monkeypatch: pytest.MonkeyPatch, full: bool,
) -> None:  # fmt: skip
    """As with a GPU: tokens are looked at a step late, and it may be full when a film is looked at."""
    studies: list[Any] = [*all_pairs(films), "nowhere.png", films[0]]
    expected = list(ending_model.findings_batch(studies, batch_size=batch_size))
    streamed = "".join(ending_model.stream(films[1], "cough"))
    monkeypatch.setattr(LlamaDecoder, "run_ahead", run_ahead)
    noted: Any = NotedThreads(ending_model.vision, full=full)
    model = dataclasses.replace(ending_model, vision=noted)  # whose rows hold no film
    results = list(model.findings_batch(studies, batch_size=batch_size))
    # Another thread's than that which decodes: no text waits for a tower.
    assert set(noted.threads) == {"lite-eyes"}
    assert model.session.loop.num_rows == (4 if full else 8)
    for got, one in zip(results, expected, strict=True):
        if isinstance(one, StudyError):
            assert isinstance(got, StudyError)
            assert (got.index, str(got.error)) == (one.index, str(one.error)) == (25, str(one.error))
        else:
            assert isinstance(got, Findings)
            assert (got.text, got.token_ids, got.finish_reason) == (one.text, one.token_ids, one.finish_reason)
    assert "".join(model.stream(films[1], "cough")) == streamed
    model.close()


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_has_no_more_rows_than_the_session(
    ending_model: FindingsModel, tiny_artifact: Artifact, films: list[Path], rows: int
) -> None:
    studies = all_pairs(films)[:6]
    expected = texts(ending_model.findings_batch(studies, batch_size=4))
    with an_ending_model(tiny_artifact, films, rows=rows) as model:
        results = list(model.findings_batch(studies, batch_size=4))
    assert texts(results) == expected
    assert max(result.timings.batch_size for result in results if isinstance(result, Findings)) == rows


@pytest.mark.parametrize("engine", ["torch", "onnx"])
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_another_question_about_a_film_is_answered_as_if_it_were_the_first(
    tiny_onnx_artifact: Artifact, films: list[Path], engine: str, cache_dtype: Any
) -> None:
    """What a row still holds of the film is not read again, and the text is that of a fresh row, to the last bit."""
    options: dict[str, Any] = {"device": "cpu", "engine": engine, "cache_dtype": cache_dtype}
    fresh = []
    for reason in REASONS:
        with load(tiny_onnx_artifact.path, rows=1, **options) as model:
            fresh.append(model.findings(films[0], reason, top_logprobs=3))
    with load(tiny_onnx_artifact.path, rows=2, **options) as model:
        warm = [model.findings(films[0], reason, top_logprobs=3) for reason in REASONS]
        other = model.findings(films[1], "cough")
        again = model.findings(films[0], REASONS[0], top_logprobs=3)
        together = [model.submit(films[2], reason) for reason in REASONS]
        at_once = [draft.result() for draft in together]
    prefix = fresh[0].num_prompt_tokens - len(model.prompt.encode(REASONS[0])) + 1
    assert [one.num_reused_tokens for one in fresh] == [0] * len(REASONS)
    assert {one.num_reused_tokens for one in warm[1:]} == {again.num_reused_tokens} != {0}
    assert all(prefix < one.num_reused_tokens < one.num_prompt_tokens for one in warm[1:])
    assert (warm[0].num_reused_tokens, other.num_reused_tokens) == (0, 0)
    for one, two in zip([*fresh, fresh[0]], [*warm, again], strict=True):
        assert one.token_ids == two.token_ids
        assert (one.token_logprobs, one.top_logprobs) == (two.token_logprobs, two.top_logprobs)
        assert two.num_reused_tokens == 0 or two.timings.vision_s == 0
    assert sum(one.num_reused_tokens == 0 for one in at_once) == 1


def test_without_reuse_a_film_is_read_anew(tiny_model: FindingsModel, films: list[Path]) -> None:
    for _ in range(2):
        anew = tiny_model.findings(films[0], "cough", reuse=False)
        assert (anew.num_reused_tokens, anew.timings.vision_s > 0) == (0, True)
    tiny_model.findings(films[0], "cough")
    assert tiny_model.findings(films[0], "cough").num_reused_tokens > 0


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_draws_are_those_of_their_seed(tiny_onnx_artifact: Artifact, films: list[Path], engine: str) -> None:
    with load(tiny_onnx_artifact.path, device="cpu", engine=engine) as model:
        how = [Sampling(temperature=1.0, top_p=0.9, seed=seed) for seed in (1, 1, 2, -5)]
        alone = [model.findings(films[0], sampling=one).token_ids for one in how]
        drafts = [model.submit(films[0], sampling=one) for one in how]
        together = [draft.result().token_ids for draft in drafts]
        greedy = model.findings(films[0]).token_ids
        assert model.findings(films[0], sampling=Sampling(temperature=1e-6, seed=3)).token_ids == greedy
    assert alone == together
    assert len({*alone, greedy}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": Sampling(temperature=-1)}, "got temperature=-1"),
        ({"sampling": Sampling(temperature=float("nan"))}, "got temperature=nan"),
        ({"sampling": Sampling(top_p=0)}, "got top_p=0"),
        ({"sampling": Sampling(seed=1 << 63)}, "got seed="),
        ({"top_logprobs": 21}, "got top_logprobs=21 · expected 0 to 20"),
        ({"timeout_s": 0}, "got timeout_s=0"),
    ],
)
def test_numbers_out_of_their_range_are_refused(
    tiny_model: FindingsModel, films: list[Path], options: Any, message: str
) -> None:
    with pytest.raises(LiteError, match=message):
        tiny_model.submit(films[0], **options)


def test_a_draft_that_nobody_holds_is_cancelled(ending_model: FindingsModel, films: list[Path]) -> None:
    draft = ending_model.submit(films[0], "cough")
    outcome = draft._outcome
    del draft
    assert outcome.wait(20)
    assert isinstance(outcome.error, Cancelled)


def test_drafts_come_as_they_end_and_have_deadlines(tiny_model: FindingsModel, films: list[Path]) -> None:
    drafts = [tiny_model.submit(image, request_id=f"film {i}", max_new_tokens=3 + i) for i, image in enumerate(films)]
    assert {draft.id for draft in as_completed(drafts)} == {f"film {i}" for i in range(5)}
    assert all(draft.done() and draft.findings is draft.result() for draft in drafts)
    with pytest.raises(DeadlineExceeded, match="got no end before its deadline"):
        tiny_model.findings(films[0], timeout_s=1e-9)


def test_what_has_ended_keeps_no_film(ending_model: FindingsModel, films: list[Path]) -> None:
    """Each is 3 MB at 518 pixels: they have to go without waiting for the garbage to be collected."""
    gc.collect()
    gc.disable()
    try:
        list(ending_model.findings_batch(all_pairs(films), batch_size=2))
        until = time.monotonic() + 5  # the other threads leave what they were in when the last one ended
        while (left := sum(type(thing) is Progress for thing in gc.get_objects())) > 1 and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        gc.enable()
    assert left <= 1, "what measures coverage may hold a thread's last frame"


def test_who_stops_listening_stops_the_work(ending_model: FindingsModel, films: list[Path]) -> None:
    results = ending_model.findings_batch(all_pairs(films), batch_size=2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    gc.collect()
    until = time.monotonic() + 20
    while ending_model.session.loop.is_busy or ending_model.session.num_waiting:
        assert time.monotonic() < until
        time.sleep(0.001)


def test_the_demo_model_reads_in_batches_what_it_reads_alone(demo_model: FindingsModel, tmp_path: Path) -> None:
    from benchmarks.phantom.write import write_studies

    listed = json.loads(write_studies(tmp_path, count=6, seed=4242, dicom=False).read_text())
    studies = [Study(tmp_path / entry["image"], entry["reason"]) for entry in listed]
    alone = [demo_model.findings(study.image, study.reason) for study in studies]
    assert len({findings.text for findings in alone}) > 1
    assert all(findings.finish_reason == "eos" for findings in alone)
    assert texts(demo_model.findings_batch(studies, batch_size=6)) == [findings.text for findings in alone]
    logits = demo_model.score(studies[0].image, alone[0].token_ids, studies[0].reason)
    assert tuple(logits.argmax(-1)) == alone[0].token_ids


# ---- loading


def test_load_hashes_unless_told_not_to(own_artifact: Path) -> None:
    file = own_artifact / "decoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: got sha256"):
        load(own_artifact, device="cpu")
    load(own_artifact, device="cpu", verify=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {"hidden_size": 32}}, "width 32"),
        ({"vision": {"image_size": 42}}, "28 pixels .* image_size 42"),
        ({"vision": {"num_image_tokens": 640}}, "640 image tok"),
    ],
)
def test_parts_that_do_not_fit_fail_at_load(own_artifact: Path, changes: dict[str, Any], message: str) -> None:
    relist(own_artifact, "vision.onnx", **changes)
    with pytest.raises(ArtifactError, match=f"got .*{message}"):
        load(own_artifact, device="cpu")


def test_a_small_vocabulary_fails_at_load(tmp_path: Path, tokenizer_model: bytes) -> None:
    artifact = write_tiny_artifact(tmp_path / "artifact", tokenizer_model, llama_changes={"vocab_size": 300})
    with pytest.raises(ArtifactError, match="420 pieces .* vocab_size 300"):
        load(artifact.path, device="cpu")


def test_a_vision_graph_of_another_shape_fails_at_load(own_artifact: Path) -> None:
    file = own_artifact / "vision.onnx"
    graph = onnx.load(file)
    graph.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 42
    graph.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 42
    onnx.save(graph, file)
    relist(own_artifact, "vision.onnx")
    with pytest.raises(ArtifactError, match=r"vision\.onnx: got"):
        VisionEncoder(load_artifact(own_artifact))


def test_what_is_no_graph_fails_at_load(own_artifact: Path) -> None:
    (own_artifact / "vision.onnx").write_bytes(b"\x00garbage")
    relist(own_artifact, "vision.onnx")
    with pytest.raises(ArtifactError, match="cannot load"):
        load(own_artifact, device="cpu")


def test_unknown_device_and_dtype(tiny_artifact: Artifact) -> None:
    with pytest.raises(BackendUnavailable, match="'abacus'"):
        load(tiny_artifact.path, device="abacus")
    with pytest.raises(LiteError, match="'int3'"):
        load(tiny_artifact.path, device="cpu", dtype="int3")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tiny_artifact: Artifact) -> None:
    assert load(tiny_artifact.path, device="auto").decoder.device.type == "cpu"
    with pytest.raises(BackendUnavailable, match="0 GPUs"):
        load(tiny_artifact.path, device="cuda")


@pytest.mark.parametrize(("module", "extra"), [("onnxruntime", "cpu"), ("torch", "torch"), ("safetensors", "torch")])
def test_a_missing_package_names_its_extra(tiny_artifact: Artifact, module: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "import lite\n"
        f"try: lite.load({str(tiny_artifact.path)!r})\n"
        "except lite.BackendUnavailable as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"llava-rad-lite[{extra}]" in done.stdout


def test_a_torch_that_does_not_load_says_why(tiny_artifact: Artifact, tmp_path: Path) -> None:
    """A broken installation raises an ImportError that names no module."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.99: cannot open shared object file')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import lite\n"
        f"try: lite.load({str(tiny_artifact.path)!r})\n"
        "except lite.BackendUnavailable as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "libcudart.so.99: cannot open" in done.stdout


def test_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr("lite.engines.cores._CGROUP_CPU_MAX", quota)
    assert available_cores() == 8
    for text, cores in (("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("garbage", 8)):
        quota.write_text(text)
        assert available_cores() == cores
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    quota.write_text("max 100000")
    assert available_cores() == 2
    quota.write_text("50000 100000")
    assert available_cores() == 1
    quota.write_text("max 100000")
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert available_cores() == 8


# ---- the public surface


def test_public_surface() -> None:
    assert sorted(lite.__all__) == [
        "ArtifactError",
        "BackendUnavailable",
        "Cancelled",
        "CheckpointError",
        "ContextLengthError",
        "DeadlineExceeded",
        "Draft",
        "Findings",
        "FindingsModel",
        "ImageError",
        "LiteError",
        "Memory",
        "MemoryBudgetError",
        "PromptError",
        "QueueFull",
        "Sampling",
        "Study",
        "StudyError",
        "Timings",
        "__version__",
        "as_completed",
        "load",
    ]
    assert dir(lite) == sorted(lite.__all__)
    for name in lite.__all__:
        assert getattr(lite, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'surprise'"):
        _ = lite.surprise


def test_the_base_install_is_what_the_runtime_imports() -> None:
    """Nothing more, and nothing less once an engine's extra is there."""
    listed = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert listed is not None
    base = {name.lower() for name in re.findall(r'"([A-Za-z0-9-]+)', listed[1])}
    extras = {"onnxruntime", "pydicom", "safetensors", "torch"}
    imported: set[str] = set()
    for file in (ROOT / "lite").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    imported -= {*sys.stdlib_module_names, "kernels", "lite"}
    assert imported - extras == {"PIL" if name == "pillow" else name for name in base}


def test_errors_are_one_tree() -> None:
    errors = [getattr(lite, name) for name in lite.__all__ if name.endswith(("Error", "Unavailable"))]
    errors.remove(StudyError)
    assert all(issubclass(error, LiteError) for error in errors)
    assert issubclass(ContextLengthError, PromptError)
