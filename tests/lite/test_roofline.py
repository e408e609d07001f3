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
from lite.bench import cards
from lite.bench.cards import CARDS, Card, Figure, read_reference_card, v100_entry
from lite.bench.results import Row
from lite.bench.roofline import (
    MODELLED_COLUMNS,
    SHARE_OF_BANDWIDTH,
    count_study,
    decode_flop,
    decode_weight_bytes,
    modelled,
    modelled_cells,
    modelled_rows,
    modelled_tables,
    num_linear_weights,
    prefill_flop,
    vision_flop,
)
from lite.config import DecoderConfig, Quantization
from lite.engines.options import LoadOptions
from lite.engines.resolve import resolve
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.engines.torch_engine.linear import linears_of
from lite.errors import ArtifactError, LiteError
from lite.eval.figures import Missing
from lite.memory.counts import cache_bytes_per_token
from lite.memory.plan import REASON_TOKENS, Shapes
from lite.model import FindingsModel

DECODER = DecoderConfig.from_hf(Widths().config(32))
NUM_PROMPT_TOKENS, NUM_NEW_TOKENS = 1420, 100
W4 = dataclasses.replace(DECODER, quantization=Quantization(format="gptq-int4", group_size=128))
W8 = dataclasses.replace(DECODER, quantization=Quantization(format="gptq-int8", group_size=128))
CONTEXT = 1469
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


def zeros_bytes(config: DecoderConfig, bits: int) -> float:
    """GPTQ's zeros, all of them the same: they lie on the disk, and engines that keep them read them."""
    return num_linear_weights(config) / 128 * bits / 8


def card(name: str) -> Card:
    (found,) = (card for card in CARDS if card.name == name)
    return found


# -- Counting --------------------------------------------------------------------------------------------------------


def test_bytes_of_the_7b_model_are_the_known_ones() -> None:
    assert num_linear_weights(DECODER) == pytest.approx(6.476e9, rel=1e-4)
    assert decode_weight_bytes(DECODER, itemsize=2) == pytest.approx(13.21e9, rel=1e-3)
    assert decode_weight_bytes(W4, itemsize=2) + zeros_bytes(W4, 4) == pytest.approx(3.63e9, rel=2e-3)
    assert decode_weight_bytes(W8, itemsize=2) + zeros_bytes(W8, 8) == pytest.approx(6.89e9, rel=1e-3)
    # Engines that compute in float32 hold in it what is not quantised: here the head.
    assert decode_weight_bytes(W4, itemsize=4) - decode_weight_bytes(W4, itemsize=2) == 2 * 32000 * 4096
    assert cache_bytes_per_token(DECODER, itemsize=2) == 524_288


@pytest.mark.parametrize(
    ("name", "tokens_per_s"), [("RTX 3060 12GB", 82), ("RTX 4060 Ti 16GB", 65), ("T4", 73), ("V100 16GB", 205)]
)
def test_roofs_of_the_7b_model_in_4_bits_are_the_known_ones(name: str, tokens_per_s: int) -> None:
    nbytes = decode_weight_bytes(W4, itemsize=2) + zeros_bytes(W4, 4) + CONTEXT * 524_288
    assert card(name).bandwidth / nbytes == pytest.approx(tokens_per_s, rel=0.01)


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
        linear.take(drawn, device="cpu", dtype=torch.float32)
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
    part = VisionPart(format="fp32", image_size=42, num_image_tokens=9, hidden_size=96, tower=shape)
    assert vision_flop(part) == counter.get_total_flops()


def test_operations_of_the_whole_tower_are_the_published_ones() -> None:
    """timm's card of vit_base_patch14_dinov2.lvd142m says 151.7 GMAC at 518 pixels: 12 blocks, no projector."""
    whole = dataclasses.replace(VISION, tower=dataclasses.replace(VISION.tower, num_hidden_layers=12))
    projector = 2 * 1369 * (768 * 4096 + 4096**2)
    assert vision_flop(whole) - projector == pytest.approx(2 * 151.7e9, rel=1e-3)
    assert vision_flop(VISION) == pytest.approx(0.333e12, rel=1e-2)


STUDY = {"num_prompt_tokens": NUM_PROMPT_TOKENS, "num_new_tokens": NUM_NEW_TOKENS}


def test_counts_of_a_study() -> None:
    study = count_study(shapes(), **STUDY)
    assert study.cache_bytes == (NUM_PROMPT_TOKENS + NUM_NEW_TOKENS // 2) * 524_288


# -- Models ----------------------------------------------------------------------------------------------------------


def test_each_stage_takes_the_longer_of_reading_and_computing() -> None:
    study = count_study(shapes(), **STUDY)
    slow = Card(
        name="A", memory_bytes=1 << 40, bandwidth=1e9, peak_flops=1e12, capability=(8, 6), source="invented"
    )  # fmt: skip
    model = modelled(slow, shapes(), **STUDY, share_of_bandwidth=0.5, share_of_peak=0.25)
    token = (study.weight_bytes + study.cache_bytes) / 0.5e9
    assert model.prefill_s.value == pytest.approx(study.prefill_flop / 0.25e12)
    assert model.decode_token_s.value == pytest.approx(token)
    assert model.decode_tokens_per_s.value == pytest.approx(1 / token)
    assert model.total_s.value == pytest.approx(model.vision_s.value + model.prefill_s.value + 99 * token)
    assert model.decode_token_s.formula == "(13.2 GB of weights + 771 MB of cache) / (0.5 × 1 GB/s)"
    assert model.prefill_s.formula == "18.9 TFLOP / (0.25 × 1 TFLOP/s)"
    # A card that computes as slowly as this one reads takes its time for computing.
    weak = modelled(dataclasses.replace(slow, peak_flops=1e9), shapes(), **STUDY)
    assert weak.decode_token_s.value == pytest.approx(study.decode_flop / 0.5e9)


@pytest.mark.parametrize(
    ("name", "fp16", "w4"),
    [("RTX 3060 12GB", False, True), ("RTX 4060 Ti 16GB", True, True), ("V100 16GB", True, True)],
)
def test_what_fits_a_card(name: str, fp16: bool, w4: bool) -> None:
    assert modelled(card(name), shapes(), **STUDY).fits == fp16
    assert modelled(card(name), dataclasses.replace(shapes(), config=W4), **STUDY).fits == w4
    exact = int(modelled(card(name), shapes(), **STUDY).memory_bytes.value)
    for memory_bytes, fits in ((exact, True), (exact - 1, False)):
        assert modelled(dataclasses.replace(card(name), memory_bytes=memory_bytes), shapes(), **STUDY).fits == fits


@pytest.mark.parametrize("name", [card.name for card in CARDS])
def test_the_memory_of_a_card_is_the_one_that_is_planned_there(name: str, tiny_artifact: Artifact) -> None:
    plan = resolve(LoadOptions(rows=1), tiny_artifact, card(name).machine(), num_prompt_tokens=100)
    (model,) = (
        model
        for model in modelled_rows(
            tiny_artifact,
            num_prompt_tokens=100 + REASON_TOKENS,
            num_new_tokens=tiny_artifact.manifest.decoding.max_new_tokens,
        )
        if model.card.name == name
    )
    assert model.memory_bytes.value == plan.memory.card_bytes
    assert plan.limit == card(name).memory_bytes


def test_an_artifact_is_modelled_on_every_card(tiny_artifact: Artifact) -> None:
    rows = modelled_rows(tiny_artifact, num_prompt_tokens=100, num_new_tokens=20)
    assert [row.card for row in rows] == list(CARDS)
    config = tiny_artifact.decoder_config()
    for row in rows:
        assert row.counts.vision_bytes == (tiny_artifact.path / "vision.onnx").stat().st_size
        assert row.counts.weight_bytes == decode_weight_bytes(config, itemsize=2)
        assert row.counts.cache_bytes == 110 * cache_bytes_per_token(config, itemsize=2)
        assert row.counts.prefill_flop == prefill_flop(config, 100)
        assert row.fits


def test_only_torch_is_modelled_on_other_cards(tiny_artifact: Artifact) -> None:
    plan = SimpleNamespace(decoder_bytes=1 << 28)
    row = Mock(Row, engine="torch", plan=plan, path=str(tiny_artifact.path), tokens_per_study=20, num_prompt_tokens=9)
    row.name = "int4"
    bench = SimpleNamespace(rows=[row])
    (table,) = modelled_tables(bench)
    assert len(table.rows) == len(CARDS)
    row.engine = "onnx"
    assert modelled_tables(bench) == ()
    row.engine, plan.decoder_bytes = "torch", (1 << 28) - 1
    assert modelled_tables(bench) == ()


# -- How it looks ----------------------------------------------------------------------------------------------------


def test_a_modelled_figure_never_looks_measured() -> None:
    def shown(value: float, unit: str) -> str:
        text = str(Figure(value=value, unit=unit, kind="modelled", formula="a / b"))  # type: ignore[arg-type]
        measured = str(Figure(value=value, unit=unit, kind="measured", source="here"))  # type: ignore[arg-type]
        assert text == f"~{measured}"
        return text

    assert shown(0.0123, "s") == "~12.3 ms"
    assert shown(0.338, "s") == "~338 ms"
    assert shown(2.9077, "s") == "~2.91 s"
    assert shown(81.7, "tokens/s") == "~81.7 tok/s"
    assert shown(12_345, "tokens/s") == "~12,345 tok/s"
    assert shown(5 << 30, "bytes") == "~5.00 GiB"
    assert shown(0.573, "fraction") == "~57.3 %"
    assert str(Figure(value=0.573, unit="fraction", kind="published", source="a paper")) == "57.3 % (published)"


def test_the_table_marks_every_figure_and_shows_no_times_where_it_does_not_fit() -> None:
    heading, rows = MODELLED_COLUMNS, [modelled_cells(modelled(each, shapes(), **STUDY)) for each in CARDS]
    assert [row[0] for row in rows] == [each.name for each in CARDS]
    for row in rows:
        assert len(row) == len(heading)
        assert all(cell.startswith("~") or cell == "–" for cell in row[1:-1])
    assert rows[0][1:6] == ("–",) * 5
    assert rows[0][-2:] == ("~14.86 GiB", "no")
    assert modelled_cells(modelled(card("V100 16GB"), shapes(), **STUDY))[2:5] == ("~338 ms", "~25.9 ms", "~38.6 tok/s")


def test_json_says_modelled_and_how() -> None:
    values = json.loads(json.dumps(modelled(card("T4"), shapes(), **STUDY).to_json()))
    figures = [value for value in values.values() if isinstance(value, dict) and "value" in value]
    assert len(figures) == 6
    for figure in figures:
        assert set(figure) == {"value", "unit", "kind", "formula"}
        assert figure["kind"] == "modelled"
    assert values["kind"] == "modelled"
    assert values["counts"]["num_new_tokens"] == NUM_NEW_TOKENS
    assert values["decode_token_s"]["value"] == pytest.approx(0.07284, rel=1e-3)


def test_a_figure_says_where_it_comes_from() -> None:
    with pytest.raises(LiteError, match="got a measured figure, 1 s, without a source"):
        Figure(value=1.0, unit="s", kind="measured", formula="1 / 1")
    with pytest.raises(LiteError, match="without a formula"):
        Figure(value=1.0, unit="s", kind="modelled", source="a paper")


# -- The V100's entry ------------------------------------------------------------------------------------------------


def test_modelled_figures_of_the_entry_are_those_of_the_roofline() -> None:
    """The rest of it is published: nobody here has a V100. Whoever has one writes measured figures into the file."""
    entry, v100 = read_reference_card(cards.V100_ENTRY), card("V100 16GB")
    model, roof = (modelled(v100, shapes(), **STUDY, share_of_bandwidth=share) for share in (SHARE_OF_BANDWIDTH, 1.0))
    expected = model.to_json() | {"decode_tokens_per_s_at_most": roof.decode_tokens_per_s.to_json()}
    found = {name: figure.to_json() for name, figure in entry.figures.items() if figure.kind == "modelled"}
    assert found == {name: expected[name] for name in found}
    assert len(found) == 7
    assert {figure.unit for figure in entry.figures.values() if figure.kind == "published"} == {"fraction"}


def test_the_v100_is_read_where_there_is_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = v100_entry()
    assert not isinstance(entry, Missing)
    assert entry.card == "V100 16GB"
    assert re.fullmatch(r"~38\.\d tok/s", str(entry.figures["decode_tokens_per_s"]))
    monkeypatch.setattr(cards, "V100_ENTRY", tmp_path / "v100_fp16.json")
    missing = v100_entry()
    assert isinstance(missing, Missing)
    assert "repository" in missing.todo


def test_an_entry_that_was_edited_wrongly_is_refused(tmp_path: Path) -> None:
    values = json.loads(cards.V100_ENTRY.read_text())
    values["figures"]["prefill_s"]["kind"] = "guessed"
    (tmp_path / "entry.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="prefill_s"):
        read_reference_card(tmp_path / "entry.json")
    # A figure that is called measured needs a source.
    values["figures"]["prefill_s"]["kind"] = "measured"
    (tmp_path / "entry.json").write_text(json.dumps(values))
    with pytest.raises(LiteError, match="without a source"):
        read_reference_card(tmp_path / "entry.json")
