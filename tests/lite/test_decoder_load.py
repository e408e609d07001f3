"""Loading a decoder: every tensor is accounted for, and what would be computed wrongly is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import score_text
from tiny import PROMPTS, VOCAB_SIZE, decoder_folder, features, random_llama, tiny_llama_config

from lite.artifact.open import Artifact
from lite.engines.machine import check_device
from lite.engines.torch_engine.linear import linears_of
from lite.engines.torch_engine.load import load_decoder
from lite.errors import ArtifactError, BackendUnavailable

CONFIG = tiny_llama_config(VOCAB_SIZE)


def written(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda _: None, *, shards: int = 1
) -> Artifact:
    """Write a tiny decoder, its weights changed."""
    weights = random_llama(CONFIG)
    change(weights)
    return decoder_folder(folder, CONFIG, weights, shards=shards)


def test_dtype_is_float32_on_the_cpu_unless_asked_otherwise(tmp_path: Path) -> None:
    artifact = written(tmp_path)
    assert load_decoder(artifact, device="cpu").dtype == torch.float32
    half = load_decoder(artifact, device="cpu", dtype="float16")
    assert half.dtype == half.new_cache(1, 4).k_cache.dtype == torch.float16
    single = load_decoder(artifact, device="cpu")
    got, expected = (score_text(d, PROMPTS[0], [5, 6], features(1)[0]) for d in (half, single))
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0.1)


def test_shards_are_one_file(tmp_path: Path) -> None:
    decoder, sharded = (load_decoder(written(tmp_path / str(n), shards=n), device="cpu") for n in (1, 3))
    for name, weight in decoder.state_dict().items():
        assert torch.equal(sharded.state_dict()[name], weight), name
    linears = linears_of(sharded)
    assert len(linears) == 4 * 2 + 1
    for name, linear in linears_of(decoder).items():
        for got, expected in zip(linears[name].weights, linear.weights, strict=True):
            assert isinstance(got, torch.Tensor)
            assert torch.equal(got, expected), name


def test_a_shard_the_manifest_does_not_list_is_not_opened(tmp_path: Path) -> None:
    artifact = written(tmp_path, shards=3)
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
    with pytest.raises(ArtifactError, match=message):
        load_decoder(written(tmp_path, change), device="cpu")


def test_damaged_safetensors(tmp_path: Path) -> None:
    artifact = written(tmp_path)
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
    artifact = decoder_folder(tmp_path, CONFIG | changes, {"x": torch.zeros(1)})
    with pytest.raises(ArtifactError, match=message):
        load_decoder(artifact, device="cpu")


def test_a_config_that_nests_without_end(tmp_path: Path) -> None:
    artifact = decoder_folder(tmp_path, {}, {"x": torch.zeros(1)})
    artifact.file("decoder/config.json").write_text('{"a": ' * 200_000)
    with pytest.raises(ArtifactError, match=r"config\.json: got something unreadable"):
        load_decoder(artifact, device="cpu")


def test_transformers_5_config_is_read(tmp_path: Path) -> None:
    config = dict(CONFIG)
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
