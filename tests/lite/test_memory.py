"""The memory plan: what it counts is what is held, and what does not fit is refused before it is loaded."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from driving import read_prompt
from fake_cuda import H100, RTX_3060, T4, TOKEN, Allocator, FakeGpu, draft, load_on, prompt_of
from repository import ROOT
from tiny import cache_fidelity, tiny_llama_config, tiny_manifest, tiny_onnx_part, tiny_parts
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorDeviceMismatchError

from kernels.backend import Card
from kernels.packing import _CHUNK_VALUES
from kernels.quant_matmul import SCRATCH_VALUES
from lite.artifact.open import Artifact
from lite.artifact.parts import FileRecord, TowerShape, VisionPart
from lite.config import DecoderConfig, Quantization
from lite.engines.machine import Gpu, Machine
from lite.engines.options import LoadOptions
from lite.engines.plan import RunPlan
from lite.engines.resolve import resolve
from lite.engines.segments import divide, expand_image
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.engines.torch_engine.linear import Linear, linears_of
from lite.engines.torch_engine.load import fill_linear
from lite.errors import LiteError, MemoryBudgetError
from lite.loading import load
from lite.memory.counts import (
    _EXPANDED_VALUES,
    _REPACKED_VALUES,
    ITEMSIZE,
    cache_bytes_per_token,
    decoder_bytes,
    head_bytes,
    layer_bytes,
    onnx_decoder_bytes,
    onnx_linear_bytes,
    onnx_prefill_work_bytes,
)
from lite.memory.plan import (
    CHUNK_SIZES,
    GPU_LIBRARIES_BYTES,
    ONNX_FIRST_USE_BYTES,
    STUDIES_AHEAD,
    MemoryPlan,
    Shapes,
    Workload,
    check_memory,
    plan_memory,
)
from lite.memory.process import peak_rss_bytes, rss_bytes
from lite.memory.sizes import parse_bytes, shown_bytes
from lite.model import FindingsModel

# GB of zeros that are stored for 7B in 8 bits, groups of 128: symmetric ones are all alike, and not kept in memory.
ZEROS = 6.476 / 128
VICUNA = DecoderConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    vocab_size=32000,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    dtype="float16",
)


def test_seven_billion_weights_take_what_is_known_of_them() -> None:
    """Compare with the arithmetic that is known of Vicuna-7B, in GB."""
    assert decoder_bytes(VICUNA, itemsize=2) / 1e9 == pytest.approx(13.48, abs=0.005)
    four = dataclasses.replace(VICUNA, quantization=Quantization(format="gptq-int4", group_size=128))
    context = 1469 * cache_bytes_per_token(VICUNA, itemsize=2)
    assert context / 1e9 == pytest.approx(0.77, abs=0.005)
    for config, expected in (
        (four, 3.63 - ZEROS / 2),
        (dataclasses.replace(VICUNA, quantization=Quantization(format="gptq-int8", group_size=128)), 6.89 - ZEROS),
        (VICUNA, 13.21),
    ):
        read = 32 * layer_bytes(config, itemsize=2) + head_bytes(config, itemsize=2)
        assert read / 1e9 == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("lm_head_bits", [None, 8])
@pytest.mark.parametrize("stored", ["fp16", "gptq-int4", "gptq-int8", "bnb-nf4", "bnb-int8"])
def test_every_format_is_counted_to_the_byte(stored: str, lm_head_bits: int | None) -> None:
    if stored.startswith("gptq"):
        config_json = {
            "quant_method": "gptq", "bits": int(stored[-1]), "group_size": 32, "lm_head": lm_head_bits is not None,
            "dynamic": {"lm_head": {"bits": lm_head_bits}},
        }  # fmt: skip
    else:
        config_json = {"quant_method": "bitsandbytes", "load_in_8bit": stored == "bnb-int8"}
        config_json |= {"load_in_4bit": stored == "bnb-nf4", "bnb_4bit_quant_type": "nf4"}
    quantization = None if stored == "fp16" else Quantization.from_hf(config_json, where="test")
    shape = tiny_llama_config(128, hidden_size=128, intermediate_size=192, head_dim=32)
    config = dataclasses.replace(DecoderConfig.from_hf(shape), quantization=quantization)
    decoder = LlamaDecoder(config)
    for linear in linears_of(decoder).values():
        tensors = {
            name: random_tensors((outputs, linear.in_features), linear) for name, outputs in linear.parts.items()
        }
        fill_linear(linear, tensors, device="cpu", dtype=torch.float32)
    assert decoder_bytes(config, itemsize=4) == decoder.nbytes


def random_tensors(shape: tuple[int, int], linear: Linear) -> dict[str, torch.Tensor]:
    """A weight of a linear's format."""
    from export.quantize.bnb import quantize_int8, quantize_nf4
    from kernels.gptq import to_tensors

    weight = torch.randn(shape)
    if linear.quantization is None:
        return {"weight": weight.half()}
    if linear.quantization.format == "bnb-nf4":
        return quantize_nf4(weight)
    if linear.quantization.format == "bnb-int8":
        return quantize_int8(weight)
    groups = shape[1] // (linear.quantization.group_size or 0)
    values = torch.randint(-7, 8, shape)
    return to_tensors(values, torch.rand(shape[0], groups).half(), bits=linear.quantization.bits)


def planned(artifact: Artifact, **settings: Any) -> MemoryPlan:
    """Plan for the CPU, unless told otherwise, with the artifact's own length of a text."""
    settings = {"device": "cpu", "num_prompt_tokens": 100} | settings
    settings |= {"max_new_tokens": artifact.manifest.decoding.max_new_tokens}
    return plan_memory(Shapes.of(artifact), Workload(**settings))


def test_a_plan_of_a_loaded_artifact_counts_what_it_holds(tiny_model: FindingsModel, films: list[Path]) -> None:
    assert isinstance(tiny_model.decoder, LlamaDecoder)
    findings = tiny_model.findings(films[0])
    # A row is as long as most studies need.
    prompt = tiny_model.plan.workload.num_prompt_tokens
    for_cpu = functools.partial(planned, tiny_model.artifact, num_prompt_tokens=prompt)
    plan, batch, half = for_cpu(), for_cpu(num_rows=3), for_cpu(dtype="float16")
    assert plan.decoder_bytes == tiny_model.decoder.nbytes
    assert plan.cache_bytes == findings.memory.cache_bytes
    assert batch.cache_bytes == 3 * plan.cache_bytes
    assert (batch.decoder_bytes, batch.vision_bytes) == (plan.decoder_bytes, plan.vision_bytes)
    assert batch.study_bytes - plan.study_bytes == 2 * plan.cache_bytes, "films and prompts go through one at a time"
    assert (2 * half.cache_bytes, 2 * half.decoder_bytes) == (plan.cache_bytes, plan.decoder_bytes)


def test_the_items_of_a_plan_are_its_sum(tiny_artifact: Artifact) -> None:
    for settings in ({"device": "cpu", "resident_bytes": 5 << 20}, {"device": "cuda", "tower_on_gpu": True}):
        plan = planned(tiny_artifact, num_rows=2, **settings)
        assert sum(plan.items().values()) == plan.card_bytes
    large = dataclasses.replace(plan, load_work_bytes=plan.study_bytes + 7)
    assert sum(large.items().values()) == large.card_bytes == plan.card_bytes + 7


WIDTHS = dataclasses.replace(VICUNA, num_hidden_layers=4, quantization=Quantization(format="gptq-int4", group_size=128))
PART = tiny_onnx_part()


@pytest.mark.parametrize(
    ("num_tokens", "cache_dtype", "expected"),
    [
        *((1472, "float32", 1197), (1472, "int8", 1176), (1024, "float32", 1120), (1024, "int8", 1117)),
        *((512, "float32", 1018), (512, "int8", 1000), (256, "float32", 841), (256, "int8", 833)),
    ],
)
def test_four_layers_of_7b_take_what_was_measured(num_tokens: int, cache_dtype: str, expected: int) -> None:
    """Peaks in MiB of a process with the decoder alone (ONNX Runtime 1.32, AVX-512, November 2026), 52 before it."""
    plan = MemoryPlan(
        num_rows=1,
        max_seq_len=num_tokens + 8,
        resident_bytes=(52 << 20) + ONNX_FIRST_USE_BYTES,
        decoder_bytes=onnx_decoder_bytes(WIDTHS, PART),
        vision_bytes=0,
        cache_bytes=(num_tokens + 8) * cache_bytes_per_token(WIDTHS, itemsize=ITEMSIZE[cache_dtype]),
        load_work_bytes=onnx_linear_bytes("lm_head", WIDTHS, PART, bytes_per_block=0),
        vision_work_bytes=0,
        # There was no tower whose features could wait.
        prefill_work_bytes=onnx_prefill_work_bytes(
            WIDTHS, num_tokens=num_tokens, itemsize=4, int8_cache=cache_dtype == "int8"
        ),
    )
    assert plan.peak_bytes / 2**20 == pytest.approx(expected, rel=0.05)
    assert (plan.weight_bytes + plan.load_work_bytes) / 2**20 == pytest.approx(788, rel=0.03)


def test_a_prompt_is_planned_a_chunk_at_a_time() -> None:
    """Beyond a chunk only the embeddings grow, and what an int8 cache is as float32."""
    work = functools.partial(onnx_prefill_work_bytes, WIDTHS, itemsize=4, int8_cache=False)
    one, two = work(num_tokens=512), work(num_tokens=1024)
    assert two - one == 512 * 4096 * 4
    # 26 and a half times hidden_size for each token of a chunk, and holes.
    assert one - work(num_tokens=256) == pytest.approx(256 * 4096 * 4 * (26.44 * 1.5 + 1), rel=0.01)
    # 1,023 tokens before the last one: of each key and value, and of each key once more; and those of 1,024 and 512.
    assert work(num_tokens=1025, int8_cache=True) - work(num_tokens=1025) == (
        (3 * 1024 + 2 * 1025 + 2 * 512) * 4096 * 4
    )
    half = functools.partial(work, num_tokens=1025, itemsize=2)
    assert half(int8_cache=True) == half(int8_cache=False), "float16 has the kernels for integers alone"


def test_a_plan_of_the_onnx_engine_counts_what_it_holds(tiny_onnx_artifact: Artifact, films: list[Path]) -> None:
    config, part = tiny_onnx_artifact.decoder_config(), tiny_onnx_artifact.manifest.parts.decoder_onnx
    assert part is not None
    constants = onnx.load(tiny_onnx_artifact.path / "decoder.onnx", load_external_data=False).graph.initializer
    sizes = {
        constant.name: int(entry.value)
        for constant in constants for entry in constant.external_data if entry.key == "length"
    }  # fmt: skip
    scales = sum(size for name, size in sizes.items() if name.endswith(".scales"))
    # Scales three times over: mapped, repacked, and the blocks' sums.
    assert onnx_decoder_bytes(config, part) == sum(sizes.values()) + 2 * scales
    sized = functools.partial(planned, tiny_onnx_artifact, engine="onnx")
    for cache_dtype in ("float32", "int8"):
        model = load(tiny_onnx_artifact.path, engine="onnx", cache_dtype=cache_dtype)
        findings = model.findings(films[0])
        plan = sized(cache_dtype=cache_dtype, num_prompt_tokens=model.plan.workload.num_prompt_tokens)
        assert plan.cache_bytes == findings.memory.cache_bytes
    assert sized(cache_dtype="float32").cache_bytes == sized().cache_bytes == 4 * sized(cache_dtype="int8").cache_bytes
    # Of a batch the caches, and what is told of each row: films and prompts go through one at a time.
    one, four = sized(), sized(num_rows=4)
    assert four.study_bytes - one.study_bytes == 3 * (one.cache_bytes + 2 * 4 * config.vocab_size)


@pytest.mark.parametrize("limit", [True, 0, -5, 1.5, float("nan"), [1], b"1GiB", ""])
def test_a_limit_that_is_no_size(tiny_onnx_artifact: Artifact, limit: Any) -> None:
    with pytest.raises(LiteError, match="got the size .* expected a number of bytes"):
        load(tiny_onnx_artifact.path, memory_limit=limit)


def test_what_a_refusal_asks_for_is_enough(tiny_onnx_artifact: Artifact) -> None:
    with pytest.raises(MemoryBudgetError) as refused:
        load(tiny_onnx_artifact.path, engine="onnx", memory_limit=1)
    asked = str(refused.value).partition("expected at least ")[2].partition(":")[0]
    load(tiny_onnx_artifact.path, engine="onnx", memory_limit=asked)


def test_blocks_of_whole_rows_divide_them() -> None:
    config = dataclasses.replace(
        WIDTHS, intermediate_size=416, quantization=Quantization(format="gptq-int4", group_size=-1)
    )
    # 4,096 rows of 13 blocks of 32 inputs, half a byte each.
    assert onnx_linear_bytes("down", config, PART, bytes_per_block=4) == 4096 * (416 // 2 + 13 * 4)
    assert onnx_linear_bytes("o", config, PART, bytes_per_block=4) == 4096 * (4096 // 2 + 32 * 4)


def test_the_onnx_engine_is_refused_with_numbers(tiny_onnx_artifact: Artifact) -> None:
    with pytest.raises(MemoryBudgetError, match=r"got a memory limit of 1\.0 MiB · expected .*decoder .*cache of 1 x"):
        load(tiny_onnx_artifact.path, engine="onnx", memory_limit="1MiB")


def test_a_gpu_plan_leaves_out_what_its_allocator_does_not_hold(tiny_artifact: Artifact) -> None:
    plan = planned(tiny_artifact, device="cuda", resident_bytes=300 << 20)
    assert plan.vision_bytes == plan.vision_work_bytes == plan.resident_bytes == 0
    assert plan.peak_bytes == plan.decoder_bytes + plan.cache_bytes + plan.prefill_work_bytes
    assert plan.beside_bytes == GPU_LIBRARIES_BYTES
    with_tower, on_cpu = planned(tiny_artifact, device="cuda", tower_on_gpu=True), planned(tiny_artifact)
    assert with_tower.peak_bytes == plan.peak_bytes
    assert with_tower.beside_bytes - plan.beside_bytes == on_cpu.vision_bytes + on_cpu.vision_work_bytes


def test_what_does_not_fit_is_refused_before_it_is_loaded(tiny_artifact: Artifact) -> None:
    with pytest.raises(
        MemoryBudgetError, match=r"got a memory limit of 1\.0 MiB · expected at least .*decoder .*cache"
    ):
        load(tiny_artifact.path, device="cpu", memory_limit="1MiB")
    load(tiny_artifact.path, device="cpu", memory_limit=16 << 30)


def test_a_refusal_says_what_would_fit() -> None:
    plan = MemoryPlan(
        num_rows=8,
        max_seq_len=10,
        resident_bytes=10 << 20,
        decoder_bytes=60 << 20,
        vision_bytes=0,
        cache_bytes=64 << 20,
        load_work_bytes=0,
        vision_work_bytes=0,
        prefill_work_bytes=16 << 20,
    )
    check_memory(plan, 150 << 20, what="a")
    refusal = r"150\.8 MiB: Python and its packages 10\.0 MiB .*cache of 8 x 10 .* take 2 at a time"
    with pytest.raises(MemoryBudgetError, match=refusal):
        check_memory(plan, 103 << 20, what="a")  # 86 beside the caches of 8 each
    with pytest.raises(MemoryBudgetError, match="export with fewer bits"):
        check_memory(plan, 93 << 20, what="a")


def test_a_refusal_never_asks_for_what_it_got() -> None:
    plan = MemoryPlan(
        num_rows=1, max_seq_len=1, resident_bytes=5 << 30, decoder_bytes=0, vision_bytes=0, cache_bytes=1,
        load_work_bytes=0, vision_work_bytes=0, prefill_work_bytes=0,
    )  # fmt: skip
    for limit in (5 << 30, plan.card_bytes - 1, 1 << 20, 1):
        with pytest.raises(MemoryBudgetError) as refused:
            check_memory(plan, limit, what="a")
        got, expected = re.findall(r"(?:limit of|at least) ([\d.,]+ \w+)", str(refused.value))
        assert got != expected
        assert parse_bytes(expected.replace(",", "")) >= plan.card_bytes


# -- A GPU that is not there: see fake_cuda.py -------------------------------------------------------------------------

NUM_PROMPT_TOKENS = 1430  # 1,369 of the image, and 61 of text
MAX_NEW_TOKENS = 256
STORED: dict[str, dict[str, Any] | None] = {
    "fp16": None,
    "gptq-int4": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "gptq-int8": {"quant_method": "gptq", "bits": 8, "group_size": 128},
    "bnb-int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}
SHAPES: dict[str, dict[str, Any]] = {
    "7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 4096,
    },
}  # fmt: skip
SHAPES["1B"] = SHAPES["7B"] | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
SHAPES["1B grouped"] = SHAPES["1B"] | {"num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True}


@pytest.fixture(scope="session")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Artifacts of which there are the shapes only."""

    @functools.cache
    def make(shape: str, stored: str) -> Artifact:
        config = tiny_llama_config(32000, **SHAPES[shape])
        if STORED[stored] is not None:
            config["quantization_config"] = STORED[stored]
        path = tmp_path_factory.mktemp("shaped")
        (path / "decoder").mkdir()
        (path / "decoder" / "config.json").write_text(json.dumps(config))
        tower = TowerShape(hidden_size=768, intermediate_size=3072, num_hidden_layers=11, num_attention_heads=12)
        vision = VisionPart(
            format="fp16", image_size=518, num_image_tokens=1369, hidden_size=config["hidden_size"], tower=tower
        )
        parts = tiny_parts(vision=vision)
        files = {"vision.onnx": FileRecord(bytes=213_000_000, sha256="0" * 64)}
        parts = dataclasses.replace(parts, vision=dataclasses.replace(parts.vision, files=files))
        return Artifact(path=path, manifest=tiny_manifest(parts=parts), id="0" * 16)

    return make


def full(*cases: tuple[Any, ...]) -> list[Any]:
    """Leave these cases to --full."""
    return [pytest.param(*case, marks=pytest.mark.full) for case in cases]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A decoder on a card."""

    gpu: FakeGpu
    artifact: Artifact
    decoder: LlamaDecoder
    peak: int  # while it was loaded
    allocated: int  # behind that

    def plan(self, **settings: Any) -> MemoryPlan:
        lengths = {"num_prompt_tokens": NUM_PROMPT_TOKENS, "max_new_tokens": MAX_NEW_TOKENS}
        return self.gpu.plan(self.artifact, tower_on_gpu=True, **lengths, **settings)

    @functools.cache  # noqa: B019 - as long as the module's fixture
    def drafting(self, batch_size: int, cache_dtype: str | None, chunk_size: int) -> tuple[int, int]:
        """Return the most bytes allocated, and reserved."""
        self.decoder.quantizes_cache, self.decoder.chunk_size = cache_dtype == "int8", chunk_size
        self.gpu.start_over(self.decoder)
        with self.gpu.active():
            max_seq_len = NUM_PROMPT_TOKENS + MAX_NEW_TOKENS
            draft(self.decoder, num_rows=batch_size, num_prompt_tokens=NUM_PROMPT_TOKENS, max_seq_len=max_seq_len)
        return self.gpu.allocator.pop_peak(), self.gpu.allocator.reserved_peak


@pytest.fixture(scope="module")
def on_card(shaped: Any) -> Any:
    """Decoders on a card, each loaded once, and warm: with the first graph cuBLAS has taken what it keeps."""

    @functools.cache
    def load_once(card: Card, shape: str, stored: str) -> Loaded:
        gpu, artifact = FakeGpu(card), shaped(shape, stored)
        with gpu.active():
            decoder = load_on(gpu, artifact)
            loaded = Loaded(gpu, artifact, decoder, gpu.allocator.pop_peak(), gpu.allocator.allocated)
            draft(decoder, num_rows=1, num_prompt_tokens=32, num_image_tokens=16, max_seq_len=64)
        return loaded

    return load_once


@pytest.mark.parametrize(
    ("card", "shape", "stored", "batch_size", "cache_dtype", "chunk_size"),
    [
        (RTX_3060, "7B", "gptq-int4", 1, None, 2048),
        (RTX_3060, "1B grouped", "gptq-int4", 1, None, 2048),
        *full((RTX_3060, "7B", "gptq-int4", 1, None, 512)),
        *full(*((RTX_3060, "7B", "gptq-int4", 1, "int8", chunk_size) for chunk_size in (2048, 256))),
        *full((RTX_3060, "7B", "gptq-int4", 8, "int8", 2048), (RTX_3060, "7B", "fp16", 1, "int8", 512)),
        *full(*((RTX_3060, "7B", stored, 1, None, 2048) for stored in ("fp16", "gptq-int8", "bnb-int8"))),
        *full(*((card, "1B", "gptq-int4", 1, None, 2048) for card in (RTX_3060, H100, T4))),
        *full(*((RTX_3060, "1B", "gptq-int4", batch_size, None, 1024) for batch_size in (1, 8))),
    ],
)
def test_a_gpu_plan_is_what_the_decoder_takes(
    on_card: Any, card: Card, shape: str, stored: str, batch_size: int, cache_dtype: Any, chunk_size: int
) -> None:
    loaded = on_card(card, shape, stored)
    plan = loaded.plan(num_rows=batch_size, cache_dtype=cache_dtype, chunk_size=chunk_size)
    peak, reserved = loaded.drafting(batch_size, cache_dtype, chunk_size)
    # Of grouped queries the scores of a question over its film are materialised, which the plan does not count.
    assert plan.peak_bytes == pytest.approx(peak, rel=0.01 if shape == "7B" else 0.03)
    # What passes is a thirtieth of all: seen by itself, so that no part of it can be forgotten.
    passing = peak - loaded.allocated - plan.cache_bytes
    assert 0.9 * passing <= plan.prefill_work_bytes
    assert shape != "7B" or plan.prefill_work_bytes == pytest.approx(passing, rel=0.06)
    assert reserved - peak < GPU_LIBRARIES_BYTES, "the holes"


@pytest.mark.full
@pytest.mark.parametrize("card", [RTX_3060, H100])
@pytest.mark.parametrize(
    ("batch_size", "cache_dtype", "most"), [(1, None, 5.0e9), (1, "int8", 4.6e9), (8, "int8", 11e9)]
)
def test_seven_billion_weights_in_4_bits_fit_small_cards(
    on_card: Any, card: Card, batch_size: int, cache_dtype: Any, most: float
) -> None:
    """Of the allocator; the tower and CUDA itself are beside it."""
    loaded = on_card(card, "7B", "gptq-int4")
    assert loaded.plan(num_rows=batch_size, cache_dtype=cache_dtype).peak_bytes <= most
    if (card, batch_size) != (H100, 8):  # takes longer, and is the same but for 48 MiB of cuBLAS
        assert loaded.drafting(batch_size, cache_dtype, 2048)[0] <= most


@pytest.mark.parametrize(
    ("shape", "stored"),
    [
        *(("7B", "gptq-int4"), ("1B grouped", "gptq-int4")),
        *full(("7B", "fp16"), ("7B", "gptq-int8"), ("7B", "bnb-int8"), ("1B", "gptq-int4")),
    ],
)
def test_loading_takes_what_is_planned(on_card: Any, shape: str, stored: str) -> None:
    loaded = on_card(RTX_3060, shape, stored)
    plan = loaded.plan()
    assert plan.decoder_bytes == pytest.approx(loaded.decoder.nbytes, rel=0.001)
    assert plan.decoder_bytes == pytest.approx(loaded.allocated, rel=0.005 if shape == "7B" else 0.02)
    assert plan.weight_bytes + plan.load_work_bytes == pytest.approx(loaded.peak, rel=0.01 if shape == "7B" else 0.02)


def test_the_plan_knows_what_is_expanded_at_a_time() -> None:
    assert (_EXPANDED_VALUES, _REPACKED_VALUES) == (SCRATCH_VALUES, _CHUNK_VALUES)


@pytest.fixture
def grouped(on_card: Any) -> tuple[FakeGpu, LlamaDecoder]:
    """A small decoder on an RTX 3060."""
    loaded = on_card(RTX_3060, "1B grouped", "gptq-int4")
    loaded.decoder.quantizes_cache, loaded.decoder.chunk_size = False, CHUNK_SIZES[0]
    loaded.gpu.start_over(loaded.decoder)
    return loaded.gpu, loaded.decoder


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_a_gpu_is_never_waited_for(grouped: tuple[FakeGpu, LlamaDecoder], cache_dtype: str | None) -> None:
    gpu, decoder = grouped
    decoder.quantizes_cache = cache_dtype == "int8"
    with gpu.active():
        cache = decoder.new_cache(2, 200)
        gpu.copies.clear()
        for row in range(2):
            read_prompt(decoder, prompt_of(100, 50), decoder.image_buffer(50)[0], cache, row)
        # The words go there and the first token comes back, unwaited for.
        assert {(copy.source, copy.waits) for copy in gpu.copies} == {("cpu", False), ("cuda", False)}
        gpu.copies.clear()
        for _ in range(3):
            chosen = decoder.decode(cache)
        assert cache.steps[2, 0, 0].is_captured
        # Decoding takes nothing from the host, and the host does not wait for what it is told.
        assert [(copy.source, copy.target, copy.waits) for copy in gpu.copies] == [("cuda", "cpu", False)] * 3
    assert chosen._event is not None


def test_what_waits_for_a_gpu_is_found(grouped: tuple[FakeGpu, LlamaDecoder]) -> None:
    """The three ways in which the test above would fail."""
    gpu, decoder = grouped
    with gpu.active():
        normed = torch.empty(1, decoder.config.hidden_size, dtype=torch.float16, device="cuda")
        with pytest.raises(DataDependentOutputException):
            decoder.head_logits(normed)  # asks whether all are finite
        with pytest.raises(FakeTensorDeviceMismatchError):
            normed + torch.empty(1, decoder.config.hidden_size, dtype=torch.float16)
        gpu.copies.clear()
        normed.cpu()
        assert [copy.waits for copy in gpu.copies] == [True]


def test_scoring_stays_on_one_device(grouped: tuple[FakeGpu, LlamaDecoder]) -> None:
    gpu, decoder = grouped
    decoder.quantizes_cache, decoder.chunk_size = True, 256
    prompt = expand_image(prompt_of(400, 300), 300)
    with gpu.active():
        features = torch.empty(300, decoder.config.hidden_size)
        cache = decoder.new_cache(1, 700)
        parts = divide(prompt, [TOKEN] * 299, chunk_size=256, image_features=features, scores=True)
        logits = torch.cat([decoder._read(segment, cache) for segment in parts])
    assert (logits.device.type, tuple(logits.shape)) == ("cuda", (300, decoder.config.vocab_size))


def test_the_allocator_is_torchs() -> None:
    """Sizes as CUDACachingAllocator.cpp has them."""
    allocator = Allocator()
    small = [allocator.allocate(nbytes) for nbytes in (1, 513, 1 << 20, 1 << 20)]
    assert [block.nbytes for block in small] == [512, 1024, 1 << 20, 1 << 20]
    assert allocator.reserved == 4 << 20, "two segments, as of the first no 1 MiB is left"
    middle, large = allocator.allocate(3 << 20), allocator.allocate(43 << 20)
    assert allocator.reserved == (4 + 20 + 44) << 20
    assert (middle.nbytes, large.nbytes) == (3 << 20, 44 << 20), "1 MiB is not cut off"
    assert allocator.pop_peak() == allocator.allocated == sum(block.nbytes for block in (*small, middle, large))
    allocator.free(large)
    parts = [allocator.allocate(nbytes << 20) for nbytes in (30, 4)]
    assert parts[1].address == large.address + (30 << 20), "14 MiB fit better than 17"
    assert allocator.reserved == (4 + 20 + 44) << 20
    allocator.free(parts[0])
    allocator.release()
    assert allocator.reserved == (4 + 20 + 44) << 20
    allocator.free(parts[1])
    allocator.release()
    assert allocator.reserved == (4 + 20) << 20, "free pieces of a segment are one again"
    with allocator.private_pool():
        private = allocator.allocate(1)
    assert allocator.reserved == (4 + 20 + 2) << 20
    allocator.free(private)
    assert allocator.allocate(1).address != private.address


def test_the_features_of_the_next_studies_wait_on_the_card(shaped: Any) -> None:
    plans = functools.partial(planned, shaped("7B", "gptq-int4"), device="cuda", num_prompt_tokens=NUM_PROMPT_TOKENS)
    with_tower, without = (plans(num_rows=2, tower_on_gpu=on_gpu).prefill_work_bytes for on_gpu in (True, False))
    assert with_tower - without == STUDIES_AHEAD * 1369 * 4096 * 4
    assert plans(tower_on_gpu=True).prefill_work_bytes == plans().prefill_work_bytes == without


# -- What is given up for a limit --------------------------------------------------------------------------------------

CARD = Gpu(name="a card", capability=(8, 6), total_bytes=1 << 40, free_bytes=1 << 40)
MACHINE = Machine(gpus=(CARD,), has_torch=True, onnxruntime="1.32.0", providers=("CPUExecutionProvider",))


def with_cache_kl(artifact: Artifact, kl: float) -> Artifact:
    """Say what an int8 cache loses, for torch."""
    decoder = dataclasses.replace(artifact.manifest.parts.decoder, fidelity=cache_fidelity(kl))
    return artifact.with_parts(decoder=decoder)


def resolved(artifact: Artifact, **options: Any) -> RunPlan:
    return resolve(LoadOptions(**options), artifact, MACHINE)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_chunks_are_given_up_before_the_cache_and_that_before_rows(shaped: Any, device: str) -> None:
    artifact = with_cache_kl(shaped("7B", "gptq-int4"), 1e-3)
    free = resolved(artifact, device=device)
    computed = free.cache_dtype

    def sized(cache_dtype: str, chunk_size: int, rows: int) -> int:
        workload = dataclasses.replace(
            free.workload, cache_dtype=cache_dtype, chunk_size=chunk_size, num_rows=rows
        )  # fmt: skip
        return plan_memory(free.shapes, workload).card_bytes

    # A prompt of 1,497 tokens is one chunk of 2,048.
    order = [*((computed, chunk_size, 2) for chunk_size in CHUNK_SIZES), ("int8", 2048, 2)]
    sizes = [sized(*way) for way in order]
    assert sizes == sorted(set(sizes), reverse=True)
    smallest = min(sized("int8", chunk_size, 2) for chunk_size in CHUNK_SIZES)
    for limit, way in zip(sizes, order, strict=True):
        found = resolved(artifact, device=device, rows=2, memory_limit=limit)
        assert (found.cache_dtype, found.chunk_size, found.rows) == way
    assert resolved(artifact, device=device, rows=2, memory_limit=smallest - 1).rows == 1
    # Rows that nobody asked for: neither chunks nor cache are given up for them.
    found = resolved(artifact, device=device, memory_limit=sizes[1])
    assert (found.cache_dtype, found.chunk_size, found.rows) == (computed, 2048, 1)
    least = min(sized("int8", chunk_size, 1) for chunk_size in CHUNK_SIZES)
    with pytest.raises(MemoryBudgetError, match=r"expected at least .*decoder .*cache of 1 x [\d,]+ tokens [^;]*$"):
        resolved(artifact, device=device, memory_limit=least - 1)


# -- Reading and printing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12GiB", 12 << 30), ("12 gb", 12 * 10**9), ("1.5G", 3 << 29), ("800M", 800 << 20), ("4096", 4096), ("2k", 2048)],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "12 apples", "-1GiB", "GiB", "0", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(LiteError, match="expected a number of bytes"):
        parse_bytes(text)


def test_sizes_are_shown() -> None:
    assert (shown_bytes(3 << 29), shown_bytes(3 << 19), shown_bytes(1)) == ("1.50 GiB", "1.5 MiB", "1 bytes")
    assert (shown_bytes(2**30 + 1, up=True), shown_bytes(2**30 + 1, 9)) == ("1.01 GiB", "1.000000001 GiB")


def test_a_peak_is_the_processes_own_and_not_its_parents() -> None:
    """What getrusage says of a child's peak is never less than its parent's when it was started."""
    ballast = bytearray(250 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from lite.memory.process import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (peak_rss_bytes() or 0) > len(ballast)
    assert int(done.stdout) < 150 << 20


def test_memory_is_unknown_where_nothing_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 10_000_000 < (rss_bytes() or 0) <= (peak_rss_bytes() or 0)
    monkeypatch.setattr("lite.memory.process._proc_status", lambda _: None)
    assert rss_bytes() is None
    assert (peak_rss_bytes() or 0) > 10_000_000  # getrusage
    monkeypatch.setattr("sys.platform", "win32")
    assert peak_rss_bytes() is None
