"""The decoder against transformers' Llama, and against itself: cached, chunked, batched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driving import NOT_FINITE, decode_token, newest_of, read_prompt, score_text
from tiny import (
    PROMPTS,
    VOCAB_SIZE,
    decoder_folder,
    features,
    random_llama,
    tiny_llama_config,
)

from kernels.reference import attention
from lite.artifact.open import Artifact, load_artifact
from lite.artifact.parts import CacheDtype
from lite.config import IMAGE_TOKEN_ID
from lite.engines.torch_engine.cache import KVCache
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.engines.torch_engine.device import check_device
from lite.engines.torch_engine.linear import linears_of
from lite.engines.torch_engine.load import load_decoder
from lite.errors import ArtifactError, BackendUnavailable, ContextLengthError, LiteError, MemoryBudgetError

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


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_cached_decoding_is_uncached_scoring(
    decoder: LlamaDecoder, int8_cached: LlamaDecoder, cache_dtype: str | None
) -> None:
    """With an int8 cache the scored tokens see each other rounded, as if each had been decoded."""
    decoder = decoder if cache_dtype is None else int8_cached
    image = features(1)[0]
    cache = decoder.new_cache(1, 40)
    token_ids = [33, 44, 55, 66, 77]
    steps = [read_prompt(decoder, PROMPTS[0], image, cache)]
    steps += [decode_token(decoder, cache, [token_id]) for token_id in token_ids[:-1]]
    torch.testing.assert_close(
        torch.cat(steps), score_text(decoder, PROMPTS[0], token_ids, image), atol=1e-4, rtol=1e-4
    )
    assert cache.num_cached_tokens == [11 + 4]
    assert cache.position_ids.tolist() == [11 + 4]


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@pytest.mark.parametrize("chunk", [1, 2, 5, 7])
def test_scoring_in_chunks_is_scoring_at_once(
    decoder: LlamaDecoder,
    int8_cached: LlamaDecoder,
    cache_dtype: str | None,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With an int8 cache of the answer only: a prompt's later chunks see its earlier ones as the cache keeps them."""
    chosen = decoder if cache_dtype is None else int8_cached
    answer = [33, 44, 55, 66, 77, 88, 99, 111]
    prompt = PROMPTS[0] if cache_dtype is None else [IMAGE_TOKEN_ID]
    image = features(1)[0] if cache_dtype is None else features(1)[0][:1]
    expected = score_text(chosen, prompt, answer, image)
    monkeypatch.setattr(chosen, "chunk_size", chunk)
    torch.testing.assert_close(score_text(chosen, prompt, answer, image), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 100])
def test_chunked_prefill_is_whole_prefill(decoder: LlamaDecoder, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = features(3)
    whole, chunked = decoder.new_cache(3, 40), decoder.new_cache(3, 40)
    assert decoder.chunk_size > 19
    expected = prefill(decoder, PROMPTS, image, whole)
    monkeypatch.setattr(decoder, "chunk_size", chunk)
    got = prefill(decoder, PROMPTS, image, chunked)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert chunked.num_cached_tokens == whole.num_cached_tokens == [11, 7, 19]
    for row, length in enumerate(whole.num_cached_tokens):
        torch.testing.assert_close(
            chunked.k_cache[:, row, :, :length], whole.k_cache[:, row, :, :length], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_a_batch_of_different_lengths_is_each_one_alone(
    decoder: LlamaDecoder, int8_cached: LlamaDecoder, cache_dtype: str | None
) -> None:
    decoder = decoder if cache_dtype is None else int8_cached
    image = features(3)
    together = greedy(decoder, PROMPTS, image, steps=15)
    alone = [greedy(decoder, [prompt], image[i : i + 1], steps=15)[0] for i, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert len({tuple(row) for row in alone}) == 3, "rows that all say the same would prove nothing"


def test_stale_slots_do_not_matter(decoder: LlamaDecoder) -> None:
    """What an earlier study has left behind, in a row that is free or behind a prompt."""
    image = features(3)
    clean, dirty = decoder.new_cache(4, 40), decoder.new_cache(4, 40)
    dirty.k_cache.fill_(1e4)
    dirty.v_cache.fill_(1e4)
    for cache in (clean, dirty):
        prefill(decoder, PROMPTS, image, cache)
        cache.release(1)
    expected = decode_token(decoder, clean, [3, 4, 5, 6])
    got = decode_token(decoder, dirty, [3, 4, 5, 6])
    torch.testing.assert_close(got[[0, 2]], expected[[0, 2]])


def test_a_free_row_does_not_grow_and_does_not_disturb_the_others(decoder: LlamaDecoder) -> None:
    image = features(2)
    # The first row fills its slots to the last: it must not ask for another one.
    cache, alone = decoder.new_cache(2, 11), decoder.new_cache(1, 40)
    prefill(decoder, PROMPTS[:2], image, cache)
    read_prompt(decoder, PROMPTS[1], image[1], alone)
    cache.release(0)
    before = cache.k_cache[:, 0].clone()
    for token_id in (21, 22, 23):
        got = decode_token(decoder, cache, [0, token_id])
        torch.testing.assert_close(got[1:], decode_token(decoder, alone, [token_id]), atol=1e-4, rtol=1e-4)
    assert cache.num_cached_tokens == [11, 7 + 3], "it keeps what it holds"
    assert cache.position_ids.tolist() == [-1, 7 + 3]
    assert torch.equal(cache.k_cache[:, 0], before)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_a_study_in_a_row_that_was_used_is_that_study_alone(
    decoder: LlamaDecoder, int8_cached: LlamaDecoder, cache_dtype: str | None
) -> None:
    """Rows begin and end when they like, and the ones beside them go on."""
    decoder = decoder if cache_dtype is None else int8_cached
    image = features(3)
    first, second, third = (greedy(decoder, [ids], image[i : i + 1], steps=9)[0] for i, ids in enumerate(PROMPTS))
    cache = decoder.new_cache(2, 40)
    said: dict[int, list[int]] = {0: [], 1: []}

    def decode(steps: int, *rows: int) -> None:
        for _ in range(steps):
            decode_token(decoder, cache)
            for row in rows:
                said[row].append(newest_of(cache)[row])

    # The longest first, so that what it leaves behind lies behind the prompt of the next.
    read_prompt(decoder, PROMPTS[2], image[2], cache, 0)
    decode(2, 0)
    read_prompt(decoder, PROMPTS[0], image[0], cache, 1)
    decode(3, 0, 1)
    assert said == {0: third[1:6], 1: first[1:4]}
    cache.release(0)
    decode(2, 1)
    read_prompt(decoder, PROMPTS[1], image[1], cache, 0)
    said[0].clear()
    decode(3, 0, 1)
    assert said == {0: second[1:4], 1: first[1:9]}


def test_fewer_rows_are_decoded_where_the_last_are_free(decoder: LlamaDecoder) -> None:
    cache = decoder.new_cache(4, 40)
    prefill(decoder, PROMPTS, features(3), cache)
    assert len(decode_token(decoder, cache)) == 3
    cache.release(2)
    cache.release(0)
    assert len(decode_token(decoder, cache)) == 2
    assert cache.num_cached_tokens == [12, 9, 20, 0]


def test_the_layer_attends_as_the_reference_says(decoder: LlamaDecoder) -> None:
    """The decoder calls torch's attention; the reference is the specification."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, 9, 16, generator=generator)
    position_ids = torch.tensor([[2, 3, 4], [6, 7, 8]])
    mask = torch.arange(9) <= position_ids[:, None, :, None]
    got = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(got, attention(q, k, v, position_ids), atol=1e-5, rtol=1e-5)


def test_cache_counts_its_bytes(decoder: LlamaDecoder) -> None:
    cache = decoder.new_cache(3, 40)
    layers, kv_heads, head_dim, float32 = 2, 2, 16, 4
    assert cache.nbytes == 2 * layers * 3 * kv_heads * 40 * head_dim * float32
    assert (cache.num_rows, cache.max_seq_len) == (3, 40)


def test_an_int8_cache_counts_a_byte_a_number_and_two_a_vector(int8_cached: LlamaDecoder) -> None:
    cache = int8_cached.new_cache(3, 40)
    vectors = 2 * 2 * 3 * 2 * 40  # keys and values, layers, rows, kv_heads, slots
    assert cache.nbytes == vectors * (16 + 2)
    held = (cache.k_cache, cache.v_cache, cache.k_scales, cache.v_scales)
    assert cache.nbytes == sum(tensor.nbytes for tensor in held if tensor is not None)
    assert cache.k_cache.dtype == torch.int8
    assert int8_cached.cache_dtype == "int8"


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


def test_a_cache_that_is_too_short_is_refused(decoder: LlamaDecoder) -> None:
    cache = decoder.new_cache(3, 18)
    with pytest.raises(ContextLengthError, match=r"position 19 .* 18"):
        read_prompt(decoder, PROMPTS[2], features(1)[0], cache, 2)
    assert cache.num_cached_tokens == [0, 0, 11]
    assert not any(cache.is_active)
    short = decoder.new_cache(1, 12)
    read_prompt(decoder, PROMPTS[0], features(1)[0], short)
    decode_token(decoder, short)
    with pytest.raises(ContextLengthError, match=r"position 13 .* 12"):
        decode_token(decoder, short)


def test_overflow_is_seen_and_no_garbage(tmp_path: Path) -> None:
    """The most probable of NaNs would be a token all the same: the host is told that there is none."""
    overflowing = tiny_decoder(tmp_path)
    down = overflowing.model.layers[1].mlp.down_proj
    down.weights = (torch.full_like(down.weights[0], float("inf")),)
    cache = overflowing.new_cache(1, 40)
    read_prompt(overflowing, PROMPTS[0], features(1)[0], cache)
    assert newest_of(cache) == [NOT_FINITE]
    assert overflowing.overflow.startswith("got logits that are not finite in torch.float32 · expected numbers")
    with pytest.raises(LiteError, match="not finite in torch.float32"):
        score_text(overflowing, PROMPTS[0], [33, 44], features(1)[0])


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_overflow_after_the_first_token_is_of_its_row_only(tmp_path: Path, cache_dtype: CacheDtype | None) -> None:
    overflowing = tiny_decoder(tmp_path, cache_dtype=cache_dtype)
    cache, alone = overflowing.new_cache(2, 40), overflowing.new_cache(1, 40)
    image = features(3)
    prefill(overflowing, PROMPTS[:2], image[:2], cache)
    assert NOT_FINITE not in newest_of(cache)
    read_prompt(overflowing, PROMPTS[0], image[0], alone)
    overflowing.model.embed_tokens.weight[55] = float("nan")
    for token_ids in ([33, 44], [44, 55], [66, 3]):
        got, expected = (
            decode_token(overflowing, cache, token_ids),
            decode_token(overflowing, alone, token_ids[:1]),
        )
        torch.testing.assert_close(got[:1], expected, atol=1e-4, rtol=1e-4)
    newest = newest_of(cache)
    assert newest == [*newest_of(alone), NOT_FINITE]
    assert newest[0] != NOT_FINITE
    # A study that begins where the NaNs are, its prompt shorter, says what it says elsewhere.
    kept = (cache.k_cache, cache.v_cache, cache.k_scales, cache.v_scales)
    assert not all(bool(tensor[:, 1].isfinite().all()) for tensor in kept if tensor is not None)
    cache.release(1, damaged=True)
    assert all(not bool(tensor[:, 1].any()) for tensor in kept if tensor is not None)
    assert all(bool(tensor[:, 0].any()) for tensor in kept if tensor is not None)
    read_prompt(overflowing, PROMPTS[1], image[1], cache, 1)
    elsewhere = overflowing.new_cache(1, 40)
    read_prompt(overflowing, PROMPTS[1], image[1], elsewhere)
    for token_id in (7, 8):
        got = decode_token(overflowing, cache, [5, token_id])[1:]
        torch.testing.assert_close(got, decode_token(overflowing, elsewhere, [token_id]), atol=1e-4, rtol=1e-4)


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
    """It says what to do, and the batch is halved (see `lite.session.generate`)."""
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


def test_dtype_is_float32_on_the_cpu_unless_asked_otherwise(tmp_path: Path) -> None:
    config = tiny_llama_config(VOCAB_SIZE)
    artifact = decoder_folder(tmp_path, config, random_llama(config))
    assert load_decoder(artifact, device="cpu").dtype == torch.float32
    half = load_decoder(artifact, device="cpu", dtype="float16")
    assert half.dtype == half.new_cache(1, 4).k_cache.dtype == torch.float16
    single = load_decoder(artifact, device="cpu")
    got, expected = (score_text(d, PROMPTS[0], [5, 6], features(1)[0]) for d in (half, single))
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0.1)


def test_shards_are_one_file(tmp_path: Path, decoder: LlamaDecoder) -> None:
    config = tiny_llama_config(VOCAB_SIZE)
    sharded = load_decoder(decoder_folder(tmp_path, config, random_llama(config), shards=3), device="cpu")
    for name, weight in decoder.state_dict().items():
        assert torch.equal(sharded.state_dict()[name], weight), name
    linears = linears_of(sharded)
    assert len(linears) == 4 * 2 + 1
    for name, linear in linears_of(decoder).items():
        for got, expected in zip(linears[name].weights, linear.weights, strict=True):
            assert isinstance(got, torch.Tensor)
            assert torch.equal(got, expected), name


def test_a_shard_the_manifest_does_not_list_is_not_opened(tmp_path: Path) -> None:
    config = tiny_llama_config(VOCAB_SIZE)
    artifact = decoder_folder(tmp_path, config, random_llama(config), shards=3)
    del artifact.manifest.parts.decoder.files["decoder/model-00002-of-00003.safetensors"]
    with pytest.raises(ArtifactError, match="does not list decoder/model-00002"):
        load_decoder(artifact, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
            r"no tensor model\.layers\.1\.mlp\.up_proj \(1 missing\)",
        ),
        (lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}), "unknown tensor model.layers.2"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(63)}), r"model\.norm\.weight of shape \[63\] .* \[64\]"),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path: Path, change: Any, message: str) -> None:
    config = tiny_llama_config(VOCAB_SIZE)
    weights = random_llama(config)
    change(weights)
    with pytest.raises(ArtifactError, match=message):
        load_decoder(decoder_folder(tmp_path, config, weights), device="cpu")


def test_damaged_safetensors(tmp_path: Path) -> None:
    config = tiny_llama_config(VOCAB_SIZE)
    artifact = decoder_folder(tmp_path, config, random_llama(config))
    (tmp_path / "decoder" / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ArtifactError, match=r"model\.safetensors: got something unreadable"):
        load_decoder(artifact, device="cpu")


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config of quant_method='awq'"),
        ({"quantization_config": "gptq"}, "quantization_config='gptq' · expected an object"),
        ({"quantization_config": GPTQ | {"bits": 3}}, "bits=3,.* expected GPTQ v1"),
        ({"quantization_config": GPTQ | {"desc_act": True}}, "desc_act=True"),
        ({"quantization_config": GPTQ | {"sym": False}}, "sym=False"),
        ({"quantization_config": GPTQ | {"checkpoint_format": "gptq_v2"}}, "checkpoint_format='gptq_v2'"),
        ({"quantization_config": GPTQ | {"group_size": 0}}, "group_size=0"),
        ({"quantization_config": GPTQ | {"lm_head": True, "dynamic": {"lm_head": {"bits": 3}}}}, "quantization_config"),
        ({"quantization_config": BNB | {"bnb_4bit_quant_type": "fp4"}}, "bnb_4bit_quant_type='fp4'"),
        ({"quantization_config": BNB | {"load_in_8bit": True}}, "quant_method='bitsandbytes'"),
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type='llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling.rope_type='linear'",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' · expected an object"),
        ({"rope_parameters": ["linear"]}, r"rope_parameters=\['linear'\] · expected an object"),
        ({"head_dim": 15}, "head_dim=15 · expected an even number"),
        ({"hidden_size": 60, "head_dim": None}, "head_dim=15 · expected an even number"),
        ({"num_key_value_heads": 3}, "4 attention heads over 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads=0"),
        ({"torch_dtype": "float64"}, "dtype: got 'float64'"),
        ({"hidden_size": "64", "head_dim": None}, "hidden_size: got '64' · expected int"),
        ({"vocab_size": None}, "no key 'vocab_size'"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    artifact = decoder_folder(tmp_path, tiny_llama_config(VOCAB_SIZE) | changes, {"x": torch.zeros(1)})
    with pytest.raises(ArtifactError, match=message):
        load_decoder(artifact, device="cpu")


def test_a_config_that_nests_without_end(tmp_path: Path) -> None:
    artifact = decoder_folder(tmp_path, {}, {"x": torch.zeros(1)})
    artifact.file("decoder/config.json").write_text('{"a": ' * 200_000)
    with pytest.raises(ArtifactError, match=r"config\.json: got something unreadable"):
        load_decoder(artifact, device="cpu")


def test_transformers_5_config_is_read(tmp_path: Path) -> None:
    config = tiny_llama_config(VOCAB_SIZE)
    del config["rope_theta"], config["torch_dtype"]
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}, "dtype": "float16", "new_key": 1}
    read = decoder_folder(tmp_path, config, {"x": torch.zeros(1)}).decoder_config()
    assert (read.rope_theta, read.dtype) == (1234.0, "float16")


def test_devices() -> None:
    assert check_device("cpu") == "cpu"
    assert check_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(BackendUnavailable, match="'cuda:99'"):
        check_device("cuda:99")
    for wrong in ("tpu9", "meta", "gpu"):
        with pytest.raises(BackendUnavailable, match=f"got device '{wrong}'"):
            check_device(wrong)


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
