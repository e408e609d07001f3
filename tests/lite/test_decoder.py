"""The decoder against transformers' Llama, and against itself: cached, chunked, batched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driving import decode_token, newest_of, read_prompt, score_text
from tiny import PROMPTS, VOCAB_SIZE, decoder_folder, features, random_llama, tiny_llama_config

from lite.artifact.open import Artifact, load_artifact
from lite.artifact.parts import CacheDtype
from lite.engines.torch_engine.cache import KVCache
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.engines.torch_engine.load import load_decoder
from lite.errors import MemoryBudgetError

FORMS = {
    "grouped": {},
    "one kv head": {"num_key_value_heads": 1},
    "plain": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "long rope, wide heads": {"head_dim": 32, "rope_theta": 500000.0},
}


def tiny_decoder(out: Path, *, cache_dtype: CacheDtype | None = None) -> LlamaDecoder:
    config = tiny_llama_config(VOCAB_SIZE)
    return load_decoder(decoder_folder(out, config, random_llama(config)), device="cpu", cache_dtype=cache_dtype)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> LlamaDecoder:
    return tiny_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def int8_cached(tmp_path_factory: pytest.TempPathFactory) -> LlamaDecoder:
    """The same with an int8 cache."""
    return tiny_decoder(tmp_path_factory.mktemp("int8-cached"), cache_dtype="int8")


@pytest.mark.parametrize("form", FORMS)
def test_same_logits_and_greedy_tokens_as_transformers(tmp_path: Path, form: str) -> None:
    import transformers

    changes = FORMS[form]
    config = tiny_llama_config(VOCAB_SIZE, **changes)
    weights = random_llama(config)
    ours = load_decoder(decoder_folder(tmp_path, config, weights), device="cpu")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "decoder", dtype=torch.float32).eval()
    image = features(1)[0]
    targets = [33, 44, 55, 66]

    inputs_embeds = ours.embed([*PROMPTS[0], *targets[:-1]], torch.from_numpy(image)).unsqueeze(0)
    with torch.inference_mode():
        expected = theirs(inputs_embeds=inputs_embeds).logits[0, -len(targets) :]
    got = score_text(ours, PROMPTS[0], targets, image)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)

    prompt_embeds = ours.embed(PROMPTS[0], torch.from_numpy(image)).unsqueeze(0)
    generated = theirs.generate(
        inputs_embeds=prompt_embeds,
        attention_mask=torch.ones(prompt_embeds.shape[:2], dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert greedy(ours, PROMPTS[:1], features(1), steps=12)[0] == generated[0].tolist()


def prefill(
    decoder: LlamaDecoder, prompts: list[list[int]], image_features: np.ndarray, cache: KVCache
) -> torch.Tensor:
    """Fill the first rows; return the logits behind each prompt."""
    rows = zip(prompts, image_features, strict=True)
    return torch.cat([read_prompt(decoder, ids, image, cache, row) for row, (ids, image) in enumerate(rows)])


def greedy(
    decoder: LlamaDecoder, prompts: list[list[int]], image_features: np.ndarray, *, steps: int
) -> list[list[int]]:
    cache = decoder.new_cache(len(prompts), 64)
    prefill(decoder, prompts, image_features, cache)
    chosen = [newest_of(cache)]
    while len(chosen) < steps:
        logits = decode_token(decoder, cache)
        chosen.append(newest_of(cache))
        assert chosen[-1] == logits.argmax(-1).tolist()
    return [list(row) for row in zip(*chosen, strict=True)]


def test_an_int8_cache_is_close_to_a_float_one_and_not_the_same(
    decoder: LlamaDecoder, int8_cached: LlamaDecoder
) -> None:
    answer = [33, 44, 55, 66, 77]
    exact, rounded = (score_text(model, PROMPTS[0], answer, features(1)[0]) for model in (decoder, int8_cached))
    # The question sees the film as the cache keeps it, and the text all before it.
    for row in (0, 1, 4):
        assert 0 < float((rounded[row] - exact[row]).abs().max()) < 0.2 * float(exact[row].std())


@pytest.mark.parametrize("chunk", [1, 5, 10])
def test_chunks_of_a_prompt_see_those_before_rounded(
    int8_cached: LlamaDecoder, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, chunked = int8_cached.new_cache(1, 12), int8_cached.new_cache(1, 12)
    expected = read_prompt(int8_cached, PROMPTS[0], features(1)[0], whole, at_once=True)
    monkeypatch.setattr(int8_cached, "chunk_size", chunk)
    got = read_prompt(int8_cached, PROMPTS[0], features(1)[0], chunked)
    assert 0 < float((got - expected).abs().max()) < 0.2 * float(expected.std())
    # What the first layer stores depends on nothing before.
    for ours, its in ((chunked.k_cache, whole.k_cache), (chunked.v_cache, whole.v_cache)):
        assert int((ours[0].int() - its[0].int()).abs().max()) <= 1
        assert bool(its[0, :, :, :11].any(-1).all())


def test_tokens_that_were_handed_over_do_not_change(decoder: LlamaDecoder) -> None:
    """They are looked at when the next step has been computed already."""
    cache = decoder.new_cache(1, 40)
    read_prompt(decoder, PROMPTS[0], features(1)[0], cache)
    for _ in range(5):
        decoder.decode(cache)
    assert [chosen.wait()[0].token_ids[0] for chosen in cache.chosen] == [
        *greedy(decoder, PROMPTS[:1], features(1), steps=6)[0]
    ]


def test_what_an_int8_cache_reads_is_what_was_written(decoder: LlamaDecoder, int8_cached: LlamaDecoder) -> None:
    exact, rounded = decoder.new_cache(1, 12), int8_cached.new_cache(1, 12)
    for model, cache in ((decoder, exact), (int8_cached, rounded)):
        read_prompt(model, PROMPTS[0], features(1)[0], cache)
    first = slice(0, 1)
    for stored, read in zip(exact.layer(0, first)[:2], rounded.layer(0, first).read(11, torch.float32), strict=True):
        steps = stored[:, :, :11].abs().amax(-1, keepdim=True) / 127
        # Half a step, and the scale's own rounding to float16.
        assert bool(((read - stored[:, :, :11]).abs() <= steps * (0.5 + 127 * 2**-11)).all())


def test_a_cache_made_in_inference_mode_can_be_used_outside(decoder: LlamaDecoder) -> None:
    with torch.inference_mode():
        cache = decoder.new_cache(1, 40)
    assert not any(tensor.is_inference() for tensor in (cache.k_cache, cache.position_ids, cache.told))
    read_prompt(decoder, PROMPTS[0], features(1)[0], cache)
    cache.release(0)


@pytest.mark.parametrize(
    ("error", "is_ours"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronous", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_cuda_says_in_many_ways_that_it_is_full(
    decoder: LlamaDecoder, error: str, *, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError(error)

    monkeypatch.setattr("lite.engines.torch_engine.decoder.KVCache", fail)
    with pytest.raises(MemoryBudgetError if is_ours else RuntimeError, match=re.escape(error.partition("\n")[0])):
        decoder.new_cache(1, 40)


@pytest.mark.parametrize("what", ["the cache", "a prompt", "a token", "a text", "the features of a film"])
def test_a_full_gpu_is_an_error_of_ours(decoder: LlamaDecoder, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to do, and the batch is halved (see `lite.session.loop`)."""
    cache, image = decoder.new_cache(1, 40), features(1)[0]
    read_prompt(decoder, PROMPTS[0], image, cache)
    runs = {
        "the cache": lambda: decoder.new_cache(1, 40),
        "a prompt": lambda: read_prompt(decoder, PROMPTS[0], image, cache),
        "a token": lambda: decode_token(decoder, cache),
        "a text": lambda: score_text(decoder, PROMPTS[0], [33], image),
        "the features of a film": lambda: decoder.image_buffer(5),
    }

    def out_of_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    places = {"the cache": "lite.engines.torch_engine.decoder.KVCache", "the features of a film": "torch.empty"}
    monkeypatch.setattr(places.get(what, "lite.engines.torch_engine.decoder.LlamaDecoder._layers"), out_of_memory)
    with pytest.raises(MemoryBudgetError, match=rf"got no memory for {what} \(CUDA out of memory.* 2.00 GiB\.\) · exp"):
        runs[what]()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_gpu_matches_cpu(tiny_artifact: Artifact) -> None:
    image = features(3)
    on_cpu = load_decoder(load_artifact(tiny_artifact.path), device="cpu")
    on_gpu = load_decoder(load_artifact(tiny_artifact.path), device="cuda")
    assert on_gpu.dtype == torch.float16
    caches = [decoder.new_cache(3, 40) for decoder in (on_cpu, on_gpu)]
    expected, got = (prefill(d, PROMPTS, image, cache) for d, cache in zip((on_cpu, on_gpu), caches, strict=True))
    torch.testing.assert_close(got.cpu().float(), expected, atol=0.1, rtol=0.05)
    in_float32 = load_decoder(load_artifact(tiny_artifact.path), device="cuda", dtype="float32")
    assert greedy(in_float32, PROMPTS, image, steps=12) == greedy(on_cpu, PROMPTS, image, steps=12)
