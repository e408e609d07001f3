"""The decoder against transformers' Llama, and against itself: cached, chunked, batched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HIDDEN_SIZE, random_llama, tiny_llama_config, tiny_manifest
from safetensors.torch import save_file

from kernels.reference import attention
from lite.artifact import Artifact, FileRecord, load_artifact
from lite.config import IMAGE_TOKEN_ID
from lite.decoder import LlamaDecoder, check_device, load_decoder
from lite.errors import ArtifactError, BackendUnavailable, ContextLengthError, LiteError

VOCAB_SIZE = 300
FORMS = {
    "grouped": {},
    "one kv head": {"num_key_value_heads": 1},
    "plain": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "long rope, wide heads": {"head_dim": 32, "rope_theta": 500000.0},
}


def decoder_folder(out: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], *, shards: int = 1) -> Artifact:
    """Write only a decoder; wrap it as an artifact whose other files nobody opens."""
    folder = out / "decoder"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    files = ["decoder/config.json"]
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        files.append("decoder/model.safetensors")
    else:
        weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
        for shard in sorted(set(weight_map.values())):
            save_file({name: weights[name] for name in names if weight_map[name] == shard}, folder / shard)
            files.append(f"decoder/{shard}")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        files.append("decoder/model.safetensors.index.json")
    manifest = tiny_manifest(files={name: FileRecord(bytes=0, sha256="0" * 64) for name in files})
    return Artifact(path=out, manifest=manifest, id="0" * 16)


def tiny_decoder(out: Path, **changes: Any) -> LlamaDecoder:
    config = tiny_llama_config(VOCAB_SIZE, **changes)
    return load_decoder(decoder_folder(out, config, random_llama(config)), device="cpu")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> LlamaDecoder:
    return tiny_decoder(tmp_path_factory.mktemp("decoder"))


def features(rows: int, *, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 5, HIDDEN_SIZE), dtype=np.float32)


PROMPTS = [
    [1, 20, 30, IMAGE_TOKEN_ID, 40, 50, 60],
    [1, IMAGE_TOKEN_ID, 41],
    [1, 9, 8, 7, 6, 5, IMAGE_TOKEN_ID, 12, 13, 14, 15, 16, 17, 18, 19],
]


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
    got = ours.score(PROMPTS[0], targets, image)
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


def greedy(
    decoder: LlamaDecoder, prompts: list[list[int]], image_features: np.ndarray, *, steps: int, chunk: int | None = None
) -> list[list[int]]:
    cache = decoder.new_cache(len(prompts), 64)
    logits = decoder.prefill(prompts, image_features, cache, chunk_size=chunk)
    chosen = [logits.argmax(-1).tolist()]
    while len(chosen) < steps:
        chosen.append(decoder.decode_one_token(chosen[-1], cache).argmax(-1).tolist())
    return [list(row) for row in zip(*chosen, strict=True)]


def test_cached_decoding_is_uncached_scoring(decoder: LlamaDecoder) -> None:
    image = features(1)
    cache = decoder.new_cache(1, 40)
    token_ids = [33, 44, 55, 66, 77]
    steps = [decoder.prefill(PROMPTS[:1], image, cache)]
    steps += [decoder.decode_one_token([token_id], cache) for token_id in token_ids[:-1]]
    torch.testing.assert_close(torch.cat(steps), decoder.score(PROMPTS[0], token_ids, image[0]), atol=1e-4, rtol=1e-4)
    assert cache.num_cached_tokens == [11 + 4]


@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 100])
def test_chunked_prefill_is_whole_prefill(decoder: LlamaDecoder, chunk: int) -> None:
    image = features(3)
    whole, chunked = decoder.new_cache(3, 40), decoder.new_cache(3, 40)
    expected = decoder.prefill(PROMPTS, image, whole)
    got = decoder.prefill(PROMPTS, image, chunked, chunk_size=chunk)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert chunked.num_cached_tokens == whole.num_cached_tokens == [11, 7, 19]
    for row, length in enumerate(whole.num_cached_tokens):
        torch.testing.assert_close(
            chunked.k_cache[:, row, :, :length], whole.k_cache[:, row, :, :length], atol=1e-4, rtol=1e-4
        )


def test_a_batch_of_different_lengths_is_each_one_alone(decoder: LlamaDecoder) -> None:
    image = features(3)
    together = greedy(decoder, PROMPTS, image, steps=15)
    alone = [greedy(decoder, [prompt], image[i : i + 1], steps=15)[0] for i, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert len({tuple(row) for row in alone}) == 3, "rows that all say the same would prove nothing"


def test_padding_and_stale_slots_do_not_matter(decoder: LlamaDecoder) -> None:
    image = features(3)
    clean, dirty = decoder.new_cache(3, 40), decoder.new_cache(3, 40)
    dirty.k_cache.fill_(1e4)
    dirty.v_cache.fill_(1e4)
    for cache in (clean, dirty):
        decoder.prefill(PROMPTS, image, cache)
    expected = decoder.decode_one_token([3, 4, 5], clean)
    torch.testing.assert_close(decoder.decode_one_token([3, 4, 5], dirty), expected)


def test_a_row_that_has_ended_does_not_grow_and_does_not_disturb_the_others(decoder: LlamaDecoder) -> None:
    image = features(2)
    # The first row fills its slots to the last: it must not ask for another one.
    cache, alone = decoder.new_cache(2, 11), decoder.new_cache(1, 40)
    decoder.prefill(PROMPTS[:2], image, cache)
    decoder.prefill(PROMPTS[1:2], image[1:], alone)
    for token_id in (21, 22, 23):
        got = decoder.decode_one_token([0, token_id], cache, [False, True])
        torch.testing.assert_close(got[1:], decoder.decode_one_token([token_id], alone), atol=1e-4, rtol=1e-4)
    assert cache.num_cached_tokens == [11, 7 + 3]


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
    assert (cache.batch_size, cache.max_seq_len) == (3, 40)


def test_a_cache_that_is_too_short_is_refused(decoder: LlamaDecoder) -> None:
    with pytest.raises(ContextLengthError, match=r"position 19 .* 18"):
        decoder.prefill(PROMPTS, features(3), decoder.new_cache(3, 18))


def test_overflow_is_an_error_and_not_garbage(tmp_path: Path) -> None:
    overflowing = tiny_decoder(tmp_path)
    overflowing.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(LiteError, match="not finite"):
        overflowing.prefill(PROMPTS[:1], features(1), overflowing.new_cache(1, 40))
    with pytest.raises(LiteError, match="not finite"):
        overflowing.score(PROMPTS[0], [33, 44], features(1)[0])


def test_overflow_after_the_first_token_is_an_error_too(tmp_path: Path) -> None:
    overflowing = tiny_decoder(tmp_path)
    cache = overflowing.new_cache(2, 40)
    overflowing.prefill(PROMPTS[:2], features(2), cache)
    overflowing.decode_one_token([33, 44], cache)
    overflowing.model.embed_tokens.weight[55] = float("nan")
    with pytest.raises(LiteError, match="not finite in torch.float32"):
        overflowing.decode_one_token([44, 55], cache)


def test_dtype_is_float32_on_the_cpu_unless_asked_otherwise(tmp_path: Path) -> None:
    config = tiny_llama_config(VOCAB_SIZE)
    artifact = decoder_folder(tmp_path, config, random_llama(config))
    assert load_decoder(artifact, device="cpu").dtype == torch.float32
    half = load_decoder(artifact, device="cpu", dtype="float16")
    assert half.dtype == half.new_cache(1, 4).k_cache.dtype == torch.float16
    single = load_decoder(artifact, device="cpu")
    got, expected = (d.score(PROMPTS[0], [5, 6], features(1)[0]) for d in (half, single))
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0.1)


def test_shards_are_one_file(tmp_path: Path, decoder: LlamaDecoder) -> None:
    config = tiny_llama_config(VOCAB_SIZE)
    sharded = load_decoder(decoder_folder(tmp_path, config, random_llama(config), shards=3), device="cpu")
    for name, weight in decoder.state_dict().items():
        assert torch.equal(sharded.state_dict()[name], weight), name


def test_a_shard_the_manifest_does_not_list_is_not_opened(tmp_path: Path) -> None:
    config = tiny_llama_config(VOCAB_SIZE)
    artifact = decoder_folder(tmp_path, config, random_llama(config), shards=3)
    del artifact.manifest.files["decoder/model-00002-of-00003.safetensors"]
    with pytest.raises(ArtifactError, match="does not list decoder/model-00002"):
        load_decoder(artifact, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"),
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
    expected, got = (d.prefill(PROMPTS, image, cache) for d, cache in zip((on_cpu, on_gpu), caches, strict=True))
    torch.testing.assert_close(got.cpu(), expected, atol=0.1, rtol=0.05)
    in_float32 = load_decoder(load_artifact(tiny_artifact.path), device="cuda", dtype="float32")
    assert greedy(in_float32, PROMPTS, image, steps=12) == greedy(on_cpu, PROMPTS, image, steps=12)
