"""What every engine does: cached, chunked and batched it is itself; drafts verified, rows cut back, prefixes copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from driving import IMAGES, LENGTHS, NOT_FINITE, PROMPTS, TARGETS, decode_token, newest_of, read_prompt, score_text
from recording import record

from lite.artifact.open import Artifact
from lite.config import IMAGE_TOKEN_ID
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.protocol import Sampling, Segment
from lite.engines.segments import divide, expand_image, num_prefix_tokens
from lite.engines.torch_engine.load import load_decoder
from lite.errors import ContextLengthError, LiteError

PROMPT = [1, 15, IMAGE_TOKEN_ID, 60, 61, 62, 9]
OTHER = [1, 15, IMAGE_TOKEN_ID, 70, 71]
IMAGE = IMAGES[0]
KINDS = ["torch", "torch int8", "torch captured", "torch captured int8", "onnx", "onnx int8"]


def make(kind: str, artifact: Artifact) -> Any:
    cache_dtype: Any = "int8" if "int8" in kind else None
    if kind.startswith("onnx"):
        return OnnxDecoder(artifact, cache_dtype=cache_dtype)
    decoder = load_decoder(artifact, device="cpu", cache_dtype=cache_dtype)
    if "captured" in kind:
        decoder.capture = record
    return decoder


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, tiny_onnx_artifact: Artifact) -> Any:
    return make(request.param, tiny_onnx_artifact)


# ---- a study by itself, and beside others


def copied(logits: Any) -> Any:
    """Return logits as an array of their own: a captured step writes the next ones to the same place."""
    return np.array(logits.numpy() if isinstance(logits, torch.Tensor) else logits)


def close(engine: Any, got: Any, expected: Any) -> None:
    """Compare logits."""
    got, expected = copied(got), copied(expected)
    assert np.isfinite(got).all()
    # ONNX Runtime sums a product of one row and of many in another order, and then rounds to int8.
    allowed = 0.02 if engine.engine == "onnx" else 1e-4
    assert np.abs(got - expected).max() <= allowed * np.abs(expected).max()


def begin(engine: Any, cache: Any, study: int, row: int = 0) -> Any:
    """Read the prompt of a study; return the logits behind it."""
    return copied(read_prompt(engine, PROMPTS[study], IMAGES[study], cache, row)[0])


def step(engine: Any, cache: Any, input_ids: Sequence[int]) -> Any:
    """Decode these tokens; return the logits."""
    return copied(decode_token(engine, cache, input_ids))


def test_cached_is_uncached(engine: Any) -> None:
    """With an int8 cache the scored tokens see each other rounded, as if each had been decoded."""
    cache = engine.new_cache(1, LENGTHS[0] + len(TARGETS))
    logits = [begin(engine, cache, 0)]
    for index, token_id in enumerate(TARGETS[:-1]):
        assert cache.num_cached_tokens == [LENGTHS[0] + index]
        logits.append(step(engine, cache, [token_id])[0])
        assert newest_of(cache) == [logits[-1].argmax()]
    scored = copied(score_text(engine, PROMPTS[0], TARGETS, IMAGES[0]))
    assert scored.shape == (len(TARGETS), engine.config.vocab_size)
    close(engine, np.stack(logits), scored)
    assert len({int(row.argmax()) for row in scored}) > 3, "rows that are all alike would prove nothing"
    if getattr(engine, "capture", None) is not None:
        assert [key for key, graphed in cache.steps.items() if graphed.is_captured] == [(1, 0, 0, False)]


@pytest.mark.parametrize("chunk_size", [1, 3, 7])
def test_chunked_is_whole(engine: Any, chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an int8 cache of the answer only: a prompt's later chunks see its earlier ones as the cache keeps them."""
    studies = list(zip(PROMPTS, IMAGES, strict=True))
    if engine.cache_dtype == "int8":
        studies = [([IMAGE_TOKEN_ID], IMAGES[0][:1])]
    assert engine.chunk_size > LENGTHS[2] + len(TARGETS)
    # The logits wanted begin before, in and behind a chunk's border.
    cases = [(*study, TARGETS[:count]) for study in studies for count in (1, 2, 3, len(TARGETS))]
    expected = [score_text(engine, prompt, targets, image) for prompt, image, targets in cases]
    monkeypatch.setattr(engine, "chunk_size", chunk_size)
    for (prompt, image, targets), whole in zip(cases, expected, strict=True):
        got = score_text(engine, prompt, targets, image)
        assert got.shape == whole.shape
        close(engine, got, whole)


def test_rows_of_a_batch_are_the_rows_alone(engine: Any) -> None:
    """They are of other lengths and end at other times."""
    together = engine.new_cache(3, max(LENGTHS) + 6)
    batch = [[begin(engine, together, row, row)] for row in range(3)]
    assert together.num_cached_tokens == LENGTHS
    ends = [2, 5, 4]
    for number in range(max(ends)):
        logits = step(engine, together, [TARGETS[number]] * 3)
        # Those behind the last that is not free are not computed.
        assert len(logits) == (3 if number < 4 else 2)
        for row, end in enumerate(ends):
            if number < end:
                batch[row].append(logits[row])
            if number + 1 == end:
                together.release(row)
    assert together.num_cached_tokens == [length + end for length, end in zip(LENGTHS, ends, strict=True)]
    for row, end in enumerate(ends):
        alone = engine.new_cache(1, LENGTHS[row] + 6)
        close(engine, batch[row][0], begin(engine, alone, row))
        for number in range(end):
            close(engine, batch[row][number + 1], step(engine, alone, [TARGETS[number]])[0])


@pytest.mark.parametrize("left_behind", [1.0, np.nan])
def test_a_study_in_a_row_that_was_used_is_that_study_alone(engine: Any, left_behind: float) -> None:
    """The longer one before it has left keys and values behind its prompt, numbers or not."""
    cache, alone = engine.new_cache(2, 24), engine.new_cache(1, 24)
    read_prompt(engine, PROMPTS[2], IMAGES[2] * left_behind, cache, 0)
    begin(engine, cache, 0, 1)
    # The rounded keys of a film are numbers, whatever they were: that its features are is made sure of before.
    if engine.cache_dtype != "int8":
        assert (newest_of(cache)[0] == NOT_FINITE) == (left_behind != 1.0)
    for _ in range(2):
        decode_token(engine, cache)
    cache.release(0, damaged=left_behind != 1.0)
    decode_token(engine, cache)  # while it is free
    assert cache.num_cached_tokens == [LENGTHS[2] + 2 if left_behind == 1.0 else 0, LENGTHS[0] + 3]
    close(engine, begin(engine, cache, 1, 0), begin(engine, alone, 1))
    for token_id in TARGETS[:3]:
        close(engine, step(engine, cache, [token_id, 91])[0], step(engine, alone, [token_id])[0])
    assert cache.num_cached_tokens == [LENGTHS[1] + 3, LENGTHS[0] + 6]


def test_a_cache_counts_its_bytes(engine: Any) -> None:
    cache = engine.new_cache(3, 50)
    vectors = 2 * 2 * 3 * 2 * 50  # keys and values, layers, rows, kv_heads, slots
    of_int8 = 16 + 2 if engine.engine == "torch" else 16  # ONNX Runtime's has its scales in the graph
    assert cache.nbytes == vectors * (of_int8 if engine.cache_dtype == "int8" else 16 * 4)
    assert (cache.num_rows, cache.max_seq_len) == (3, 50)


def test_a_full_cache_is_refused_before_anything_is_written(engine: Any) -> None:
    short = engine.new_cache(1, LENGTHS[0] - 1)
    with pytest.raises(ContextLengthError, match=rf"position {LENGTHS[0]} · expected at most {LENGTHS[0] - 1}"):
        begin(engine, short, 0)
    assert short.num_cached_tokens == [num_prefix_tokens(expand_image(PROMPTS[0], len(IMAGES[0])))]
    exact = engine.new_cache(2, LENGTHS[0] + 1)
    begin(engine, exact, 0, 0)
    decode_token(engine, exact)
    begin(engine, exact, 1, 1)
    with pytest.raises(ContextLengthError, match="allocate a longer cache"):
        decode_token(engine, exact)
    assert exact.num_cached_tokens == [LENGTHS[0] + 1, LENGTHS[1]]
    # A row that was full does not grow when it is free.
    exact.release(0)
    decode_token(engine, exact)
    assert exact.num_cached_tokens == [LENGTHS[0] + 1, LENGTHS[1] + 1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_no_text(engine: Any, value: float) -> None:
    """The most probable of NaNs would be a token all the same: the host is told that there is none, of this row."""
    if engine.engine == "onnx" and engine.cache_dtype == "int8":
        pytest.skip("the rounded keys of a film are numbers, whatever they were")
    cache, image = engine.new_cache(2, 30), np.full((4, 64), value, np.float32)
    begin(engine, cache, 0, 0)
    read_prompt(engine, PROMPTS[0], image, cache, 1)
    for _ in range(2):
        newest = newest_of(cache)
        assert newest[0] >= 0
        assert newest[1] == NOT_FINITE
        decode_token(engine, cache)
    assert engine.overflow.startswith("got logits that are not finite in ")
    with pytest.raises(LiteError, match="not finite in .*float32 · expected numbers · the artifact may be damaged"):
        score_text(engine, PROMPTS[0], TARGETS, image)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("torch")])
def test_what_overflows_while_it_is_decoded_is_seen_and_stays_in_its_row(
    kind: str, tiny_onnx_artifact: Artifact
) -> None:
    engine = make(kind, tiny_onnx_artifact)
    cache, alone = engine.new_cache(2, 40), engine.new_cache(1, 40)
    for row in range(2):
        begin(engine, cache, row, row)
    begin(engine, alone, 0)
    engine.model.embed_tokens.weight[55] = float("nan")
    for number, token_id in enumerate([44, 55, 3]):
        close(engine, step(engine, cache, [33 + number, token_id])[0], step(engine, alone, [33 + number])[0])
        assert newest_of(cache) == [*newest_of(alone), newest_of(cache)[1] if number == 0 else NOT_FINITE]
    cache.release(1, damaged=True)
    kept = [tensor for tensor in (cache.k_cache, cache.v_cache, cache.k_scales, cache.v_scales) if tensor is not None]
    assert [bool(tensor[:, row].any()) for row in range(2) for tensor in kept] == [True] * len(kept) + [False] * len(
        kept
    )


# ---- drafts, prefixes, and what is told


def read(engine: Any, cache: Any, row: int, prompt: Sequence[int] = PROMPT, *, start: int = 0, **named: Any) -> int:
    """Read a prompt from a place on; return its first token."""
    ids = expand_image(prompt, len(IMAGE))
    for segment in divide(ids, row=row, start=start, chunk_size=100, image_features=IMAGE, **named):
        chosen = engine.extend(segment, cache)
    return int(chosen.wait()[row].token_ids[0])


def decode(engine: Any, cache: Any, steps: int) -> dict[int, list[int]]:
    said: dict[int, list[int]] = {}
    for _ in range(steps):
        for row, tokens in engine.decode(cache).wait().items():
            said.setdefault(row, []).append(tokens.token_ids[0])
    return said


def alone(engine: Any, prompt: Sequence[int], count: int, **named: Any) -> list[int]:
    cache = engine.new_cache(1, 60)
    return [read(engine, cache, 0, prompt, **named), *decode(engine, cache, count - 1).get(0, [])]


def verify(engine: Any, cache: Any, row: int, newest: int, drafts: Sequence[int]) -> tuple[int, ...]:
    """Verify by one row at a time, as every engine can."""
    length = cache.num_cached_tokens[row]
    segment = Segment(
        row=row, start=length, input_ids=(newest, *drafts), num_logits=1 + len(drafts), is_prompt=False,
        sampling=cache.sampling[row],
    )  # fmt: skip
    return tuple(engine.extend(segment, cache).wait()[row].token_ids)


@pytest.mark.parametrize("num_right", [0, 1, 3])
def test_drafts_are_verified_and_the_row_goes_on_behind_the_right_ones(engine: Any, num_right: int) -> None:
    right = alone(engine, PROMPT, 10)
    cache = engine.new_cache(2, 60)
    assert read(engine, cache, 0) == right[0]
    read(engine, cache, 1, OTHER)
    drafts = [*right[1 : 1 + num_right], *[(right[1 + i] + 1) % 300 for i in range(num_right, 3)]]
    before = cache.num_cached_tokens[0]
    chosen = verify(engine, cache, 0, right[0], drafts)
    assert list(chosen[: num_right + 1]) == right[1 : num_right + 2]
    assert cache.num_cached_tokens[0] == before + 4
    cache.truncate(0, before + num_right + 1, newest=chosen[num_right])
    said = decode(engine, cache, 4)
    assert said[0] == right[num_right + 2 : num_right + 6]
    assert said[1] == alone(engine, OTHER, 5)[1:], "the neighbour is not disturbed"


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_drafts_and_without_are_decoded_together(kind: str, tiny_onnx_artifact: Artifact) -> None:
    engine = make(kind, tiny_onnx_artifact)
    right = [alone(engine, prompt, 12) for prompt in (PROMPT, OTHER)]
    cache = engine.new_cache(3, 60)
    read(engine, cache, 0, OTHER)  # and leaves; a row that is not active is between or before the others
    for row, prompt in ((1, PROMPT), (2, OTHER)):
        read(engine, cache, row, prompt)
    cache.release(0)
    said = {1: [right[0][0]], 2: [right[1][0]]}
    for turn in range(4):
        lengths = list(cache.num_cached_tokens)
        # Of one row two drafts are right, of the other the second of two is wrong or there is none, by turns.
        drafts = {1: [], 2: []}
        for row, others in ((1, right[0]), (2, right[1])):
            at = len(said[row])
            if (row + turn) % 2:
                drafts[row] = others[at : at + 2]
            elif turn % 2:
                drafts[row] = [others[at], (others[at + 1] + 1) % 300]
        chosen = engine.decode(cache, {row: tokens for row, tokens in drafts.items() if tokens}).wait()
        for row, tokens in chosen.items():
            accepted = 0
            while accepted < len(drafts[row]) and tokens.token_ids[accepted] == drafts[row][accepted]:
                accepted += 1
            said[row] += tokens.token_ids[: accepted + 1]
            cache.truncate(row, lengths[row] + accepted + 1, newest=tokens.token_ids[accepted])
        if min(len(one) for one in said.values()) > 8:
            break
    for row, others in ((1, right[0]), (2, right[1])):
        assert said[row] == others[: len(said[row])]
    if "captured" in kind:
        assert cache.steps[3, 3, 0, False].is_captured
        # A step without drafts is another graph.
        decode(engine, cache, 2)
        assert set(cache.steps) == {(3, 3, 0, False), (3, 0, 0, False)}


def test_a_prefix_that_was_copied_is_a_prefix_that_was_read(engine: Any) -> None:
    prefix = num_prefix_tokens(expand_image(PROMPT, len(IMAGE)))
    cache = engine.new_cache(2, 60)
    read(engine, cache, 0)
    cache.copy_prefix(0, 1, prefix)
    assert cache.num_cached_tokens == [prefix + 4, prefix]
    first = read(engine, cache, 1, OTHER, start=prefix)
    said = decode(engine, cache, 5)
    assert [first, *said[1]] == alone(engine, OTHER, 6)
    assert said[0] == alone(engine, PROMPT, 6)[1:]


def test_a_row_that_was_released_keeps_its_prefix_while_others_decode(engine: Any) -> None:
    prefix = num_prefix_tokens(expand_image(PROMPT, len(IMAGE)))
    cache = engine.new_cache(3, 60)
    for row, prompt in enumerate((OTHER, PROMPT, OTHER)):
        read(engine, cache, row, prompt)
    decode(engine, cache, 3)
    cache.release(1)
    cache.truncate(1, prefix)
    decode(engine, cache, 4)
    assert cache.num_cached_tokens[1] == prefix
    first = read(engine, cache, 1, OTHER, start=prefix)
    assert [first, *decode(engine, cache, 3)[1]] == alone(engine, OTHER, 4)


def test_the_most_probable_tokens_are_told_of_the_rows_that_ask(engine: Any) -> None:
    cache = engine.new_cache(2, 60)
    plain = engine.new_cache(2, 60)
    for row, num_top in enumerate((0, 3)):
        read(engine, cache, row, sampling=Sampling(num_top=num_top))
        read(engine, plain, row)
    for _ in range(3):
        told, untold = engine.decode(cache).wait(), engine.decode(plain).wait()
        for row in range(2):
            assert told[row].token_ids == untold[row].token_ids
            assert told[row].logprobs == pytest.approx(untold[row].logprobs, abs=1e-5)
        (top,) = told[1].top
        assert top[0][0] == told[1].token_ids[0]
        assert [logprob for _, logprob in top] == sorted((logprob for _, logprob in top), reverse=True)
        assert np.exp([logprob for _, logprob in top]).sum() <= 1 + 1e-5
        assert untold[1].top == ()
