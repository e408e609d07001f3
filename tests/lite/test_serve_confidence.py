"""How sure the model was of a sentence: the tokens that make it, and no others."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
from tiny import film

from lite.model import FindingsModel
from lite.serve.confidence import sentence_confidence
from lite.studies.results import Findings

TEXTS = (
    "The lungs are clear. Right lower lobe consolidation of 3.4 cm. No pleural effusion",
    "  One sentence only.\n",
    "Heart size is normal.\n\nNo pneumothorax – für 漢字 unchanged. ",
    "",
)


@pytest.fixture(scope="module")
def drafted(tiny_model: FindingsModel) -> Findings:
    return tiny_model.findings(film(1), max_new_tokens=1)


@pytest.mark.parametrize("text", TEXTS)
def test_a_sentence_has_the_mean_probability_of_its_own_tokens(
    text: str, tiny_model: FindingsModel, drafted: Findings
) -> None:
    tokenizer = tiny_model.tokenizer
    wanted = [part for part in re.split(r"(?<=\.)\s+", text.strip()) if part]
    token_ids: list[int] = []
    logprobs: list[float] = []
    for number, part in enumerate(wanted):
        ids = tokenizer.encode(part)
        token_ids += ids
        logprobs += [math.log(0.9 - 0.2 * number + 0.05 * (index % 2)) for index in range(len(ids))]
    made = tokenizer.decode(token_ids)
    findings = dataclasses.replace(drafted, text=made, token_ids=tuple(token_ids), token_logprobs=tuple(logprobs))
    found = sentence_confidence(findings, tokenizer)
    assert "".join(sentence["text"] for sentence in found) == made
    assert [sentence["text"].strip() for sentence in found] == wanted
    for number, (sentence, part) in enumerate(zip(found, wanted, strict=True)):
        count = len(tokenizer.encode(part))
        mean = 0.9 - 0.2 * number + 0.05 * (count // 2) / count
        assert sentence["mean_probability"] == pytest.approx(mean, abs=1e-4)


def test_what_was_drafted_is_scored_as_it_is(tiny_model: FindingsModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "top_logprobs": 0}
    findings = tiny_model.submit(film(2), **options).result()
    found = sentence_confidence(findings, tiny_model.tokenizer)
    assert "".join(sentence["text"] for sentence in found) == findings.text
    shares = [sentence["mean_probability"] for sentence in found]
    assert shares
    assert all(share is None or 0 < share <= 1 for share in shares)
