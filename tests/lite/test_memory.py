"""The memory plan: what it counts is what is held, and what does not fit is refused before it is loaded."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import mmap
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from repository import run_python
from tiny import tiny_llama_config, tiny_onnx_part

from benchmarks.speed.weights import Shapes as Widths
from lite.artifact.open import Artifact
from lite.config import DecoderConfig, Quantization
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.engines.torch_engine.linear import Linear, linears_of
from lite.engines.torch_engine.load import fill_linear
from lite.errors import LiteError, MemoryBudgetError
from lite.loading import load
from lite.memory.counts import (
    ITEMSIZE,
    cache_bytes_per_token,
    decoder_bytes,
    onnx_decoder_bytes,
    onnx_linear_bytes,
    onnx_prefill_work_bytes,
)
from lite.memory.plan import (
    GPU_LIBRARIES_BYTES,
    ONNX_FIRST_USE_BYTES,
    MemoryPlan,
    Shapes,
    Workload,
    check_memory,
    plan_memory,
)
from lite.memory.process import peak_rss_bytes, rss_bytes, use_large_pages
from lite.memory.sizes import parse_bytes, shown_bytes
from lite.model import FindingsModel

DECODER = DecoderConfig.from_hf(Widths().config(32))


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


def plan_of(**items: int) -> MemoryPlan:
    """A plan of these items alone."""
    nothing = dict.fromkeys((field.name for field in dataclasses.fields(MemoryPlan)), 0)
    return MemoryPlan(**(nothing | {"num_rows": 1, "max_seq_len": 1} | items))


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
    int8 = load(tiny_model.artifact.path, device="cpu", engine="torch", cache_dtype="int8")
    assert for_cpu(cache_dtype="int8").cache_bytes == int8.findings(films[0]).memory.cache_bytes
    # A CPU makes float32 of it to decode, a layer at a time: cast, scaled, and both.
    many, config = for_cpu(cache_dtype="int8", num_rows=64), tiny_model.artifact.decoder_config()
    values = 64 * many.max_seq_len * 2 * config.num_key_value_heads * config.head_dim
    assert many.prefill_work_bytes == 6 * values > plan.prefill_work_bytes


def test_the_items_of_a_plan_are_its_sum(tiny_artifact: Artifact) -> None:
    for settings in ({"device": "cpu", "resident_bytes": 5 << 20}, {"device": "cuda", "tower_on_gpu": True}):
        plan = planned(tiny_artifact, num_rows=2, **settings)
        assert sum(plan.items().values()) == plan.card_bytes
    large = dataclasses.replace(plan, load_work_bytes=plan.study_bytes + 7)
    assert sum(large.items().values()) == large.card_bytes == plan.card_bytes + 7


WIDTHS = dataclasses.replace(
    DECODER, num_hidden_layers=4, quantization=Quantization(format="gptq-int4", group_size=128)
)
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
    plan = plan_of(  # without a tower, whose features could wait
        max_seq_len=num_tokens + 8,
        resident_bytes=(52 << 20) + ONNX_FIRST_USE_BYTES,
        decoder_bytes=onnx_decoder_bytes(WIDTHS, PART),
        cache_bytes=(num_tokens + 8) * cache_bytes_per_token(WIDTHS, itemsize=ITEMSIZE[cache_dtype]),
        load_work_bytes=onnx_linear_bytes("lm_head", WIDTHS, PART, bytes_per_block=0),
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


def test_blocks_of_whole_rows_divide_them() -> None:
    config = dataclasses.replace(
        WIDTHS, intermediate_size=416, quantization=Quantization(format="gptq-int4", group_size=-1)
    )
    # 4,096 rows of 13 blocks of 32 inputs, half a byte each.
    assert onnx_linear_bytes("down", config, PART, bytes_per_block=4) == 4096 * (416 // 2 + 13 * 4)
    assert onnx_linear_bytes("o", config, PART, bytes_per_block=4) == 4096 * (4096 // 2 + 32 * 4)


def test_a_gpu_plan_leaves_out_what_its_allocator_does_not_hold(tiny_artifact: Artifact) -> None:
    plan = planned(tiny_artifact, device="cuda", resident_bytes=300 << 20)
    assert plan.vision_bytes == plan.vision_work_bytes == plan.resident_bytes == 0
    assert plan.peak_bytes == plan.decoder_bytes + plan.cache_bytes + plan.prefill_work_bytes
    assert plan.beside_bytes == GPU_LIBRARIES_BYTES
    with_tower, on_cpu = planned(tiny_artifact, device="cuda", tower_on_gpu=True), planned(tiny_artifact)
    assert with_tower.peak_bytes == plan.peak_bytes
    assert with_tower.beside_bytes - plan.beside_bytes == on_cpu.vision_bytes + on_cpu.vision_work_bytes


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_what_does_not_fit_is_refused_before_it_is_loaded(tiny_onnx_artifact: Artifact, engine: Any) -> None:
    with pytest.raises(
        MemoryBudgetError, match=r"got a memory limit of 1\.0 MiB · expected .*decoder .*cache of 1 x"
    ) as e:
        load(tiny_onnx_artifact.path, engine=engine, device="cpu", memory_limit="1MiB")
    # What a refusal asks for is enough.
    asked = str(e.value).partition("expected at least ")[2].partition(":")[0]
    load(tiny_onnx_artifact.path, engine=engine, device="cpu", memory_limit=asked)


def test_a_refusal_says_what_would_fit() -> None:
    sizes = {"resident_bytes": 10 << 20, "decoder_bytes": 60 << 20, "cache_bytes": 64 << 20}
    plan = plan_of(num_rows=8, max_seq_len=10, prefill_work_bytes=16 << 20, **sizes)
    check_memory(plan, 150 << 20, what="a")
    refusal = r"150\.8 MiB: Python and its packages 10\.0 MiB .*cache of 8 x 10 .* take 2 at a time"
    with pytest.raises(MemoryBudgetError, match=refusal):
        check_memory(plan, 103 << 20, what="a")  # 86 beside the caches of 8 each
    with pytest.raises(MemoryBudgetError, match="export with fewer bits"):
        check_memory(plan, 93 << 20, what="a")


def test_a_refusal_never_asks_for_what_it_got() -> None:
    plan = plan_of(resident_bytes=5 << 30, cache_bytes=1)
    for limit in (5 << 30, plan.card_bytes - 1, 1 << 20, 1):
        with pytest.raises(MemoryBudgetError) as refused:
            check_memory(plan, limit, what="a")
        got, expected = re.findall(r"(?:limit of|at least) ([\d.,]+ \w+)", str(refused.value))
        assert got != expected
        assert parse_bytes(expected.replace(",", "")) >= plan.card_bytes


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
    peak = int(run_python("-c", code))
    assert (peak_rss_bytes() or 0) > len(ballast)
    assert peak < 150 << 20


def test_memory_is_unknown_where_nothing_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 10_000_000 < (rss_bytes() or 0) <= (peak_rss_bytes() or 0)
    monkeypatch.setattr("lite.memory.process._proc_status", lambda _: None)
    assert rss_bytes() is None
    assert (peak_rss_bytes() or 0) > 10_000_000  # getrusage
    monkeypatch.setattr("sys.platform", "win32")
    assert peak_rss_bytes() is None


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
@pytest.mark.parametrize("mapped", [True, False])
def test_large_blocks_go_back_to_the_system_from_between_small_ones(mapped: bool) -> None:
    code = f"""
from lite.memory.process import map_large_blocks, rss_bytes
if {mapped}:
    map_large_blocks()
before, blocks = rss_bytes(), []
for _ in range(300):
    blocks += [bytearray(b"x" * 100_000), bytearray(b"x" * 2_000)]
del blocks[::2]
print(rss_bytes() - before)
"""
    left = int(run_python("-c", code))
    assert left < 10_000_000 if mapped else left > 20_000_000


def large_pages(address: int) -> int:
    """Return the KiB on large pages of the mapping that an address lies in."""
    for mapping in re.split(r"^(?=\w+-\w+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]:
        begin, end = (int(bound, 16) for bound in mapping.split()[0].split("-"))
        if begin <= address < end:
            return int(re.findall(r"AnonHugePages: +(\d+) kB", mapping)[0])
    return 0


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="this system has no large pages")
def test_memory_moves_to_large_pages_and_stays_what_it_is() -> None:
    expected = np.random.default_rng(0).bytes(32 << 20)
    with mmap.mmap(-1, len(expected), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held[:] = expected
        address = ctypes.addressof(ctypes.c_char.from_buffer(held))
        if large_pages(address):
            pytest.skip("this system gives large pages to whoever does not ask")
        use_large_pages()
        assert held[:] == expected
        release = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
        assert large_pages(address) >= 1024 or release < (6, 1)
