"""What tokens count, layer by layer, against one graph over the whole decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from export.quantize.calibration import FINDINGS, KINDS, HiddenStates
from export.quantize.importance import OUTPUTS, SourceDecoder, measure_importance
from export.source import forward
from lite.config import DecoderConfig

LAYERS, SIZE, VOCABULARY = 3, 32, 40
CONFIG = DecoderConfig.from_hf(
    {
        "vocab_size": VOCABULARY,
        "hidden_size": SIZE,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_position_embeddings": 64,
    }
)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(index: int) -> dict[str, torch.Tensor]:
    shapes = {
        "self_attn.q_proj": (SIZE, SIZE),
        "self_attn.k_proj": (16, SIZE),
        "self_attn.v_proj": (16, SIZE),
        "self_attn.o_proj": (SIZE, SIZE),
        "mlp.gate_proj": (48, SIZE),
        "mlp.up_proj": (48, SIZE),
        "mlp.down_proj": (SIZE, 48),
    }
    weights = {
        f"{name}.weight": random(*shape, seed=10 * index + n) / 5 for n, (name, shape) in enumerate(shapes.items())
    }
    return weights | {f"{norm}_layernorm.weight": torch.ones(SIZE) for norm in ("input", "post_attention")}


def test_it_is_the_gradient_of_the_findings_by_kind_of_token(tmp_path: Path) -> None:
    source = SourceDecoder(
        config=CONFIG, read_layer=layer, norm=torch.ones(SIZE), head=random(VOCABULARY, SIZE, seed=99) / 3
    )
    kinds = [torch.tensor([0, 1, 2, 2, 2, 1, 3, 3, 3, 3]), torch.tensor([0, 2, 2, 2, 1, 3, 3])]
    states = HiddenStates(tmp_path / "in", [len(kind) for kind in kinds], SIZE)
    states.fill(random(len(kind), SIZE, seed=200 + place) for place, kind in enumerate(kinds))
    found = measure_importance(source, states, kinds)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]

    generator = torch.Generator().manual_seed(0)
    sums = [{name: torch.zeros(len(KINDS)) for name in OUTPUTS} for _ in range(LAYERS)]
    for place, kind in enumerate(kinds):
        hidden, made = states.read(place).requires_grad_(), []
        for index in range(LAYERS):
            weights, here = layer(index), {}

            def linear(name: str, x: torch.Tensor, weights=weights, here=here) -> torch.Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001
                here[name] = functional.linear(x, weights[f"{name}.weight"])
                here[name].retain_grad()
                return here[name]

            hidden = forward.decoder_layer(CONFIG, weights, linear, hidden)
            made.append(here)
        logits = functional.linear(forward.rms_norm(hidden, source.norm, 1e-5), source.head)[kind == FINDINGS]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        functional.cross_entropy(logits, labels, reduction="sum").backward()
        for index, outputs in ((i, o) for i in range(LAYERS) for o in OUTPUTS.items()):
            for output in outputs[1]:
                sums[index][outputs[0]].index_add_(0, kind, made[index][output].grad.square().sum(1))
    count = torch.bincount(torch.cat(kinds)).float()
    for index, name in ((i, n) for i in range(LAYERS) for n in OUTPUTS):
        mean = sums[index][name] / count
        relative = mean / mean[FINDINGS]
        # The first token counts by the square, all others by the size of the gradient.
        expected = [float(relative[0]), *relative[1:].sqrt().tolist()]
        assert found[index][name] == pytest.approx(expected, rel=1e-3, abs=1e-9)
    # Behind the last layer nothing reads what a token before the findings has become.
    assert max(found[-1]["mlp.down_proj"][:FINDINGS]) == 0
    assert min(found[0]["mlp.down_proj"][:FINDINGS]) > 0
