"""A linear of several parts, in each stored form: one call gives what each part would by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from random_weights import of_either_sign

from export.quantize.gptq import Grid, round_to_nearest
from kernels.bnb import Int8Weight, Nf4Weight
from kernels.gptq import GptqWeight, to_tensors
from kernels.quant_weight import QuantWeight
from lite.config import Quantization
from lite.engines.torch_engine.linear import Linear, linears_of
from lite.engines.torch_engine.load import fill_linear, parts_of
from lite.errors import ArtifactError

IN = 192
# Neither tiles of 16 outputs nor the parts among each other are of one size.
PARTS = {"q_proj": 40, "k_proj": 24, "v_proj": 8}
Tensors = dict[str, torch.Tensor]


def matrices(parts: dict[str, int] | None = None, *, in_features: int = IN) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    return {
        name: (torch.randn(size, in_features, generator=generator) / 8).half()
        for name, size in (parts or PARTS).items()
    }


def gptq(weight: torch.Tensor, *, bits: int, group_size: int) -> Tensors:
    grid = Grid(bits=bits, group_size=weight.shape[1] if group_size == -1 else group_size)
    rounded = round_to_nearest(weight.float(), grid)
    return to_tensors(*of_either_sign(rounded.values, rounded.scales, bits), bits=bits)


def gptq_values(tensors: Tensors, bits: int) -> torch.Tensor:
    return GptqWeight.from_tensors(tensors, bits=bits).dequantize(torch.float32)


def bnb(weight: torch.Tensor, decoder_format: str) -> Tensors:
    pytest.importorskip("bitsandbytes")
    from export.quantize.bnb import quantize_int8, quantize_nf4

    return (quantize_nf4 if decoder_format == "bnb-nf4" else quantize_int8)(weight)


class Form(NamedTuple):
    """How a weight is stored, what it then is worth, and what holds it."""

    quantization: Quantization | None
    kind: type
    store: Callable[[torch.Tensor], Tensors]
    values: Callable[[Tensors], torch.Tensor]


def gptq_form(bits: int, group_size: int) -> Form:
    return Form(
        Quantization(format="gptq-int4" if bits == 4 else "gptq-int8", group_size=group_size),
        GptqWeight,
        lambda weight: gptq(weight, bits=bits, group_size=group_size),
        lambda tensors: gptq_values(tensors, bits),
    )


FORMS = {
    "fp16": Form(None, torch.Tensor, lambda weight: {"weight": weight}, lambda tensors: tensors["weight"].float()),
    "gptq-int4": gptq_form(4, 32),
    "gptq-int4, a group a row": gptq_form(4, -1),
    "gptq-int4, groups of 96": gptq_form(4, 96),
    "gptq-int8": gptq_form(8, 64),
    "bnb-nf4": Form(
        Quantization(format="bnb-nf4"),
        Nf4Weight,
        lambda weight: bnb(weight, "bnb-nf4"),
        lambda tensors: Nf4Weight.from_tensors(tensors).dequantize(torch.float32),
    ),
    "bnb-int8": Form(
        Quantization(format="bnb-int8"),
        Int8Weight,
        lambda weight: bnb(weight, "bnb-int8"),
        lambda tensors: Int8Weight.from_tensors(tensors).dequantize(torch.float32),
    ),
}


def filled(form: Form, parts: dict[str, int] | None = None, **named: Any) -> tuple[Linear, dict[str, Tensors]]:
    parts = parts or PARTS
    linear = Linear(IN, parts, form.quantization)
    stored = {name: form.store(weight) for name, weight in matrices(parts).items()}
    fill_linear(linear, stored, device="cpu", dtype=torch.float32, **named)
    return linear, stored


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", FORMS)
def test_the_parts_are_side_by_side_in_their_order(name: str, x: torch.Tensor) -> None:
    form = FORMS[name]
    linear, stored = filled(form)
    got = linear(x)
    assert got.shape == (2, 3, sum(PARTS.values()))
    for product, part in zip(got.split(list(PARTS.values()), dim=-1), PARTS, strict=True):
        torch.testing.assert_close(product, x @ form.values(stored[part]).t(), atol=1e-5, rtol=1e-5)
        alone = Linear(IN, {part: PARTS[part]}, form.quantization)
        fill_linear(alone, {part: stored[part]}, device="cpu", dtype=torch.float32)
        assert torch.equal(product, alone(x))
    assert [type(weight) for weight in linear.weights] == [form.kind] * 3


@pytest.mark.parametrize("name", ["gptq-int4", "gptq-int4, a group a row", "gptq-int8", "bnb-int8"])
def test_tiles_for_a_gpu_give_the_same_product_by_one_weight(name: str, x: torch.Tensor) -> None:
    tiled, _ = filled(FORMS[name], backend="triton")
    apart, _ = filled(FORMS[name])
    (weight,) = tiled.weights
    assert isinstance(weight, QuantWeight)
    # The float32 scales of int8 become float16, each off by half a unit in its last place at most.
    rtol = 2.0**-11 if name == "bnb-int8" else 1e-5
    torch.testing.assert_close(tiled(x), apart(x), atol=1e-5, rtol=rtol)
    assert tiled.nbytes == weight.nbytes
    # 72 outputs in tiles of 16, 192 inputs in spans of 128 or 256, 2 bytes a scale.
    bits, groups = weight.bits, len(weight.scales)
    assert weight.nbytes == 80 * 256 * bits // 8 + groups * 72 * 2


def test_rows_that_float16_cannot_scale_stay_as_they_are_stored(x: torch.Tensor) -> None:
    form = FORMS["bnb-int8"]
    stored = {name: form.store(weight) for name, weight in matrices().items()}
    stored["k_proj"]["SCB"][5] = 1e-6
    linear = Linear(IN, PARTS, form.quantization)
    fill_linear(linear, stored, device="cpu", dtype=torch.float32, backend="triton")
    assert [type(weight) for weight in linear.weights] == [Int8Weight] * 3
    expected = torch.cat([x @ form.values(tensors).t() for tensors in stored.values()], dim=-1)
    torch.testing.assert_close(linear(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["fp16", "bnb-nf4", "gptq-int4, groups of 96"])
def test_what_the_kernels_do_not_know_stays_as_it_is_stored(name: str, x: torch.Tensor) -> None:
    linear, _ = filled(FORMS[name], backend="triton")
    assert [type(weight) for weight in linear.weights] == [FORMS[name].kind] * 3
    assert torch.equal(linear(x), filled(FORMS[name])[0](x))


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("fp16", 72 * IN * 4),  # float32 on a CPU
        ("gptq-int4", 72 * IN // 2 + 72 * IN // 32 * 2),
        ("gptq-int8", 72 * IN + 72 * IN // 64 * 2),
        ("bnb-int8", 72 * IN + 72 * 4),
    ],
)
def test_bytes_in_memory(name: str, nbytes: int) -> None:
    assert filled(FORMS[name])[0].nbytes == nbytes


def test_a_mapped_weight_is_not_copied() -> None:
    """On a CPU: what lies on the disk in the dtype of the decoder is used from there."""
    linear = Linear(IN, PARTS)
    weights = {name: weight.float() for name, weight in matrices().items()}
    fill_linear(
        linear, {name: {"weight": weight} for name, weight in weights.items()}, device="cpu", dtype=torch.float32
    )
    got = [weight.data_ptr() for weight in linear.weights if isinstance(weight, torch.Tensor)]
    assert got == [weight.data_ptr() for weight in weights.values()]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("fp16", lambda t: t.update(bias=torch.zeros(40)), "got the tensors bias, weight · expected weight"),
        ("fp16", lambda t: t.clear(), "got the tensors  · expected weight"),
        ("fp16", lambda t: t.update(weight=t["weight"][:39]), r"got a weight \[39, 192\] · expected \[40, 192\]"),
        ("fp16", lambda t: t.update(weight=t["weight"].t()), r"got a weight \[192, 40\] · expected \[40, 192\]"),
        ("gptq-int4", lambda t: t.pop("g_idx"), "missing or unknown: g_idx$"),
        (
            "gptq-int4",
            lambda t: t.update(gptq(matrices()["q_proj"], bits=4, group_size=64)),
            "got groups of 64 inputs · expected 32 by config.json",
        ),
        (
            "gptq-int4, a group a row",
            lambda t: t.update(gptq(matrices()["q_proj"], bits=4, group_size=64)),
            "got groups of 64 inputs · expected 192 by config.json",
        ),
        (
            "gptq-int8",
            lambda t: t.update(gptq(matrices()["q_proj"][:32], bits=8, group_size=64)),
            r"got a weight \[32, 192\] · expected \[40, 192\] by config.json",
        ),
        ("bnb-int8", lambda t: t.pop("SCB"), "SCB"),
        ("bnb-nf4", lambda t: t.update(bnb(matrices()["k_proj"], "bnb-nf4")), r"\[24, 192\] · expected \[40, 192\]"),
    ],
)
def test_what_is_no_weight_of_this_form_is_refused(name: str, damage: Callable[[Tensors], None], message: str) -> None:
    form = FORMS[name]
    stored = {part: form.store(weight) for part, weight in matrices().items()}
    damage(stored["q_proj"])
    linear = Linear(IN, PARTS, form.quantization)
    with pytest.raises(ValueError, match=message):
        fill_linear(linear, stored, device="cpu", dtype=torch.float32)


def test_a_linear_without_weights_computes_nothing(x: torch.Tensor) -> None:
    with pytest.raises(ArtifactError, match="got a linear without weights"):
        Linear(IN, PARTS)(x)


def test_parts_have_the_names_of_a_checkpoint() -> None:
    model = torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict({"qkv_proj": Linear(IN, PARTS)})})
    model["lm_head"] = Linear(IN, {"lm_head": 8})
    linears = linears_of(model)
    assert list(linears) == ["self_attn.qkv_proj", "lm_head"]
    assert parts_of(linears) == {
        "self_attn.q_proj": ("self_attn.qkv_proj", "q_proj"),
        "self_attn.k_proj": ("self_attn.qkv_proj", "k_proj"),
        "self_attn.v_proj": ("self_attn.qkv_proj", "v_proj"),
        "lm_head": ("lm_head", "lm_head"),
    }
