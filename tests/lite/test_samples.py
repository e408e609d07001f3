"""Drafts that are drawn beside another: they share its film, and end with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tiny import film

from lite.engines.protocol import Sampling
from lite.errors import LiteError, QueueFull
from lite.loading import load
from lite.model import FindingsModel
from lite.session.draft import Draft
from lite.session.request import Outcome


def counted(model: FindingsModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count what is read of prompts, and how often the tower runs."""
    counts, extend, see = [0, 0], model.decoder.extend, type(model.vision).__call__

    def extended(segment: Any, cache: Any) -> Any:
        counts[0] += len(segment.input_ids)
        return extend(segment, cache)

    def seen(*arguments: Any, **about: Any) -> Any:
        counts[1] += 1
        return see(*arguments, **about)

    monkeypatch.setattr(model.decoder, "extend", extended)
    monkeypatch.setattr(type(model.vision), "__call__", seen)
    return counts


@pytest.mark.parametrize(("rows", "reuse"), [(1, True), (1, False), (4, True), (4, False)])
def test_samples_share_the_film_of_the_draft(
    rows: int, monkeypatch: pytest.MonkeyPatch, tiny_model: FindingsModel, *, reuse: bool
) -> None:
    with load(tiny_model.artifact.path, device="cpu", rows=rows) as model:
        alone = model.findings(film(3), max_new_tokens=8, reuse=False)
        counts = counted(model, monkeypatch)
        found = model.findings(film(4), max_new_tokens=8, samples=3, reuse=reuse)
        prompt = found.num_prompt_tokens
        assert found.samples is not None
        shared = {sample.num_reused_tokens for sample in found.samples}
        assert len(shared) == 1
        assert (held := shared.pop()) > model.prompt.num_image_tokens
        assert counts == [prompt + 3 * (prompt - held), 1]
        assert all(sample.vision_s == 0 for sample in found.samples)
        assert len({sample.text for sample in found.samples}) == 3
        assert found.samples == tuple(
            dataclasses.replace(
                old, text=model.findings(film(4), max_new_tokens=8, sampling=Sampling(temperature=1.0, seed=seed)).text
            )
            for seed, old in enumerate(found.samples, start=1)
        )
        # Beside samples and after them the draft itself is what it is alone.
        assert model.findings(film(3), max_new_tokens=8, samples=2).text == alone.text
        assert model.findings(film(4), max_new_tokens=8, reuse=False).text == found.text


def test_several_ways_of_one_film_read_it_once(monkeypatch: pytest.MonkeyPatch, tiny_model: FindingsModel) -> None:
    counts = counted(tiny_model, monkeypatch)
    ways = [Sampling(temperature=1.0, seed=seed) for seed in range(3)]
    drafts = tiny_model.submit_each(film(11), samplings=ways, max_new_tokens=6, top_logprobs=2)
    made = [draft.result() for draft in drafts]
    assert counts[1] == 1
    assert [one.num_reused_tokens > 0 for one in made] == [False, True, True]
    assert all(one.top_logprobs is not None and len(one.top_logprobs[0]) == 2 for one in made)
    again = tiny_model.findings(film(11), max_new_tokens=6, sampling=ways[2])
    assert again.text == made[2].text


def test_a_draft_ends_with_its_samples_and_not_before(tiny_model: FindingsModel) -> None:
    ended: list[str] = []
    draft = tiny_model.submit(film(5), max_new_tokens=6, samples=3)
    draft.on_end(lambda: ended.append(draft.id))
    text = "".join(draft)
    findings = draft.result()
    assert (text, draft.done(), draft.error) == (findings.text, True, None)
    assert ended == [draft.id]
    with pytest.raises(LiteError, match="0 to 16"):
        tiny_model.submit(film(5), samples=17)
    gone = tiny_model.submit(film(6), max_new_tokens=400, samples=3)
    gone.cancel()
    with pytest.raises(LiteError, match="cancel"):
        gone.result(20)


def test_a_draft_is_not_done_before_its_samples() -> None:
    own, sample = Outcome("own"), Outcome("sample")
    own._has_ended = True
    made: list[bool] = []
    given: Any = {"text": None, "cancel": lambda: None, "finish": lambda: made.append(True)}
    draft = Draft(own, **given, samples=[sample])
    assert (draft.done(), draft.findings, made) == (False, None, [])
    sample._has_ended = True
    assert draft.done()


def test_all_samples_are_taken_or_none(tiny_model: FindingsModel, monkeypatch: pytest.MonkeyPatch) -> None:
    session = tiny_model.session
    monkeypatch.setattr(session, "max_queue", 2)
    assert tiny_model.findings(film(7), max_new_tokens=2, samples=4).samples  # nobody else waits
    monkeypatch.setattr(session, "max_queue", 0)
    monkeypatch.setattr(session, "waiting", [object()])
    with pytest.raises(QueueFull):
        tiny_model.submit(film(7), samples=2)
    assert len(session.waiting) == 1
    monkeypatch.undo()
