"""When a step is captured, and that a decoder on replay computes what it does without; recorded in place of a GPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from driving import decode_token, newest_of, read_prompt
from recording import record
from tiny import PROMPTS, VOCAB_SIZE, decoder_folder, features, random_llama, tiny_llama_config

from lite.artifact.open import Artifact
from lite.config import IMAGE_TOKEN_ID
from lite.engines.torch_engine.cuda_graph import GraphedStep
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.engines.torch_engine.load import load_decoder

CACHES = pytest.mark.parametrize("cache_dtype", [None, "int8"])


# The step by itself.


class Counted:
    """A step that counts how often Python runs it, and a capture that counts how often it is asked."""

    def __init__(self) -> None:
        self.runs = 0
        self.captures = 0
        self.out = torch.zeros(1)

    def step(self) -> torch.Tensor:
        self.runs += 1
        return self.out.add_(1)

    def capture(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.captures += 1
        assert self.runs == 1, "Triton compiles in the first run, and cuBLAS makes its handles"
        return record(step)


def test_the_first_run_is_ordinary_the_second_is_captured_and_then_replayed() -> None:
    counted = Counted()
    graphed = GraphedStep(counted.step, counted.capture)
    seen = []
    for _ in range(4):
        out = graphed()
        seen.append((float(out), counted.runs, counted.captures, graphed.is_captured))
    # `record` runs Python once more, and puts back what that has written.
    assert seen == [(1.0, 1, 0, False), (2.0, 2, 1, True), (3.0, 2, 1, True), (4.0, 2, 1, True)]
    assert graphed.problem is None


def test_without_a_capture_every_run_is_ordinary() -> None:
    counted = Counted()
    graphed = GraphedStep(counted.step, None)
    assert [float(graphed()) for _ in range(3)] == [1.0, 2.0, 3.0]
    assert (counted.runs, graphed.is_captured, graphed.problem) == (3, False, None)


@pytest.mark.parametrize(
    ("message", "problem"),
    [("operation not permitted\nwhen stream is capturing", "operation not permitted"), ("", "RuntimeError")],
)
def test_a_capture_that_fails_leaves_the_ordinary_way_and_says_why(message: str, problem: str) -> None:
    counted, tried = Counted(), []

    def capture(step: Callable[[], torch.Tensor]) -> Any:
        tried.append(step)
        raise RuntimeError(message)

    graphed = GraphedStep(counted.step, capture)
    assert [float(graphed()) for _ in range(4)] == [1.0, 2.0, 3.0, 4.0]
    assert (graphed.is_captured, graphed.problem) == (False, problem)
    assert len(tried) == 1, "it is not tried again and again"


def test_of_a_capture_that_fails_the_first_error_is_told() -> None:
    """As torch ends a capture after an error it raises another one, which only says that there was one."""

    def capture(step: Callable[[], torch.Tensor]) -> Any:
        try:
            raise RuntimeError("Cannot copy between CPU and CUDA tensors")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    graphed = GraphedStep(Counted().step, capture)
    for _ in range(2):
        graphed()
    assert graphed.problem == "Cannot copy between CPU and CUDA tensors"


def test_a_bug_in_a_step_is_not_taken_for_a_capture_that_fails() -> None:
    def capture(step: Callable[[], torch.Tensor]) -> Any:
        raise TypeError("a bug")

    graphed = GraphedStep(Counted().step, capture)
    graphed()
    with pytest.raises(TypeError, match="a bug"):
        graphed()


# In the decoder.


class Watched:
    """A capture that says how many steps it has captured, and how often each was replayed."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def __call__(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        recorded, at = record(step), len(self.replays)
        self.replays.append(0)

        def replay() -> torch.Tensor:
            self.replays[at] += 1
            return recorded()

        return replay


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    config = tiny_llama_config(VOCAB_SIZE)
    return decoder_folder(tmp_path_factory.mktemp("graphed"), config, random_llama(config))


def captured(artifact: Artifact, **named: Any) -> tuple[LlamaDecoder, Watched]:
    decoder, watched = load_decoder(artifact, device="cpu", **named), Watched()
    decoder.capture = watched
    return decoder, watched


ANOTHER = [1, 77, 78, IMAGE_TOKEN_ID, 79]
STUDIES = [*zip(PROMPTS, features(3), strict=True), (ANOTHER, features(1, seed=8)[0])]


def alone(decoder: LlamaDecoder, study: int, count: int) -> list[int]:
    cache = decoder.new_cache(1, 40)
    read_prompt(decoder, *STUDIES[study], cache)
    chosen = [newest_of(cache)[0]]
    while len(chosen) < count:
        decode_token(decoder, cache)
        chosen += newest_of(cache)
    return chosen


def test_rows_are_decoded_by_powers_of_two_or_all(artifact: Artifact) -> None:
    decoder, _ = captured(artifact)
    cache = decoder.new_cache(6, 40)
    found = []
    for row in range(6):
        read_prompt(decoder, *STUDIES[1], cache, row)
        found.append(len(decode_token(decoder, cache)))
    assert found == [1, 2, 4, 4, 6, 6]
    assert sorted(cache.steps) == [(rows, 0, 0, False) for rows in (1, 2, 4, 6)]


def test_a_capture_that_fails_is_seen_and_the_text_is_the_same(artifact: Artifact) -> None:
    decoder = load_decoder(artifact, device="cpu")
    expected = alone(decoder, 0, 6)
    assert decoder.fallbacks == ()

    def capture(step: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    decoder.capture = capture
    assert alone(decoder, 0, 6) == expected
    assert decoder.fallbacks == ("no CUDA graph: CUDA error: operation not permitted when stream is capturing",)


@pytest.mark.parametrize("kept", ["decoder", "cache"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_step_keeps_neither_the_decoder_nor_its_cache(artifact: Artifact, num_steps: int, kept: str) -> None:
    """They would keep each other until the garbage is collected, and with them most of a GPU's memory."""
    decoder, watched = captured(artifact)
    cache = decoder.new_cache(1, 40)
    read_prompt(decoder, *STUDIES[0], cache)
    for _ in range(num_steps):
        decode_token(decoder, cache)
    assert watched.replays == [2][: num_steps - 1]
    decoder._idle = cache  # as on a GPU, where it waits for the next request
    gc.disable()
    try:
        gone = weakref.ref(decoder if kept == "decoder" else cache)
        if kept == "cache":
            del decoder._idle
        del decoder, cache
        assert gone() is None
    finally:
        gc.enable()
