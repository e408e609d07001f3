"""A layer on its way: which Hessian each linear is rounded by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from export.quantize import attention, folding
from export.quantize.calibration import FINDINGS, HiddenStates
from export.quantize.gptq import Hessian, Quantized, gptq
from export.quantize.importance import OUTPUTS
from export.quantize.layerwise import LayerQuantizer
from export.settings import ExportSettings, GptqSettings
from export.source import forward
from tests.export.test_importance import CONFIG, SIZE, layer, random

KINDS = [torch.tensor([0, 1, 2, 2, 2, 1, 3, 3]), torch.tensor([0, 2, 2, 1, 3, 3])]
# Of each linear others, as it is of each layer.
IMPORTANCE = {name: [0.2 + place, 0.3, 0.4 * (place + 1), 1.0] for place, name in enumerate(OUTPUTS)}


def hessians(folder: Path, *, through_attention: bool) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Return the Hessian that each linear was rounded by, and what the layer read, normed."""
    seen: dict[str, torch.Tensor] = {}

    def rounds(weight: torch.Tensor, hessian: torch.Tensor, *rest: Any, name: str) -> Quantized:
        seen[name.removeprefix("layer.")] = hessian.clone()
        return gptq(weight, hessian, *rest, name=name)

    states = HiddenStates(folder / "in", [len(kind) for kind in KINDS], SIZE)
    states.fill(random(len(kind), SIZE, seed=300 + place) for place, kind in enumerate(KINDS))
    options = GptqSettings(
        group_size=-1, calibration_data="list.json", fold_scales=False, through_attention=through_attention
    )
    settings = ExportSettings(decoder_format="gptq-int8", gptq=options, device="cpu")
    quantizer = LayerQuantizer("layer", layer(0), CONFIG, settings, rounds=rounds)
    quantizer.quantize(states, states.beside(folder / "out"), KINDS, IMPORTANCE)
    return seen, [forward.rms_norm(states.read(place), torch.ones(SIZE), CONFIG.rms_norm_eps) for place in range(2)]


def weighted(inputs: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    gathered = Hessian(inputs[0].shape[1])
    for x, kind in zip(inputs, KINDS, strict=True):
        gathered.add(x, torch.tensor(weights)[kind])
    return gathered.take("x")


@pytest.mark.parametrize("through_attention", [True, False])
def test_q_k_and_v_have_hessians_of_their_own_if_seen_through_the_attention(
    tmp_path: Path, through_attention: bool
) -> None:
    seen, normed = hessians(tmp_path, through_attention=through_attention)
    names = (attention.QUERY, attention.KEY, attention.VALUE)
    expected = {name: weighted(normed, IMPORTANCE["self_attn.o_proj"]) for name in names}
    if through_attention:
        weights, gathered = layer(0), {name: Hessian(SIZE) for name in names}
        for x, kind in zip(normed, KINDS, strict=True):
            of_tokens = torch.tensor(IMPORTANCE["self_attn.o_proj"])[kind]
            attention.add_sequence(gathered, CONFIG, lambda name, y: y @ weights[f"{name}.weight"].T, x, of_tokens)
        expected = {name: hessian.take(name) for name, hessian in gathered.items()}
    for name in names:
        torch.testing.assert_close(seen[name], expected[name], rtol=1e-4, atol=1e-5)
    assert torch.equal(seen[attention.QUERY], seen[attention.VALUE]) is not through_attention


def test_each_linear_counts_tokens_by_its_own_importance(tmp_path: Path) -> None:
    seen, _ = hessians(tmp_path, through_attention=True)
    # In 8 bits the layer computes nearly what it did, so what its linears read is known.
    weights = layer(0)
    states = HiddenStates(tmp_path / "in", [len(kind) for kind in KINDS], SIZE)
    read: dict[str, list[torch.Tensor]] = {}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        read.setdefault(name, []).append(x)
        return x @ weights[f"{name}.weight"].T

    for place in range(len(KINDS)):
        forward.decoder_layer(CONFIG, weights, linear, states.read(place))
    for name, counted in (
        ("self_attn.o_proj", "self_attn.o_proj"),
        ("mlp.gate_proj", "mlp.gate_proj"),
        ("mlp.up_proj", "mlp.gate_proj"),
        ("mlp.down_proj", "mlp.down_proj"),
    ):
        expected = weighted(read[name], IMPORTANCE[counted])
        for other in OUTPUTS:
            away = float((seen[name] - weighted(read[name], IMPORTANCE[other])).norm() / expected.norm())
            assert (away < 0.03) is (other == counted), (name, other, away)
    assert all(FINDINGS in kind for kind in KINDS)


@pytest.mark.parametrize("worth", [True, False])
def test_a_fold_is_taken_only_if_it_is_worth_it(tmp_path: Path, worth: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def double(_: object, mean_square: torch.Tensor, __: object, *, heads: tuple[int, int] | None) -> torch.Tensor:
        return torch.full((16 if heads else len(mean_square),), 2.0)

    monkeypatch.setattr(folding, "propose", double)
    monkeypatch.setattr(folding, "is_worth_it", lambda *_: worth)
    states = HiddenStates(tmp_path / "in", [len(kind) for kind in KINDS], SIZE)
    states.fill(random(len(kind), SIZE, seed=300 + place) for place, kind in enumerate(KINDS))
    settings = ExportSettings(
        decoder_format="gptq-int8", gptq=GptqSettings(group_size=-1, calibration_data="list.json"), device="cpu"
    )
    lora = {name: torch.ones_like(weight) for name, weight in layer(0).items() if "proj" in name}
    quantizer = LayerQuantizer("layer", layer(0), CONFIG, settings, beside=lora)
    quantizer.quantize(states, states.beside(tmp_path / "out"), KINDS, IMPORTANCE)
    # What is beside a weight is scaled with it: its columns twice, and in v and up its rows half again.
    for name, beside in quantizer.beside.items():
        expected = 2.0 if worth and not name.startswith(("self_attn.v_", "mlp.up_")) else 1.0
        torch.testing.assert_close(beside, torch.full_like(beside, expected))
    for norm in quantizer.norms.values():
        torch.testing.assert_close(norm, torch.full_like(norm, 0.5 if worth else 1.0))
