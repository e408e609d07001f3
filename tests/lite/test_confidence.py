"""How sure the model was of a sentence: its tokens, what is false, samples beside it, and calibrations."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import film

from lite.__main__ import main
from lite.bench.confidence import auroc, calibration_error, measure, removed, render_page, risk_coverage
from lite.errors import LiteError
from lite.eval.calibration import (
    Calibration,
    Judged,
    beside,
    find_calibration,
    isotonic,
    learn,
    logistic,
    read_calibration,
    with_sentences,
)
from lite.eval.confidence import Stated, Token, contrast, stated
from lite.eval.labels import read_mentions
from lite.model import FindingsModel
from lite.studies.results import Findings, Result, Sample

TEXTS = (
    "The lungs are clear. Right lower lobe consolidation of 3.4 cm. No pleural effusion",
    "  1. One item only. 2. Another of 11 mm.\n",
    "Heart size is normal.\n\nNo pneumothorax – für 漢字 unchanged. ",
    "",
)
NOTHING_TO_SEE = Sample(text="", num_reused_tokens=0, vision_s=0.0, prefill_s=0.0, decode_s=0.0)


@pytest.fixture(scope="module")
def drafted(tiny_model: FindingsModel) -> Findings:
    return tiny_model.findings(film(1), max_new_tokens=1)


def said(model: FindingsModel, drafted: Findings, *parts: str, samples: tuple[str, ...] = ()) -> Findings:
    """Return findings of these sentences, the tokens of each less probable than those of the one before."""
    token_ids: list[int] = []
    logprobs: list[float] = []
    for number, part in enumerate(parts):
        ids = model.tokenizer.encode(part)
        token_ids += ids
        logprobs += [math.log(0.9 - 0.2 * number + 0.05 * (index % 2)) for index in range(len(ids))]
    return dataclasses.replace(
        drafted,
        text=model.tokenizer.decode(token_ids),
        token_ids=tuple(token_ids),
        token_logprobs=tuple(logprobs),
        top_logprobs=tuple(((token, logprob),) for token, logprob in zip(token_ids, logprobs, strict=True)),
        samples=tuple(dataclasses.replace(NOTHING_TO_SEE, text=text) for text in samples) or None,
    )


# -- Sentences and their tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_sentence_has_the_mean_probability_of_its_own_tokens(
    text: str, tiny_model: FindingsModel, drafted: Findings
) -> None:
    wanted = [part for part in re.split(r"(?<=[a-z]\.)\s+", text.strip()) if part]
    findings = with_sentences(said(tiny_model, drafted, *wanted), tiny_model.tokenizer, None)
    found = findings.sentences
    assert found is not None
    assert "".join(sentence.text for sentence in found) == findings.text
    assert [sentence.text.strip() for sentence in found] == wanted
    for number, (sentence, part) in enumerate(zip(found, wanted, strict=True)):
        count = len(tiny_model.tokenizer.encode(part))
        mean = 0.9 - 0.2 * number + 0.05 * (count // 2) / count
        assert sentence.mean_probability == pytest.approx(mean, abs=1e-4)


class Words:
    """A tokenizer of which each token is a word."""

    eos_token_id = 0

    def __init__(self) -> None:
        self.words = ["", "Small", "Large", "left", "right", "effusion.", "There", "is", "a"]

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[index] for index in ids)


def test_the_contrast_counts_what_would_contradict_and_nothing_else() -> None:
    def token(word: int, p: float, *others: tuple[int, float]) -> Token:
        top = sorted(((word, p), *others), key=lambda pair: -pair[1])
        return Token(word, 0, math.log(p), tuple((index, math.log(share)) for index, share in top))

    words: Any = Words()
    sure = [token(1, 0.5, (6, 0.5)), token(3, 0.9, (0, 0.1)), token(5, 1.0)]  # another phrase, and an end
    assert contrast(sure, words) == 1.0
    nothing = [*sure[:2], token(5, 0.8, (7, 0.2))]  # without the finding there is nothing to contradict
    assert contrast(nothing, words) == 1.0
    size = [token(1, 0.3, (2, 0.1), (6, 0.6)), *sure[1:]]
    assert contrast(size, words) == pytest.approx(0.75)
    both = [size[0], token(3, 0.4, (4, 0.6)), sure[2]]
    assert contrast(both, words) == pytest.approx(0.75 * 0.4)


# -- What is false ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "reference", "false"),
    [
        ("Small left pleural effusion.", "Small left pleural effusion.", False),
        ("Small left pleural effusion.", "Pleural effusion.", False),
        ("Pleural effusion.", "Large right pleural effusion.", False),
        ("Left pleural effusion.", "Bilateral pleural effusions.", False),
        ("Bilateral pleural effusions.", "Left pleural effusion.", True),
        ("Bilateral pleural effusions.", "Left pleural effusion. Right pleural effusion.", False),
        ("Bilateral pleural effusions.", "Left pleural effusion. Left pneumothorax. Right lung is clear.", True),
        ("Small left pleural effusion.", "Small right pleural effusion.", True),
        ("Small left pleural effusion.", "Moderate left pleural effusion.", True),
        ("Small left pleural effusion.", "Large left pleural effusion. Small right pleural effusion.", True),
        ("Left upper zone consolidation.", "Left lower zone consolidation.", True),
        ("Left pleural effusion.", "No pleural effusion.", True),
        ("Left pleural effusion.", "Heart size is normal.", True),
        ("Left pleural effusion.", "Possible left pleural effusion.", False),
        ("Possible left pleural effusion.", "No pleural effusion.", False),
        ("No pneumothorax.", "Heart size is normal.", False),
        ("No pneumothorax.", "Possible pneumothorax.", False),
        ("No pneumothorax or pleural effusion.", "Small left pleural effusion.", True),
        ("The lungs are clear.", "Left lower zone consolidation.", True),
        ("The lungs are clear.", "Severe cardiomegaly. Left pneumothorax.", False),
        ("Consolidation.", "Atelectasis.", True),
    ],
)
def test_a_sentence_is_false_where_the_reference_contradicts_it(sentence: str, reference: str, *, false: bool) -> None:
    mentions = tuple(read_mentions(sentence))
    assert mentions
    one = Stated(text=sentence, tokens=(), mentions=mentions, contrast=1.0, agreement=None)
    assert one.is_false(read_mentions(reference)) == false


def test_agreement_is_the_share_of_samples_that_do_not_contradict(tiny_model: FindingsModel, drafted: Findings) -> None:
    parts = "The heart is fine.", "Small left pleural effusion.", "No pneumothorax."
    samples = "Left pleural effusion.", "Right pleural effusion.", "Small effusion. Pneumothorax.", ""
    found = stated(said(tiny_model, drafted, *parts, samples=samples), tiny_model.tokenizer)
    assert [one.agreement for one in found] == [None, 0.5, 0.75]  # the first states nothing that is read


# -- Learning and measuring ------------------------------------------------------------------------------------------


def best_rising(true: list[float]) -> list[float]:
    """Return the rising sequence of least squares, by trying all ways to cut outcomes into levels."""
    best: tuple[float, list[float]] = (math.inf, [])
    for cuts in itertools.product([False, True], repeat=len(true) - 1):
        places = [0, *[i + 1 for i, cut in enumerate(cuts) if cut], len(true)]
        levels = [sum(true[a:b]) / (b - a) for a, b in itertools.pairwise(places)]
        if levels == sorted(levels):
            fitted = [
                level for level, (a, b) in zip(levels, itertools.pairwise(places), strict=True) for _ in range(b - a)
            ]
            best = min(best, (sum((f - t) ** 2 for f, t in zip(fitted, true, strict=True)), fitted))
    return best[1]


@pytest.mark.parametrize("seed", range(25))
def test_isotonic_levels_are_the_best_rising_ones(seed: int) -> None:
    rng = random.Random(seed)
    true = [float(rng.random() < 0.3 + 0.05 * i) for i in range(9)]
    scores = [i / 10 + 0.01 for i in range(9)]
    levels = isotonic(np.array(scores), np.array(true))
    assert list(levels) == sorted(levels)
    found = np.interp(scores, *np.array(levels).T)
    assert found == pytest.approx([min(max(level, 1 / 11), 10 / 11) for level in best_rising(true)])


def test_equal_scores_have_one_level() -> None:
    levels = isotonic(np.array([0.5, 0.5, 0.5, 0.9]), np.array([1.0, 0.0, 1.0, 1.0]))
    assert [level for step in levels for level in step] == pytest.approx([0.5, 2 / 3, 0.9, 5 / 6])


def test_the_logistic_model_finds_the_weights_that_made_the_data() -> None:
    rng = np.random.default_rng(0)
    raw = np.column_stack([rng.normal(5, 0.1, 20000), rng.normal(0, 30, 20000)])
    true = rng.random(20000) < 1 / (1 + np.exp(-(-49 + 10 * raw[:, 0] + 0.04 * raw[:, 1])))
    assert logistic(raw, true.astype(float)) == pytest.approx((-49, 10, 0.04), rel=0.1)


def cases(seed: int, count: int = 60) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 12, count) / 12, rng.random(count) < 0.3


@pytest.mark.parametrize("seed", range(5))
def test_measures_against_plain_counts(seed: int) -> None:
    scores, false = cases(seed)
    pairs = [(t, f) for t in scores[~false] for f in scores[false]]
    assert auroc(scores, false) == pytest.approx(sum((t > f) + (t == f) / 2 for t, f in pairs) / len(pairs))
    orders: list[float] = []
    for _ in range(2000):  # ties in any order
        order = np.lexsort((np.random.default_rng(len(orders)).random(len(scores)), scores))
        orders.append(false[order[:12]].sum() / false.sum())
    assert removed(scores, false) == pytest.approx(float(np.mean(orders)), abs=0.02)
    coverage, risk = risk_coverage(scores, false)
    assert (coverage[-1], risk[-1]) == (1.0, pytest.approx(false.mean()))
    assert risk[9] == false[np.argsort(-scores, kind="stable")[:10]].mean()
    assert math.isnan(auroc(scores, false & False))


def test_the_calibration_error_is_the_distance_of_what_is_said() -> None:
    true = np.array([True] * 75 + [False] * 25)
    np.random.default_rng(0).shuffle(true)
    assert calibration_error(np.full(100, 0.75), ~true) < 0.2  # the bins' own chance
    assert calibration_error(np.full(100, 0.05), ~true) == pytest.approx(0.70)


def judged(model: FindingsModel, drafted: Findings, count: int = 200) -> list[Judged]:
    """Return sentences of which the less probable are false more often, and with them those that samples contradict."""
    rng = random.Random(1)
    found = []
    for study in range(count):
        wrong = rng.random() < 0.25
        sample = "Small right pleural effusion." if wrong == (rng.random() < 0.9) else "Small left pleural effusion."
        (one,) = stated(said(model, drafted, "Small left pleural effusion.", samples=(sample,)), model.tokenizer)
        drop = 0.5 * wrong + rng.gauss(0, 0.3)
        top = ((1, math.log(0.6)), (2, math.log(0.3)))
        tokens = tuple(token._replace(logprob=token.logprob - abs(drop), top=top) for token in one.tokens)
        found.append(Judged(dataclasses.replace(one, tokens=tokens), study, wrong))
    return found


@pytest.fixture(scope="module")
def learned(tiny_model: FindingsModel, drafted: Findings) -> tuple[list[Judged], Calibration]:
    sentences = judged(tiny_model, drafted)
    return sentences, learn(sentences, with_samples=True, settings=tiny_model.settings, data="made.json")


def test_a_calibration_says_what_is_true(learned: tuple[list[Judged], Calibration]) -> None:
    sentences, calibration = learned
    false = np.array([one.is_false for one in sentences])
    one_pass = [dataclasses.replace(one.sentence, agreement=None) for one in sentences]
    for found, least in ((one_pass, 0.7), ([one.sentence for one in sentences], 0.85)):
        scores, probabilities = np.array(calibration.numbers(found), float).T
        assert auroc(scores, false) > least
        assert probabilities.mean() == pytest.approx((~false).mean(), abs=0.03)
        assert calibration_error(probabilities, false) < 0.08
    unread = dataclasses.replace(sentences[0].sentence, mentions=(), contrast=None, agreement=None)
    assert calibration.numbers([unread, sentences[0].sentence])[0] == (None, None)
    page = render_page(measure(calibration, sentences, None), calibration)
    assert page.count("<circle") == 10 * 5
    assert "nan" not in page.lower().replace("nanometer", "")


def test_too_little_is_not_learned_from(learned: tuple[list[Judged], Calibration], tiny_model: FindingsModel) -> None:
    for few in (learned[0][:6], [one for one in learned[0] if not one.is_false]):
        with pytest.raises(LiteError, match="give more studies"):
            learn(few, with_samples=False, settings=tiny_model.settings, data="few.json")


# -- Its file --------------------------------------------------------------------------------------------------------


def test_a_calibration_is_read_as_it_was_written(learned: tuple[list[Judged], Calibration], tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(learned[1].to_json())
    assert read_calibration(file) == learned[1]
    assert read_calibration(file).id == learned[1].id


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["rates"].update({"positive": [1, 1]}),
        lambda value: value["scales"][0]["weights"].reverse(),
        lambda value: value.update(artifact_id="0" * 16),
        lambda value: value.update(more=1),
        lambda value: value.pop("sha256"),
        lambda value: value["scales"].pop(),
        lambda value: value["scales"][0].update(levels=[["0", 1]]),
    ],
)
def test_what_was_changed_is_refused(
    change: Callable[[dict[str, Any]], object], learned: tuple[list[Judged], Calibration], tmp_path: Path
) -> None:
    value = json.loads(learned[1].to_json())
    change(value)
    (tmp_path / "c.json").write_text(json.dumps(value))
    with pytest.raises(LiteError, match=r"c\.json\S*: got .* make it again"):
        read_calibration(tmp_path / "c.json")


def test_another_artifacts_calibration_is_refused(
    learned: tuple[list[Judged], Calibration], tiny_model: FindingsModel, tmp_path: Path
) -> None:
    file = tmp_path / "c.json"
    others: dict[str, Any] = {"artifact_id": "0" * 16, "cache_dtype": "int4", "num_image_tokens": 3}
    for name, value in others.items():
        file.write_text(dataclasses.replace(learned[1], **{name: value}).to_json())
        with pytest.raises(LiteError, match=f"a calibration of {name} {value} · expected"):
            find_calibration(file, tiny_model)


@pytest.fixture
def placed(learned: tuple[list[Judged], Calibration], tiny_model: FindingsModel) -> Iterator[Path]:
    file = beside(tiny_model.artifact.path)
    file.write_text(learned[1].to_json())
    yield file
    file.unlink()


def test_auto_takes_the_one_beside_the_artifact_if_it_fits(
    placed: Path, tiny_model: FindingsModel, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_calibration("auto", tiny_model) is not None
    placed.write_text(dataclasses.replace(read_calibration(placed), engine="onnx").to_json())
    assert find_calibration("auto", tiny_model) is None
    assert "uncalibrated" in caplog.text
    placed.write_text("{}")
    with pytest.raises(LiteError, match="make it again"):
        find_calibration("auto", tiny_model)


def test_a_calibration_is_of_one_adapter(
    learned: tuple[list[Judged], Calibration], tiny_model: FindingsModel, drafted: Findings, caplog: Any
) -> None:
    of_a = learn(learned[0], with_samples=True, settings=tiny_model.settings | {"adapter": "a"}, data="made.json")
    by_none = said(tiny_model, drafted, "Small left pleural effusion.")
    made = [dataclasses.replace(by_none, adapter="a"), by_none, by_none]
    findings = [with_sentences(one, tiny_model.tokenizer, of_a) for one in made]
    assert [one.calibration for one in findings] == [of_a.id, None, None]
    assert findings[2].sentences == with_sentences(by_none, tiny_model.tokenizer, None).sentences
    assert caplog.text.count(f"got calibration {of_a.id} of the adapter a · expected no adapter") == 1


# -- The command line ------------------------------------------------------------------------------------------------


def test_generate_says_how_sure_it_was_only_if_asked(
    tiny_model: FindingsModel, films: list[Path], capsys: pytest.CaptureFixture[str], placed: Path
) -> None:
    artifact = str(tiny_model.artifact.path)
    command = ["generate", artifact, str(films[0]), "--device", "cpu", "--max-new-tokens", "30"]
    assert main(command) == 0
    plain = capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert not {"sentences", "samples", "calibration", "token_logprobs", "top_logprobs"} & value.keys()
    assert main([*command, "--samples", "2"]) == 0
    more = capsys.readouterr().out
    assert more.startswith(plain)
    assert f"by calibration {read_calibration(placed).id}" in more
    assert main([*command, "--samples", "2", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert "".join(one["text"] for one in value["sentences"]) == value["prediction"]
    assert len(value["samples"]) == 2
    kept = Result.from_json(json.dumps(value), where="line").findings
    assert kept is not None
    assert json.loads(json.dumps(kept.to_dict()))["sentences"] == value["sentences"]
    placed.write_text(dataclasses.replace(read_calibration(placed), engine="onnx").to_json())
    assert main([*command, "--confidence", "auto"]) == 0
    assert "uncalibrated" in capsys.readouterr().out
    assert main([*command, "--confidence", str(placed)]) != 0


def test_run_writes_what_confidence_learns_from(
    tiny_model: FindingsModel, films: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed, out = tmp_path / "list.json", tmp_path / "out.jsonl"
    entry = {"conversations": [{"value": "<image>\nDescribe."}, {"value": "Small left pleural effusion."}]}
    listed.write_text(json.dumps([entry | {"id": f"{i}", "image": str(file)} for i, file in enumerate(films)]))
    artifact, more = str(tiny_model.artifact.path), ["--device", "cpu", "--max-new-tokens", "8"]
    assert main(["run", artifact, str(listed), "--out", str(out), "--samples", "2", *more]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(line["samples"]) for line in lines] == [2] * len(films)
    assert all(line["request"]["samples"] == 2 and line["sentences"] for line in lines)
    # Texts of random weights state nothing: both ways come as far as that.
    for data, samples in ((out, []), (listed, ["--samples", "2"])):
        assert main(["confidence", artifact, str(data), "--out", str(tmp_path / "c.json"), *samples, *more]) == 1
        assert "0 sentences that state something" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text(out.read_text().replace(tiny_model.artifact.id, "0" * 16))
    assert main(["confidence", artifact, str(other), "--out", str(tmp_path / "c.json"), *more]) == 1
    assert f"expected {tiny_model.artifact.id}" in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()
    assert main(["run", artifact, str(listed), "--out", str(tmp_path / "plain.jsonl"), *more]) == 0
    assert "sentences" not in (tmp_path / "plain.jsonl").read_text()
    assert main(["confidence", artifact, str(tmp_path / "plain.jsonl"), *more]) == 1
    assert "without log-probabilities" in capsys.readouterr().err
