"""The engines' verb: drafted tokens verified, rows cut back, prefixes copied; the same of both engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recording import record
from tiny import features

from lite.artifact.open import Artifact, load_artifact
from lite.config import IMAGE_TOKEN_ID
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.protocol import Sampling, Segment
from lite.engines.segments import divide, expand_image, num_prefix_tokens
from lite.engines.torch_engine.load import load_decoder

PROMPT = [1, 15, IMAGE_TOKEN_ID, 60, 61, 62, 9]
OTHER = [1, 15, IMAGE_TOKEN_ID, 70, 71]
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
    return make(request.param, load_artifact(Path(tiny_onnx_artifact.path)))


IMAGE = features(1)[0]


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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("torch")])
def test_torch_verifies_all_rows_in_one_step(kind: str, tiny_onnx_artifact: Artifact) -> None:
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
        # Two drafts a row: of one both are right, of the other the second is wrong, by turns.
        drafts = {}
        for row, others in ((1, right[0]), (2, right[1])):
            at = len(said[row])
            drafts[row] = [others[at], others[at + 1] if (row + turn) % 2 else (others[at + 1] + 1) % 300]
        chosen = engine.verify(drafts, cache).wait()
        for row, tokens in chosen.items():
            accepted = 0
            while accepted < 2 and tokens.token_ids[accepted] == drafts[row][accepted]:
                accepted += 1
            said[row] += tokens.token_ids[: accepted + 1]
            cache.truncate(row, lengths[row] + accepted + 1, newest=tokens.token_ids[accepted])
        if min(len(one) for one in said.values()) > 8:
            break
    for row, others in ((1, right[0]), (2, right[1])):
        assert said[row] == others[: len(said[row])]
    if "captured" in kind:
        assert cache.steps[3, 2, 0].is_captured
        # A step without drafts is another graph.
        decode(engine, cache, 2)
        assert set(cache.steps) == {(3, 2, 0), (3, 0, 0)}


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
