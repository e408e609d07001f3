"""LoRA: the adapter's configuration, and the merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from export.source.lora import AdapterConfig, LoraPair, merge
from lite.errors import CheckpointError

PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "bias": "none",
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "somewhere/base",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
}


def _pair(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, LoraPair]:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((6, 10), (2, 10), (6, 2)))
    return weight.to(dtype), LoraPair(a=a.to(dtype), b=b.to(dtype), scale=2.0)


def test_merged_weight_computes_base_plus_update() -> None:
    weight, pair = _pair()
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    expected = x @ weight.T + 2.0 * (x @ pair.a.T) @ pair.b.T
    torch.testing.assert_close(x @ merge(weight, pair).T, expected)
    torch.testing.assert_close(x @ weight.T + pair.apply(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merge_is_computed_in_float32(dtype: torch.dtype) -> None:
    weight, pair = _pair(dtype)
    merged = merge(weight, pair)
    exact = weight.double() + 2.0 * pair.b.double() @ pair.a.double()
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), exact, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(merged.to(dtype).double(), exact, rtol=1e-6, atol=1e-6)


def test_merge_leaves_its_arguments_alone() -> None:
    weight, pair = _pair()
    before = weight.clone()
    merge(weight, pair)
    assert torch.equal(weight, before)
    assert merge(weight, None).data_ptr() != weight.data_ptr()


def test_config_gives_scale_and_linears() -> None:
    config = AdapterConfig.from_json(PLAIN, where="adapter_config.json")
    assert config.scale("model.layers.0.self_attn.q_proj") == 2.0
    assert config.linears == ("self_attn.q_proj", "self_attn.v_proj")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": "no"}, "use_rslora='no' · expected true or false"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4.5}}, "rank_pattern={'q_proj': 4.5} · expected whole numbers"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "a"}}, "alpha_pattern"),
        ({"alpha_pattern": {"(a+)+b": 4}}, r"alpha_pattern for '\(a\+\)\+b' · expected names of modules"),
        ({"modules_to_save": ["mm_projector", "lm_head"]}, "modules_to_save"),
        ({"something_of_next_year": 1}, r"something_of_next_year=1 .* only auto_mapping, base_model"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16', which has changed the base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 0}, "r=0"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"target_modules": [["q_proj"]]}, "target_modules"),
        ({"target_modules": ""}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules"),
    ],
)
def test_other_adapters_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        AdapterConfig.from_json({**PLAIN, **change}, where="adapter_config.json")


@pytest.mark.parametrize(
    ("change", "rank", "scale"),
    [
        ({"use_rslora": True}, 8, 16 / 8**0.5),
        ({"rank_pattern": {"q_proj": 4}}, 4, 4.0),
        ({"rank_pattern": {"v_proj": 4}}, 8, 2.0),
        ({"rank_pattern": {"0.self_attn.q_proj": 4}, "use_rslora": True}, 4, 8.0),
        ({"rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj$": 2}}, 2, 8.0),
        ({"rank_pattern": {"^q_proj": 4}}, 8, 2.0),  # of a name that begins so
        ({"rank_pattern": {"1.self_attn.q_proj": 4}}, 8, 2.0),
        ({"rank_pattern": {"proj": 4}}, 8, 2.0),  # the end of a name, and whole words of it
        ({"alpha_pattern": {"self_attn.q_proj": 4}}, 8, 0.5),
        ({"alpha_pattern": {"q_proj": 4}, "rank_pattern": {"q_proj": 2}}, 2, 2.0),
    ],
)
def test_patterns_and_rank_stabilisation_count_as_peft_does(change: dict[str, Any], rank: int, scale: float) -> None:
    config = AdapterConfig.from_json({**PLAIN, **change}, where="adapter_config.json")
    module = "model.layers.0.self_attn.q_proj"
    assert (config.rank(module), config.scale(module)) == (rank, pytest.approx(scale))


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r"^(?!.*vision).*(?:q_proj|v_proj)"},
        {"target_modules": ["model.layers.1.self_attn.q_proj"]},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["o_proj"]},
    ],
)
def test_where_not_all_layers_are_adapted_the_tensors_tell_which(change: dict[str, Any]) -> None:
    assert AdapterConfig.from_json({**PLAIN, **change}, where="adapter_config.json").linears is None


@pytest.mark.parametrize(
    "change",
    [
        {"modules_to_save": ["mm_projector"]},
        {"lora_dropout": 0.1, "peft_version": "0.18.0", "qalora_group_size": 16, "task_type": "CAUSAL_LM"},
        {"something_of_next_year": None, "use_dora": False, "loftq_config": {}},
        *({"init_lora_weights": init} for init in (True, False, None, "gaussian", "eva", "orthogonal")),
    ],
)
def test_settings_that_change_no_merge_are_taken(change: dict[str, Any]) -> None:
    assert AdapterConfig.from_json({**PLAIN, **change}, where="adapter_config.json").r == 8


def test_a_base_without_a_name_is_called_nothing() -> None:
    config = AdapterConfig.from_json({**PLAIN, "base_model_name_or_path": None}, where="adapter_config.json")
    assert config.base_name == ""
