"""The writer of the published layout."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import random_checkpoint
import torch

from benchmarks.phantom.publish import channel_scales, fold_channel_scales, random_weights, split_lora
from export.source import forward
from lite.config import DecoderConfig

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("published")
    random_checkpoint.write(out)
    return out


def test_files_are_the_published_ones(published: Path) -> None:
    assert {path.name for path in (published / "llava-rad-phantom").iterdir()} == {
        *("config.json", "adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"),
        *("biomedclipcxr_42.json", "biomedclipcxr_42_checkpoint.pt"),
        "NOTICE",  # ours: that it reads phantoms only
    }
    assert {path.name for path in (published / "base").iterdir()} == {
        *("config.json", "generation_config.json", "special_tokens_map.json"),
        *("tokenizer.model", "tokenizer_config.json", "pytorch_model.bin.index.json"),
        *(f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)),
    }


def test_tensor_names_and_dtypes_are_the_published_ones(published: Path) -> None:
    adapter = random_checkpoint.load(published / "llava-rad-phantom/adapter_model.bin")
    assert len(adapter) == random_checkpoint.LAYERS * 7 * 2
    assert adapter["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (8, 128)
    assert adapter["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (128, 8)
    projector = random_checkpoint.load(published / "llava-rad-phantom/non_lora_trainables.bin")
    assert set(projector) == {
        f"base_model.model.model.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")
    }
    assert {tensor.dtype for tensor in [*adapter.values(), *projector.values()]} == {torch.float16}
    training = random_checkpoint.load(published / "llava-rad-phantom/biomedclipcxr_42_checkpoint.pt")
    assert {"name", "epoch", "state_dict", "optimizer"} <= set(training)
    state = training["state_dict"]
    assert state["module.visual.trunk.blocks.2.attn.qkv.weight"].dtype == torch.float32
    assert "module.text.transformer.pooler.dense.weight" in state
    assert "module.visual.head.proj.weight" in state
    assert all(name.startswith("module.") for name in state)


def test_configs_hold_what_the_real_ones_hold(published: Path) -> None:
    config = json.loads((published / "llava-rad-phantom/config.json").read_text())
    expected = {
        "model_type": "llava",
        "mm_vision_tower": "biomedclip_cxr_42",
        "mm_vision_tower_checkpoint": "biomedclipcxr_42_checkpoint.pt",
        "mm_hidden_size": 128,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "square",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    assert not (published / "llava-rad-phantom" / config["mm_vision_tower_config"]).exists()
    adapter = json.loads((published / "llava-rad-phantom/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["bias"]) == (8, 16, "none")
    generation = json.loads((published / "base/generation_config.json").read_text())
    assert (generation["temperature"], generation["top_p"]) == (0.9, 0.6)


def test_numpy_scalars_need_an_allow_list(published: Path) -> None:
    with pytest.raises(pickle.UnpicklingError, match="multiarray.scalar"):
        torch.load(published / "llava-rad-phantom/biomedclipcxr_42_checkpoint.pt", weights_only=True)


def test_base_plus_lora_is_the_folded_weight_to_16_bit_rounding(published: Path) -> None:
    _, _, llama = random_checkpoint.weights()
    config = random_checkpoint.llama_config()
    folded = fold_channel_scales(llama, config, sigma=random_checkpoint.SCALE_SIGMA, seed=random_checkpoint.SEED)
    base = {}
    for shard in (published / "base").glob("*.bin"):
        base |= random_checkpoint.load(shard)
    assert set(base) == set(llama)
    adapter = random_checkpoint.load(published / "llava-rad-phantom/adapter_model.bin")
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (adapter[f"{module}.lora_{factor}.weight"].double() for factor in "AB")
        merged = base[name].double() + 2.0 * b @ a
        exact = folded[name].double()
        assert float((merged - exact).abs().max()) <= 2**-11 * float(base[name].abs().max())
        # Leaving the merge out, or halving it, is far outside any rounding.
        assert float((base[name].double() - exact).norm() / exact.norm()) > 0.2
        assert float((base[name].double() + b @ a - exact).norm() / exact.norm()) > 0.1


def test_split_lora_takes_the_top_directions() -> None:
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    base, a, b = split_lora(weight, rank=4, scale=2.0)
    assert (a.shape, b.shape, base.dtype) == ((4, 16), (24, 4), torch.float16)
    singular = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(base.float())[:12], singular[4:], rtol=0.01, atol=0.01)


def _log_probs(llama: dict[str, torch.Tensor], llama_config: dict[str, Any]) -> torch.Tensor:
    config = DecoderConfig.from_hf({**llama_config, "rms_norm_eps": 1e-5, "max_position_embeddings": 512})
    hidden = llama["model.embed_tokens.weight"][torch.arange(3, 40)]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        here = {name.removeprefix(prefix): w for name, w in llama.items() if name.startswith(prefix)}
        hidden = forward.decoder_layer(config, here, _linears(here), hidden)
    logits = forward.rms_norm(hidden, llama["model.norm.weight"], config.rms_norm_eps) @ llama["lm_head.weight"].T
    return logits.double().log_softmax(-1)


def _linears(weights: dict[str, torch.Tensor]) -> forward.Linear:
    return lambda name, x: torch.nn.functional.linear(x, weights[f"{name}.weight"].float())


def test_channel_scales_change_the_weights_and_not_the_function() -> None:
    # Two key/value heads of two query heads each: their order matters.
    heads = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {**random_checkpoint.llama_config(), **heads}
    _, _, llama = random_weights(config, image_size=14, dim=64, depth=1)
    folded = fold_channel_scales(llama, config, sigma=0.9, seed=1)
    for name in llama:
        scaled = "_proj" in name or "layernorm" in name
        assert torch.equal(folded[name], llama[name]) == (not scaled), name
    p, q = (_log_probs(state, config) for state in (llama, folded))
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 1e-9
    spread = folded["model.layers.0.self_attn.q_proj.weight"].norm(dim=0).log().std()
    assert float(spread) > 0.6
    back = fold_channel_scales(folded, config, sigma=-0.9, seed=1)
    for name, tensor in llama.items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-6, atol=1e-7)
    one_off = {**folded, "model.layers.0.self_attn.o_proj.weight": llama["model.layers.0.self_attn.o_proj.weight"]}
    r = _log_probs(one_off, config)
    assert float((p.exp() * (p - r)).sum(-1).mean()) > 1e-3


def test_channel_scales_are_fixed_by_their_arguments() -> None:
    scales = channel_scales(random_checkpoint.llama_config(), sigma=0.9, seed=1)
    assert scales["0.value"].shape == (64,)
    assert float(scales["0.attention_input"][0]) == pytest.approx(FIRST_SCALE, rel=1e-12)
    assert all(float(scale.log().abs().max()) <= 2.7 + 1e-9 for scale in scales.values())


# Recorded: the committed checkpoint can only be unfolded while this draw stays what it is.
FIRST_SCALE = 4.5629299299678845


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float16 range"):
        random_checkpoint.write(tmp_path, scale_sigma=4.0)
