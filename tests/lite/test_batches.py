"""Many films through one model: each has the text that it has alone, in order, whatever becomes of the others."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import film

from lite.artifact.open import Artifact
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.errors import Cancelled, ContextLengthError, ImageError, LiteError, MemoryBudgetError, PromptError
from lite.image.files import load_image
from lite.image.preprocess import preprocess
from lite.loading import load
from lite.model import FindingsModel
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


@pytest.mark.parametrize("batch_size", [1, 3, 16])
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
    question = "What is seen?\n"
    made = texts(tiny_model.findings_batch([*studies, Study(films[0], query=question)], batch_size=4))
    assert made[0] == made[1] == tiny_model.findings(films[0], "cough").text
    assert set(made[2:6]) == {tiny_model.findings(films[0]).text}
    assert made[6] == tiny_model.findings(films[0], query=question).text != made[2]


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


class Tower:
    """A vision tower that notes which thread runs it."""

    def __init__(self, vision: VisionEncoder) -> None:
        self.vision = vision
        self.provider = vision.provider
        self.threads: list[str] = []

    def writes_to(self, device: object) -> bool:
        return self.vision.writes_to(device)

    def __call__(self, pixel_values: np.ndarray, out: Any, **about: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        return self.vision(pixel_values, out, **about)


class BlindFor(Tower):
    """Its features of one film are not numbers."""

    def __init__(self, vision: VisionEncoder, pixel_values: np.ndarray) -> None:
        super().__init__(vision)
        self.pixel_values = pixel_values

    def __call__(self, pixel_values: np.ndarray, out: Any, **about: Any) -> Any:
        features = super().__call__(pixel_values, out, **about)
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
    blind.threads.clear()
    results = list(tiny_model.findings_batch([films[0], "nowhere.png", *films[1:]], batch_size=4))
    assert len(blind.threads) == 5, "nothing is done again for the bad study"
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


@pytest.fixture(scope="module")
def ending_model(tiny_artifact: Artifact, films: list[Path]) -> FindingsModel:
    return an_ending_model(tiny_artifact, films)


def test_the_eos_token_ends_the_text(ending_model: FindingsModel, films: list[Path]) -> None:
    findings = ending_model.findings(films[0])
    assert findings.finish_reason == "eos"
    assert findings.num_new_tokens < 5
    assert 2 not in findings.token_ids


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


class FullOnce(Tower):
    """The third time there is no memory for it."""

    def __call__(self, pixel_values: np.ndarray, out: Any, **about: Any) -> Any:
        features = super().__call__(pixel_values, out, **about)
        if len(self.threads) == 3:
            raise MemoryBudgetError("got no memory")
        return features


def an_ending_model(artifact: Artifact, films: list[Path], **named: Any) -> FindingsModel:
    """Another model: one whose EOS comes early, for some films earlier than for others."""
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
    studies: list[Any] = [*all_pairs(films)[:15], "nowhere.png", films[0]]
    expected = list(ending_model.findings_batch(studies, batch_size=batch_size))
    streamed = "".join(ending_model.stream(films[1], "cough"))
    monkeypatch.setattr(LlamaDecoder, "run_ahead", run_ahead)
    noted: Any = (FullOnce if full else Tower)(ending_model.vision)
    model = dataclasses.replace(ending_model, vision=noted)  # whose rows hold no film
    results = list(model.findings_batch(studies, batch_size=batch_size))
    # Another thread's than that which decodes: no text waits for a tower.
    assert set(noted.threads) == {"lite-eyes"}
    assert model.session.loop.num_rows == (4 if full else 8)
    for got, one in zip(results, expected, strict=True):
        if isinstance(one, StudyError):
            assert isinstance(got, StudyError)
            assert (got.index, str(got.error)) == (one.index, str(one.error)) == (15, str(one.error))
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


def test_a_draft_that_nobody_holds_is_cancelled(ending_model: FindingsModel, films: list[Path]) -> None:
    draft = ending_model.submit(films[0], "cough")
    outcome = draft._outcome
    del draft
    assert outcome.wait(20)
    assert isinstance(outcome.error, Cancelled)


def test_what_has_ended_keeps_no_film(ending_model: FindingsModel, films: list[Path]) -> None:
    """Each is 3 MB at 518 pixels: they have to go without waiting for the garbage to be collected."""

    def on_their_way() -> list[Progress[Any]]:
        return [thing for thing in gc.get_objects() if type(thing) is Progress]

    gc.collect()
    gc.disable()
    try:
        others = {id(one): one for one in on_their_way()}  # of models that other tests have made
        list(ending_model.findings_batch(all_pairs(films), batch_size=2))
        until = time.monotonic() + 5  # the other threads leave what they were in when the last one ended
        while (left := sum(id(one) not in others for one in on_their_way())) > 1 and time.monotonic() < until:
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
    while ending_model.session.loop.is_busy or ending_model.session.waiting:
        assert time.monotonic() < until
        time.sleep(0.001)
