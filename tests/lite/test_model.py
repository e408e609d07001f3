"""The façade: one way in, one result out, whatever the batch, and no torch before it is needed."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from repository import run_python
from tiny import write_tiny_artifact

from lite.artifact.open import Artifact
from lite.engines.protocol import Sampling
from lite.errors import ContextLengthError, DeadlineExceeded, ImageError, LiteError, PromptError
from lite.loading import load
from lite.model import FindingsModel
from lite.session.draft import as_completed

REASONS = [None, "cough", "Fever and shortness of breath for three days, rule out pneumonia.", "", "chest pain"]


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
    memory = findings.memory
    assert memory.peak_vram_bytes is None
    peaks = [peaks.rss_bytes or 0 for peaks in (memory.image, memory.vision, memory.prefill, memory.decode)]
    assert peaks == sorted(peaks)
    assert peaks[0] > 10_000_000
    slots = tiny_model.session.loop.max_seq_len
    assert slots >= findings.num_prompt_tokens + 24
    assert memory.cache_bytes == 2 * 2 * 1 * 2 * slots * 16 * 4, "one row of the session's"
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
    pieces = [next(stream)]
    assert stream.findings is None
    pieces += stream
    assert len(pieces) > 3
    assert all(pieces)
    expected = tiny_model.findings(films[0], "cough")
    assert stream.findings is not None
    assert "".join(pieces) == stream.findings.text == expected.text
    assert stream.findings.token_ids == expected.token_ids
    assert list(stream) == []
    assert stream.result() is stream.findings


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


def test_what_is_wrong_is_said_before_the_first_piece_and_of_a_reason_before_the_image_is_read(
    tiny_model: FindingsModel, tmp_path: Path
) -> None:
    for call in (tiny_model.findings, tiny_model.stream):
        with pytest.raises(ImageError):
            call(tmp_path / "nowhere.png")
        with pytest.raises(ContextLengthError, match="640"):
            call(tmp_path / "nowhere.png", "long " * 1000)


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


def test_drafts_come_as_they_end_and_have_deadlines(tiny_model: FindingsModel, films: list[Path]) -> None:
    drafts = [tiny_model.submit(image, request_id=f"film {i}", max_new_tokens=3 + i) for i, image in enumerate(films)]
    assert {draft.id for draft in as_completed(drafts)} == {f"film {i}" for i in range(5)}
    assert all(draft.done() and draft.findings is draft.result() for draft in drafts)
    with pytest.raises(DeadlineExceeded, match="got no end before its deadline"):
        tiny_model.findings(films[0], timeout_s=1e-9)


_EIGHT_CALLERS = """
import json, sys, threading
import torch
compiler = "torch._dynamo" in sys.modules
import lite
from lite.artifact.open import load_artifact
from lite.engines.machine import look
from lite.engines.options import LoadOptions
from lite.loading import plan_run, prompt_of
from lite.memory.process import peak_rss_bytes

path, *films = sys.argv[1:]
artifact = load_artifact(path)
_, prompt = prompt_of(artifact)
reason = "cough " * 200
num_prompt_tokens = prompt.num_tokens(prompt.encode(reason))
options = LoadOptions(engine="torch", device="cpu")
free = plan_run(artifact, prompt, options, look(options, artifact))
limit = free.with_rows(3, num_prompt_tokens=num_prompt_tokens).card_bytes
texts = {}

def ask(caller):
    texts[caller] = model.findings(films[caller % len(films)], f"{caller} {reason}").text

with lite.load(path, engine="torch", device="cpu", memory_limit=limit) as model:
    threads = [threading.Thread(target=ask, args=(caller,)) for caller in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = model.session.loop._cache
    told = {"compiler": compiler or "torch._dynamo" not in sys.modules}
    told |= {"planned_rows": model.plan.rows, "rows": cache.num_rows, "row_bytes": cache.nbytes // cache.num_rows}
print(json.dumps(told | {"limit": limit, "texts": len(texts), "peak": peak_rss_bytes()}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_eight_callers_of_one_session_stay_within_the_memory_limit(
    tmp_path: Path, tokenizer_model: bytes, films: list[Path]
) -> None:
    """Each asks with a reason so long that three rows of that length fit at most, of the eight that usual ones have."""
    shape = {"num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    changes = shape | {"max_position_embeddings": 4096}
    path = write_tiny_artifact(tmp_path / "artifact", tokenizer_model, llama_changes=changes).path
    told = json.loads(run_python("-c", _EIGHT_CALLERS, path, *films, OMP_NUM_THREADS="1"))
    assert (told["texts"], told["planned_rows"]) == (8, 8)
    assert 2 <= told["rows"] <= 3
    assert told["compiler"], "torch's compiler was imported to load a decoder: 1 s and 140 MB"
    assert told["peak"] <= told["limit"]
    assert told["peak"] + 5 * told["row_bytes"] > told["limit"] + 50e6, "eight such rows would not be seen"
