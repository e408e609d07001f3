"""What is counted, against torch's own counter and published numbers; and that nothing modelled looks measured."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from driving import decode_token, read_prompt
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.gpu.memory import VISION
from benchmarks.speed.weights import Shapes as Widths
from export.source.forward import image_features
from export.source.tower import TowerConfig
from lite.artifact.open import Artifact
from lite.artifact.parts import TowerShape, VisionPart
from lite.bench import roofline
from lite.bench.cards import CARDS, V100_ENTRY, Card, Figure, read_reference_card
from lite.bench.results import Row
from lite.bench.roofline import (
    MODELLED_COLUMNS,
    SHARE_OF_BANDWIDTH,
    decode_flop,
    modelled,
    modelled_cells,
    modelled_tables,
    prefill_flop,
    vision_flop,
)
from lite.config import DecoderConfig, Quantization
from lite.engines.options import LoadOptions
from lite.engines.resolve import resolve
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.engines.torch_engine.linear import linears_of
from lite.engines.torch_engine.load import fill_linear
from lite.errors import ArtifactError
from lite.memory.counts import (
    adapter_bytes,
    cache_bytes_per_token,
    decode_weight_bytes,
    decoder_bytes,
    layer_linear_shapes,
    onnx_adapter_bytes,
)
from lite.memory.plan import REASON_TOKENS, Shapes
from lite.model import FindingsModel

DECODER = DecoderConfig.from_hf(Widths().config(32))
NUM_PROMPT_TOKENS, NUM_NEW_TOKENS = 1420, 100
W4 = dataclasses.replace(DECODER, quantization=Quantization(format="gptq-int4", group_size=128))
W8 = dataclasses.replace(DECODER, quantization=Quantization(format="gptq-int8", group_size=128))
SMALL = dataclasses.replace(
    DECODER,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    vocab_size=96,
)


def shapes() -> Shapes:
    """The real model, all in float16: 86.58 M parameters of the tower less a block of 7.1 M, and the projector."""
    return Shapes(config=DECODER, vision=VISION, vision_bytes=198_566_912)


def num_linear_weights(config: DecoderConfig) -> int:
    return config.num_hidden_layers * sum(rows * columns for rows, columns in layer_linear_shapes(config).values())


def zeros_bytes(config: DecoderConfig, bits: int) -> float:
    """GPTQ's zeros, all of them the same: they lie on the disk, and engines that keep them read them."""
    return num_linear_weights(config) / 128 * bits / 8


def card(name: str) -> Card:
    (found,) = (card for card in CARDS if card.name == name)
    return found


# -- Counting --------------------------------------------------------------------------------------------------------


def test_bytes_of_the_7b_model_are_the_known_ones() -> None:
    assert num_linear_weights(DECODER) == pytest.approx(6.476e9, rel=1e-4)
    assert decoder_bytes(DECODER, itemsize=2) == pytest.approx(13.48e9, rel=1e-3)
    assert decode_weight_bytes(DECODER, itemsize=2) == pytest.approx(13.21e9, rel=1e-3)
    assert decode_weight_bytes(W4, itemsize=2) + zeros_bytes(W4, 4) == pytest.approx(3.63e9, rel=2e-3)
    assert decode_weight_bytes(W8, itemsize=2) + zeros_bytes(W8, 8) == pytest.approx(6.89e9, rel=1e-3)
    # Engines that compute in float32 hold in it what is not quantised: here the head.
    assert decode_weight_bytes(W4, itemsize=4) - decode_weight_bytes(W4, itemsize=2) == 2 * 32000 * 4096
    assert cache_bytes_per_token(DECODER, itemsize=2) == 524_288


def test_an_adapter_of_rank_64_is_a_fourteenth_of_what_a_token_reads() -> None:
    token = decode_weight_bytes(W4, itemsize=2) + NUM_PROMPT_TOKENS * cache_bytes_per_token(W4, itemsize=2)
    assert adapter_bytes(W4, [64], itemsize=2) / token == pytest.approx(1 / 14, rel=0.05)
    assert adapter_bytes(W4, [64, 16], itemsize=2) == 2 * adapter_bytes(W4, [64], itemsize=2)
    assert adapter_bytes(W4, [], itemsize=2) == onnx_adapter_bytes(W4, []) == 0
    # 8 bits, and scales.
    assert onnx_adapter_bytes(W4, [64]) / adapter_bytes(W4, [64], itemsize=1) == pytest.approx(1.14, rel=0.01)


def test_weight_bytes_are_those_of_a_loaded_decoder(tiny_model: FindingsModel) -> None:
    decoder = tiny_model.decoder
    held = sum(linear.nbytes for linear in linears_of(decoder).values())
    assert decode_weight_bytes(decoder.config, itemsize=4) == held > 0


def test_operations_of_the_decoder_are_those_torch_counts() -> None:
    """torch multiplies masked pairs too; the roofline counts those that a token may see."""
    decoder, length = LlamaDecoder(SMALL), 30
    for weight in decoder.parameters():
        nn.init.normal_(weight, std=0.1)
    for linear in linears_of(decoder).values():
        drawn = {name: {"weight": torch.randn(size, linear.in_features) / 10} for name, size in linear.parts.items()}
        fill_linear(linear, drawn, device="cpu", dtype=torch.float32)
    cache = decoder.new_cache(1, length + 1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        read_prompt(decoder, [3] * length, None, cache)
    masked = length**2 - length * (length + 1) // 2
    per_pair = 4 * SMALL.num_hidden_layers * SMALL.num_attention_heads * SMALL.head_dim
    assert prefill_flop(SMALL, length) == counter.get_total_flops() - per_pair * masked
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        decode_token(decoder, cache)
    assert decode_flop(SMALL, length + 1) == counter.get_total_flops()


def test_operations_of_the_7b_model_are_the_known_ones() -> None:
    linears = 2 * num_linear_weights(DECODER) * NUM_PROMPT_TOKENS
    assert linears == pytest.approx(18.4e12, rel=1e-3)
    assert linears < prefill_flop(DECODER, NUM_PROMPT_TOKENS) < 1.03 * linears


def test_operations_of_the_tower_are_those_torch_counts() -> None:
    tower = TowerConfig(image_size=42, patch_size=14, dim=128, depth=3, num_blocks=2, mlp_dim=320)
    shapes = {
        "patch_embed.proj.weight": (128, 3, 14, 14),
        "patch_embed.proj.bias": (128,),
        "cls_token": (1, 1, 128),
        "pos_embed": (1, 10, 128),
        "projector.0.weight": (96, 128),
        "projector.0.bias": (96,),
        "projector.2.weight": (96, 96),
        "projector.2.bias": (96,),
    }
    for block in ("blocks.0.", "blocks.1."):
        for name, (rows, columns) in {
            "attn.qkv": (384, 128), "attn.proj": (128, 128), "mlp.fc1": (320, 128), "mlp.fc2": (128, 320)
        }.items():  # fmt: skip
            shapes |= {f"{block}{name}.weight": (rows, columns), f"{block}{name}.bias": (rows,)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"{block}{name}"] = (128,)
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        image_features(tensors, tower, torch.ones(1, 3, 42, 42))
    shape = TowerShape(hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=2)
    part = VisionPart(
        graph="a", projector="b", num_patches=9, num_image_tokens=9, format="fp32", image_size=42, hidden_size=96,
        tower=shape,
    )  # fmt: skip
    assert vision_flop(part) == counter.get_total_flops()


def test_operations_of_the_whole_tower_are_the_published_ones() -> None:
    """timm's card of vit_base_patch14_dinov2.lvd142m says 151.7 GMAC at 518 pixels: 12 blocks, no projector."""
    whole = dataclasses.replace(VISION, tower=dataclasses.replace(VISION.tower, num_hidden_layers=12))
    projector = 2 * 1369 * (768 * 4096 + 4096**2)
    assert vision_flop(whole) - projector == pytest.approx(2 * 151.7e9, rel=1e-3)
    assert vision_flop(VISION) == pytest.approx(0.333e12, rel=1e-2)


STUDY = {"num_prompt_tokens": NUM_PROMPT_TOKENS, "num_new_tokens": NUM_NEW_TOKENS}


# -- Models ----------------------------------------------------------------------------------------------------------


def test_each_stage_takes_the_longer_of_reading_and_computing() -> None:
    middle = NUM_PROMPT_TOKENS + NUM_NEW_TOKENS // 2
    nbytes = decode_weight_bytes(DECODER, itemsize=2) + middle * 524_288
    slow = Card("A", 1 << 40, 1e9, 1e12, (8, 6), "invented")
    figures = modelled(slow, shapes(), **STUDY, share_of_bandwidth=0.5).figures
    values = {name: figure.value for name, figure in figures.items()}
    assert values["prefill_s"] == pytest.approx(prefill_flop(DECODER, NUM_PROMPT_TOKENS) / 0.5e12)
    assert values["decode_token_s"] == pytest.approx(nbytes / 0.5e9)
    assert values["decode_tokens_per_s"] == pytest.approx(0.5e9 / nbytes)
    assert values["total_s"] == pytest.approx(values["vision_s"] + values["prefill_s"] + 99 * values["decode_token_s"])
    assert figures["decode_token_s"].source == "(13.2 GB of weights + 771 MB of cache) / (0.5 × 1.00 GB/s)"
    assert figures["prefill_s"].source == "18.9 TFLOP / (0.5 × 1.00 TFLOP/s)"
    # A card that computes as slowly as this one reads takes its time for computing.
    weak = modelled(slow._replace(peak_flops=1e9), shapes(), **STUDY)
    assert weak.figures["decode_token_s"].value == pytest.approx(decode_flop(DECODER, middle) / 0.5e9)


@pytest.mark.parametrize(
    ("name", "fp16", "w4"),
    [("RTX 3060 12GB", False, True), ("RTX 4060 Ti 16GB", True, True), ("V100 16GB", True, True)],
)
def test_what_fits_a_card(name: str, fp16: bool, w4: bool) -> None:
    model = modelled(card(name), shapes(), **STUDY)
    assert model.fits == fp16
    assert modelled(card(name), dataclasses.replace(shapes(), config=W4), **STUDY).fits == w4
    exact = int(model.figures["memory_bytes"].value)
    for memory_bytes, fits in ((exact, True), (exact - 1, False)):
        assert modelled(card(name)._replace(memory_bytes=memory_bytes), shapes(), **STUDY).fits == fits


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_memory_of_a_card_is_the_one_that_is_planned_there(card: Card, tiny_artifact: Artifact) -> None:
    plan = resolve(LoadOptions(rows=1), tiny_artifact, card.machine(), num_prompt_tokens=100)
    model = modelled(
        card,
        Shapes.of(tiny_artifact),
        num_prompt_tokens=100 + REASON_TOKENS,
        num_new_tokens=tiny_artifact.manifest.decoding.max_new_tokens,
    )
    assert model.figures["memory_bytes"].value == plan.memory.card_bytes
    assert plan.limit == card.memory_bytes


def test_only_large_decoders_of_torch_are_modelled_and_what_is_known_of_the_v100_follows(
    tiny_artifact: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = SimpleNamespace(decoder_bytes=1 << 28)
    row = Mock(Row, engine="torch", plan=plan, path=str(tiny_artifact.path), tokens_per_study=20, num_prompt_tokens=9)
    row.name = "fp16"
    bench = SimpleNamespace(rows=[row])
    (table,) = modelled_tables(bench)
    assert [cells[0] for cells in table.rows] == [card.name for card in CARDS]
    monkeypatch.setattr(roofline.Shapes, "of", lambda _: shapes())
    _, table = modelled_tables(bench)
    figures = {name: (shown, kind) for name, shown, kind, _ in table.rows}
    assert "V100 16GB" in table.caption
    assert re.fullmatch(r"~38\.\d tok/s", figures["decode_tokens_per_s"][0])
    assert figures["rouge_l"] == ("30.8 % (published)", "published")
    monkeypatch.setattr(roofline, "V100_ENTRY", tmp_path / "v100_fp16.json")
    assert len(modelled_tables(bench)) == 1
    row.engine = "onnx"
    assert modelled_tables(bench) == ()
    row.engine, plan.decoder_bytes = "torch", (1 << 28) - 1
    assert modelled_tables(bench) == ()


# -- How it looks ----------------------------------------------------------------------------------------------------


def test_a_modelled_figure_never_looks_measured() -> None:
    def shown(value: float, unit: str) -> str:
        text = str(Figure(value=value, unit=unit, kind="modelled", source="a / b"))  # type: ignore[arg-type]
        measured = str(Figure(value=value, unit=unit, kind="measured", source="here"))  # type: ignore[arg-type]
        assert text == f"~{measured}"
        return text

    assert [shown(seconds, "s") for seconds in (0.0123, 0.338, 2.9077)] == ["~12.3 ms", "~338 ms", "~2.91 s"]
    assert [shown(rate, "tokens/s") for rate in (81.7, 12_345)] == ["~81.7 tok/s", "~12,345 tok/s"]
    assert shown(5 << 30, "bytes") == "~5.00 GiB"
    assert shown(0.573, "fraction") == "~57.3 %"


def test_the_table_marks_every_figure_and_shows_no_times_where_it_does_not_fit() -> None:
    heading, rows = MODELLED_COLUMNS, [modelled_cells(modelled(each, shapes(), **STUDY)) for each in CARDS]
    assert [row[0] for row in rows] == [each.name for each in CARDS]
    for row in rows:
        assert len(row) == len(heading)
        assert all(cell.startswith("~") or cell == "–" for cell in row[1:-1])
    assert rows[0][1:6] == ("–",) * 5
    assert rows[0][-2:] == ("~14.86 GiB", "no")
    assert rows[-1][2:5] == ("~338 ms", "~25.9 ms", "~38.6 tok/s")


def test_modelled_figures_of_the_v100_are_those_of_the_roofline_and_the_others_are_published() -> None:
    """Nobody here has a V100. Whoever has one writes measured figures into the file, and what they were taken with."""
    entry, v100 = read_reference_card(V100_ENTRY), card("V100 16GB")
    model, roof = (modelled(v100, shapes(), **STUDY, share_of_bandwidth=share) for share in (SHARE_OF_BANDWIDTH, 1.0))
    expected = model.figures | {"decode_tokens_per_s_at_most": roof.figures["decode_tokens_per_s"]}
    found = {name: figure for name, figure in entry.figures.items() if figure.kind == "modelled"}
    assert len(found) == 7
    for name, figure in found.items():
        assert figure.value == pytest.approx(expected[name].value, rel=1e-5), name
        assert figure.source == expected[name].source
    assert {figure.unit for figure in entry.figures.values() if figure.kind == "published"} == {"fraction"}


def test_an_entry_that_was_edited_wrongly_is_refused(tmp_path: Path) -> None:
    values = json.loads(V100_ENTRY.read_text())
    figure = values["figures"]["prefill_s"]
    for change, message in (({"kind": "guessed"}, "prefill_s.*guessed"), ({"source": None}, "prefill_s.source")):
        (tmp_path / "entry.json").write_text(
            json.dumps(values | {"figures": values["figures"] | {"prefill_s": figure | change}})
        )
        with pytest.raises(ArtifactError, match=message):
            read_reference_card(tmp_path / "entry.json")
