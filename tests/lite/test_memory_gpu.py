"""The memory plan of a GPU that is not there, against what the real decoder takes on one: see fake_cuda.py."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import read_prompt
from fake_cuda import H100, RTX_3060, T4, TOKEN, Allocator, FakeGpu, draft, load_on, prompt_of
from hospital import stored_factors
from safetensors.torch import save_file
from tiny import cache_fidelity, tiny_llama_config, tiny_manifest, tiny_parts
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorDeviceMismatchError

from kernels.backend import Card
from kernels.packing import _CHUNK_VALUES
from kernels.quant_matmul import SCRATCH_VALUES
from lite.artifact.open import Artifact
from lite.artifact.parts import AdapterPart, FileRecord, TowerShape, VisionPart, unhashed
from lite.engines.machine import Gpu, Machine
from lite.engines.options import LoadOptions
from lite.engines.plan import RunPlan
from lite.engines.resolve import resolve
from lite.engines.segments import divide, expand_image
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.errors import MemoryBudgetError
from lite.memory.counts import _EXPANDED_VALUES, _REPACKED_VALUES
from lite.memory.plan import CHUNK_SIZES, GPU_LIBRARIES_BYTES, STUDIES_AHEAD, MemoryPlan, Shapes, Workload, plan_memory

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
# As many layers as show what each takes and what passes.
SHAPES |= {f"{name}, 4 layers": SHAPES[name] | {"num_hidden_layers": 4} for name in ("7B", "1B grouped")}


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
            graph="vision.onnx",
            projector="projector.onnx",
            format="fp16",
            image_size=518,
            num_patches=1369,
            num_image_tokens=1369,
            hidden_size=config["hidden_size"],
            tower=tower,
        )
        parts = tiny_parts(vision=vision)
        files = {name: FileRecord(bytes=106_500_000, sha256="0" * 64) for name in vision.named()}
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
        *((RTX_3060, f"{shape}, 4 layers", "gptq-int4", 1, None, 2048) for shape in ("7B", "1B grouped")),
        *full(*((RTX_3060, shape, "gptq-int4", 1, None, 2048) for shape in ("7B", "1B grouped"))),
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
    of_peak, of_passing = {"7B": (0.01, 0.06), "7B, 4 layers": (0.015, 0.09)}.get(shape, (0.04, None))
    assert plan.peak_bytes == pytest.approx(peak, rel=of_peak)
    # What passes is a thirtieth of all: seen by itself, so that no part of it can be forgotten.
    passing = peak - loaded.allocated - plan.cache_bytes
    assert 0.9 * passing <= plan.prefill_work_bytes
    assert of_passing is None or plan.prefill_work_bytes == pytest.approx(passing, rel=of_passing)
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
        *((f"{shape}, 4 layers", "gptq-int4") for shape in ("7B", "1B grouped")),
        *full(*((shape, "gptq-int4") for shape in ("7B", "1B grouped", "1B"))),
        *full(*(("7B", stored) for stored in ("fp16", "gptq-int8", "bnb-int8"))),
    ],
)
def test_loading_takes_what_is_planned(on_card: Any, shape: str, stored: str) -> None:
    loaded = on_card(RTX_3060, shape, stored)
    plan = loaded.plan()
    assert plan.decoder_bytes == pytest.approx(loaded.decoder.nbytes, rel=0.001)
    assert plan.decoder_bytes == pytest.approx(loaded.allocated, rel=0.005 if shape.startswith("7B") else 0.02)
    assert plan.weight_bytes + plan.load_work_bytes == pytest.approx(
        loaded.peak, rel=0.01 if shape.startswith("7B") else 0.02
    )


def test_adapters_are_in_a_gpu_plan(shaped: Any, on_card: Any, tmp_path: Path) -> None:
    """Two of rank 64: their weights are more, and no more passes in a prompt."""
    without, bare = on_card(RTX_3060, "7B, 4 layers", "gptq-int4"), shaped("7B, 4 layers", "gptq-int4")
    file = tmp_path / "factors.safetensors"
    save_file(stored_factors(bare.decoder_config(), rank=64, size=0.0), file)
    part = AdapterPart(factors=str(file), on="base", rank=64, files=unhashed(str(file)))
    artifact, gpu = bare.with_parts(adapters={"north": part, "south": part}), FakeGpu(RTX_3060)
    with gpu.active():
        decoder = load_on(gpu, artifact, adapters=("north", "south"))
        allocated = gpu.allocator.allocated
        draft(decoder, num_rows=1, num_prompt_tokens=32, num_image_tokens=16, max_seq_len=64, adapter=1)
        gpu.start_over(decoder)
        max_seq_len = NUM_PROMPT_TOKENS + MAX_NEW_TOKENS
        draft(decoder, num_rows=1, num_prompt_tokens=NUM_PROMPT_TOKENS, max_seq_len=max_seq_len, adapter=1)
    loaded = Loaded(gpu, artifact, decoder, 0, allocated)
    counted = loaded.plan(adapters=("north", "south")).adapter_bytes
    assert counted == 2 * 4 * 64 * 2 * 78_080
    assert loaded.allocated - without.allocated == pytest.approx(counted, rel=0.03)
    more = gpu.allocator.pop_peak() - without.drafting(1, None, CHUNK_SIZES[0])[0]
    assert more == pytest.approx(counted, rel=0.03)


def test_the_plan_knows_what_is_expanded_at_a_time() -> None:
    assert (_EXPANDED_VALUES, _REPACKED_VALUES) == (SCRATCH_VALUES, _CHUNK_VALUES)


@pytest.fixture
def grouped(on_card: Any) -> tuple[FakeGpu, LlamaDecoder]:
    """A small decoder on an RTX 3060."""
    loaded = on_card(RTX_3060, "1B grouped, 4 layers", "gptq-int4")
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
        assert cache.steps[2, 0, 0, False].is_captured
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
    def work(**settings: Any) -> int:
        workload = Workload(device="cuda", num_prompt_tokens=NUM_PROMPT_TOKENS, max_new_tokens=24, **settings)
        return plan_memory(Shapes.of(shaped("7B", "gptq-int4")), workload).prefill_work_bytes

    without = work(num_rows=2)
    assert work(num_rows=2, tower_on_gpu=True) - without == STUDIES_AHEAD * 1369 * 4096 * 4
    assert work(tower_on_gpu=True) == work() == without


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
