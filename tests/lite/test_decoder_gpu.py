"""The torch engine on a real GPU: its CUDA graphs, its caches, what it does when memory is short, and its memory plan.

In float32 a GPU and a CPU choose the same tokens: what differs are the last bits of sums. In float16 they need not, so
there it is captured steps beside launched ones, which are the same kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driving import decode_token, drive, newest_of, read_prompt, score_text
from repository import run_python
from tiny import write_tiny_gptq_artifact

from lite.artifact.open import Artifact
from lite.config import IMAGE_TOKEN_ID
from lite.engines.segments import expand_image
from lite.engines.torch_engine.cache import KVCache
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.engines.torch_engine.load import load_decoder
from lite.errors import MemoryBudgetError
from lite.loading import load
from lite.memory.process import Peaks
from lite.session.loop import Loop
from lite.session.request import Progress, Request
from lite.studies.results import Findings

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU: nothing to decode on", allow_module_level=True)
pytestmark = pytest.mark.gpu

CACHES = pytest.mark.parametrize("cache_dtype", [None, "int8"])
HIDDEN_SIZE = 256
STEPS = 20
PROMPTS = [
    [1, 20, 30, IMAGE_TOKEN_ID, 40, 50, 60],
    [1, IMAGE_TOKEN_ID, 41],
    # Longer than 16 tokens with its image: prompts are multiplied by cuBLAS, short ones as decoded tokens are.
    [1, *range(100, 130), IMAGE_TOKEN_ID, *range(200, 220)],
    [1, IMAGE_TOKEN_ID, 77, 78],
    [1, 9, 8, 7, IMAGE_TOKEN_ID, 12, 13],
]


def features(study: int) -> np.ndarray:
    return np.random.default_rng(study).standard_normal((5, HIDDEN_SIZE), dtype=np.float32)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Artifact:
    """A GPTQ decoder whose heads and groups are as wide as those of small real ones."""
    return write_tiny_gptq_artifact(
        tmp_path_factory.mktemp("gptq") / "artifact", tokenizer_model, hidden_size=HIDDEN_SIZE, intermediate_size=512,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip


def launched(artifact: Artifact, **options: Any) -> LlamaDecoder:
    decoder = load_decoder(artifact, device="cuda", **options)
    decoder.capture = None
    return decoder


def greedy(decoder: LlamaDecoder, studies: Sequence[int], steps: int = STEPS) -> tuple[list[list[int]], KVCache]:
    """Decode some studies together, each with as many tokens."""
    cache = decoder.new_cache(len(studies), 128)
    for row, study in enumerate(studies):
        read_prompt(decoder, PROMPTS[study], features(study), cache, row)
    chosen = [newest_of(cache)]
    while len(chosen) < steps:
        decode_token(decoder, cache)
        chosen.append(newest_of(cache))
    return [list(row) for row in zip(*chosen, strict=True)], cache


@CACHES
@pytest.mark.parametrize("studies", [[0], [0, 1, 2], [2, 3, 4, 0, 1]])
def test_captured_launched_and_a_cpu_choose_the_same_tokens(
    artifact: Artifact, cache_dtype: Any, studies: list[int]
) -> None:
    on_cpu = load_decoder(artifact, device="cpu", cache_dtype=cache_dtype)
    expected = [greedy(on_cpu, [study])[0][0] for study in studies]
    assert len({tuple(text) for text in expected}) == len(studies)
    options = {"dtype": "float32", "cache_dtype": cache_dtype}
    captured = load_decoder(artifact, device="cuda", **options)
    got, cache = greedy(captured, studies)
    assert all(step.is_captured for step in cache.steps.values())
    assert {key[0] for key in cache.steps} == {len(studies)}
    assert (captured.backend, captured.fallbacks) == ("triton, CUDA graphs", ())
    assert got == expected
    plain, cache = greedy(launched(artifact, **options), studies)
    assert not any(step.is_captured for step in cache.steps.values())
    assert plain == expected


@CACHES
@pytest.mark.parametrize("studies", [[0], [0, 1, 2]])
def test_captured_steps_in_float16_are_launched_ones(artifact: Artifact, cache_dtype: Any, studies: list[int]) -> None:
    captured = load_decoder(artifact, device="cuda", cache_dtype=cache_dtype)
    assert captured.dtype == torch.float16
    plain = launched(artifact, cache_dtype=cache_dtype)
    caches = [decoder.new_cache(len(studies), 128) for decoder in (captured, plain)]
    for row, study in enumerate(studies):
        for decoder, cache in zip((captured, plain), caches, strict=True):
            read_prompt(decoder, PROMPTS[study], features(study), cache, row)
    for _ in range(STEPS):
        got, expected = (decode_token(d, cache) for d, cache in zip((captured, plain), caches, strict=True))
        # The kernels add up in the same order every time; cuBLAS, which has the head, all but promises it.
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
        assert newest_of(caches[0]) == newest_of(caches[1])
    assert all(step.is_captured for step in caches[0].steps.values())


@CACHES
def test_logits_in_float16_are_near_a_cpus(artifact: Artifact, cache_dtype: Any) -> None:
    targets = [33, 44, 55, 66, 77, 88]
    expected = score_text(
        load_decoder(artifact, device="cpu", cache_dtype=cache_dtype), PROMPTS[2], targets, features(2)
    )
    got = score_text(load_decoder(artifact, device="cuda", cache_dtype=cache_dtype), PROMPTS[2], targets, features(2))
    far = (got - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert float(far) < 0.02


def test_one_graph_serves_rows_that_come_and_go(artifact: Artifact) -> None:
    """Fewer rows, a row that is used again, and the same cache for the next studies: all as on the CPU."""
    on_cpu = load_decoder(artifact, device="cpu")
    loop = loop_of(load_decoder(artifact, device="cuda", dtype="float32"), num_rows=3)
    lengths = [6, 20, 3, 9, 14]
    for _ in range(2):
        for study, made in enumerate(run(loop, lengths)):
            assert made.error is None
            assert made.token_ids == greedy(on_cpu, [study], steps=lengths[study])[0][0], study
    assert loop.num_rows == 3
    cache = loop._cache
    assert cache is not None
    captured = {key[0] for key, step in cache.steps.items() if step.is_captured}
    assert 3 in captured
    assert captured <= {1, 2, 3}


def loop_of(decoder: LlamaDecoder, *, num_rows: int, max_seq_len: int = 128) -> Loop[KVCache, Any]:
    return Loop(
        decoder,
        num_rows=num_rows,
        max_seq_len=max_seq_len,
        context=decoder.config.max_position_embeddings,
        eos_token_id=-2,  # never
        fits=lambda *_: True,
        peaks=lambda: Peaks(rss_bytes=None, vram_bytes=decoder.peak_vram_bytes()),
    )


def run(loop: Loop[KVCache, Any], lengths: Sequence[int]) -> list[Progress[Any]]:
    """Draft the first studies, so many tokens of each, in this thread."""
    asked = []
    for study, length in enumerate(lengths):
        input_ids = expand_image(PROMPTS[study], len(features(study)))
        see = functools.partial(features, study)
        asked.append(
            Request(
                id=str(study), input_ids=input_ids, film=None, see=see,
                max_new_tokens=length,
            )
        )  # fmt: skip
    return drive(loop, asked)


def test_a_capture_that_is_refused_leaves_the_ordinary_way(artifact: Artifact) -> None:
    def refuse(step: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted\nCompile with TORCH_USE_CUDA_DSA")

    decoder = load_decoder(artifact, device="cuda", dtype="float32")
    decoder.capture = refuse
    got, cache = greedy(decoder, [0, 1])
    assert got == greedy(launched(artifact, dtype="float32"), [0, 1])[0]
    assert not any(step.is_captured for step in cache.steps.values())
    assert (decoder.backend, decoder.fallbacks) == ("triton", ("no CUDA graph: CUDA error: operation not permitted",))


def test_a_step_that_waits_for_the_gpu_is_not_captured_and_does_no_harm() -> None:
    """A capture that really fails, in a process of its own: what it may leave behind would reach other tests."""
    code = """
import functools, torch
from benchmarks.speed.decoders import part_of, random_decoder
from benchmarks.speed.engine import greedy, random_prompt
from benchmarks.speed.gpu.rig import Rig, Setting
from benchmarks.speed.weights import Shapes
from lite.engines.torch_engine.cuda_graph import capture_cuda_graph

device = torch.device("cuda", torch.cuda.current_device())
small = Shapes(
    hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, vocab_size=400
)
decoder = random_decoder(Rig.of_gpu(Setting(shapes=small, layers=2), device).config(4), device)
prompt = random_prompt(decoder.config, 40, device)
expected, _ = greedy(decoder, prompt, 8)

class Waits(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        x.sum().item()
        return self.head(x)

decoder.lm_head = Waits(decoder.lm_head)
decoder.capture = functools.partial(capture_cuda_graph, device=device)
stream = torch.cuda.current_stream()
got, problem = greedy(decoder, prompt, 8)
assert problem is not None
assert torch.cuda.current_stream() == stream, "on the stream of the capture"
assert got == expected, (got, expected)
# And what is captured afterwards works.
decoder.lm_head = decoder.lm_head.head
fresh = part_of(decoder, capture=functools.partial(capture_cuda_graph, device=device))
got, problem = greedy(fresh, prompt, 8)
print(got == expected, problem, decoder.fallbacks)
"""
    assert run_python("-c", code).startswith("True None ('no CUDA graph: ")


@contextlib.contextmanager
def memory_limit(nbytes: int) -> Iterator[None]:
    """Let torch's allocator have so much more than it holds."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + nbytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_a_batch_that_does_not_fit_is_halved_until_it_does(artifact: Artifact) -> None:
    decoder = load_decoder(artifact, device="cuda", dtype="float32")
    # 2 (keys, values) x 3 layers x 2 heads x 64 x 4 bytes, of 640 slots: 2 MB a row, 8 GB of 4,096.
    row_bytes = decoder.new_cache(1, 640).nbytes
    assert row_bytes == 2 * 3 * 2 * 64 * 4 * 640
    run(loop_of(decoder, num_rows=1), [3])  # cuBLAS has its workspace
    loop = loop_of(decoder, num_rows=4096, max_seq_len=640)
    with memory_limit(256 * row_bytes):
        studies = run(loop, [12] * len(PROMPTS))
        assert 8 <= loop.num_rows <= 256
    on_cpu = load_decoder(artifact, device="cpu")
    for study, made in enumerate(studies):
        assert made.error is None
        assert made.token_ids == greedy(on_cpu, [study], steps=12)[0][0]


def test_one_study_that_does_not_fit_is_an_error_of_its_own(artifact: Artifact) -> None:
    decoder = load_decoder(artifact, device="cuda", dtype="float32")
    run(loop_of(decoder, num_rows=1), [3])
    held = torch.cuda.memory_allocated()
    with memory_limit(0):
        # More than is held and free together.
        (asked,) = run(loop_of(decoder, num_rows=1, max_seq_len=held * 64 // (2 * 3 * 2 * 64 * 4)), [4])
        assert isinstance(asked.error, MemoryBudgetError)
        assert "expected some free on the GPU" in str(asked.error)
    (after,) = run(loop_of(decoder, num_rows=1), [4])
    assert after.error is None


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str | None]]:
    """Eight films of the phantom, and why they were made."""
    pytest.importorskip("cv2")
    from benchmarks.phantom.write import write_studies
    from lite.studies.sources.listed import read_studies

    listed = write_studies(tmp_path_factory.mktemp("studies") / "films", count=8, seed=20_270_101, dicom=False)
    return [(study.image, study.reason) for study in read_studies(listed)]


@pytest.mark.parametrize("name", ["demo_artifact", "demo_int4_artifact"])
def test_a_batch_of_films_has_the_texts_of_each_alone(
    request: pytest.FixtureRequest, name: str, studies: list[tuple[Path, str | None]]
) -> None:
    path = request.getfixturevalue(name).path
    model = load(path, device="cuda", dtype="float32")
    alone = [model.findings(*study) for study in studies]
    assert {findings.backend for findings in alone} == {"triton, CUDA graphs"}
    assert all(findings.device.startswith("cuda") for findings in alone)
    together = list(model.findings_batch(studies, batch_size=3))
    assert all(isinstance(findings, Findings) for findings in together)
    assert [findings.text for findings in together if isinstance(findings, Findings)] == [one.text for one in alone]
    on_cpu = load(path, device="cpu", engine="torch")
    assert [on_cpu.findings(*study).text for study in studies[:3]] == [one.text for one in alone[:3]]


@functools.cache
def real_rig() -> Any:
    """A rig of the whole model: 32 layers of random weights in 4 bits."""
    from benchmarks.speed.gpu.rig import Rig, Setting

    device = torch.device("cuda", torch.cuda.current_device())
    return Rig.of_gpu(dataclasses.replace(Setting(), memory_bytes=torch.cuda.mem_get_info()[1]), device)


@CACHES
@pytest.mark.parametrize("rows", [1, 8])
def test_the_memory_plan_is_right_within_5_percent(rows: int, cache_dtype: Any) -> None:
    from benchmarks.speed.gpu import memory

    planned = memory.plan(real_rig(), rows, cache_dtype)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free + torch.cuda.memory_reserved() < planned.card_bytes:
        pytest.skip(f"the GPU has {free / 1e9:.1f} GB free, {planned.card_bytes / 1e9:.1f} are planned")
    elsewhere = torch.cuda.memory_allocated() - (real_rig().decoder().nbytes if real_rig().has_decoder else 0)
    held = memory.held_bytes(real_rig(), rows, cache_dtype) - elsewhere
    expected = planned.weight_bytes + planned.study_bytes
    assert held * 0.95 <= expected <= held * 1.05, f"{held / 1e9:.3f} GB held, {expected / 1e9:.3f} planned"
