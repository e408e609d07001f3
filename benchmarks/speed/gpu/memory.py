"""The memory plan beside what torch's allocator has held, and whether it all runs within a limit.

The plan is that of an artifact with the same decoder; what loading takes is left out, as nothing is loaded here.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import torch

from benchmarks.speed.decoders import part_of
from benchmarks.speed.engine import Rows, random_prompt
from benchmarks.speed.harness import NONE
from lite.artifact.parts import TowerShape, VisionPart
from lite.errors import MemoryBudgetError
from lite.memory.plan import Shapes, Workload, plan_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.speed.gpu.rig import Rig
    from benchmarks.speed.harness import Report
    from lite.artifact.parts import CacheDtype
    from lite.memory.plan import MemoryPlan

VISION: Final = VisionPart(
    graph="vision.onnx",
    projector="projector.onnx",
    num_patches=1369,
    format="fp16",
    image_size=518,
    num_image_tokens=1369,
    hidden_size=4096,
    # Features are those of the 11th of 12 blocks: the last is never run.
    tower=TowerShape(hidden_size=768, intermediate_size=3072, num_hidden_layers=11, num_attention_heads=12),
)
"""BiomedCLIP-CXR, a ViT-B/14 at 518 pixels."""
_ROWS: Final = (1, 8)
_NEW_TOKENS: Final = 100
_DECODED: Final = 4
_TOWER_BYTES: Final = 400_000_000  # of a file that is not there; on a GPU the tower is not in the plan


def measure(rig: Rig, report: Report) -> None:
    """Draft with one row and with eight, with either cache, and read the allocator's peak."""
    found = report.figures["planned_and_held"] = []
    report.notes.append(
        f"Prompts of {rig.setting.prompt_tokens} tokens and room for {_NEW_TOKENS} more, int4. Peaks of torch's "
        "allocator: what CUDA and the kernels' code take is not in them. It was held to "
        f"{rig.setting.memory_bytes / 1e9:g} GB."
    )
    cache_dtypes: tuple[CacheDtype | None, ...] = (None, "int8")
    rig.decoder()
    with limited(rig):
        for rows in _ROWS:
            for cache_dtype in cache_dtypes:
                planned = plan(rig, rows, cache_dtype)
                expected = planned.weight_bytes + planned.study_bytes
                name = cache_dtype or "float16"
                line = {"rows": str(rows), "cache": name, "planned GB": f"{expected / 1e9:.3f}", "held GB": NONE}
                report.lines.append(line)
                try:
                    held = held_bytes(rig, rows, cache_dtype)
                except MemoryBudgetError as error:
                    report.notes.append(f"{rows} rows, {name} cache: {error}.")
                    continue
                line |= {"held GB": f"{held / 1e9:.3f}", "plan is off by": f"{expected / held - 1:+.1%}"}
                figures = {"rows": rows, "cache": name, "planned_bytes": expected, "held_bytes": held}
                found.append(figures | {"error": expected / held - 1, "plan": asdict(planned)})


@contextlib.contextmanager
def limited(rig: Rig) -> Iterator[None]:
    """Let torch's allocator have no more than the setting says, meanwhile."""
    if not rig.on_gpu:
        yield
        return
    rig.tidy()
    _, total = torch.cuda.mem_get_info(rig.device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, rig.setting.memory_bytes / total), rig.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, rig.device)


def plan(rig: Rig, rows: int, cache_dtype: CacheDtype | None) -> MemoryPlan:
    """Plan the memory of the int4 decoder."""
    there = rig.on_gpu and torch.cuda.is_available()
    workload = Workload(
        device=str(rig.device),
        cache_dtype=cache_dtype,
        num_rows=rows,
        num_prompt_tokens=rig.setting.prompt_tokens,
        max_new_tokens=_NEW_TOKENS,
        chunk_size=max(rig.setting.chunk_sizes),
        capability=torch.cuda.get_device_capability(rig.device) if there else (8, 6),
    )
    return plan_memory(Shapes(config=rig.config(4), vision=VISION, vision_bytes=_TOWER_BYTES), workload)


def held_bytes(rig: Rig, num_rows: int, cache_dtype: CacheDtype | None) -> int:
    """Prefill and decode; return the peak of torch's allocator, or on a CPU what the tensors take that stay.

    Raises:
        MemoryBudgetError: it does not fit.
    """
    decoder = part_of(rig.decoder(), cache_dtype=cache_dtype, capture=rig.capture)
    decoder.chunk_size = max(rig.setting.chunk_sizes)
    prompt = random_prompt(decoder.config, rig.setting.prompt_tokens, rig.device)
    rig.tidy()
    if rig.on_gpu:
        torch.cuda.synchronize(rig.device)
        torch.cuda.reset_peak_memory_stats(rig.device)
    rows = Rows(decoder, num_rows, prompt.num_tokens + _NEW_TOKENS)
    for row in range(num_rows):
        rows.read(prompt, row)
    for _ in range(_DECODED):
        rows.decode()
    rows.wait()
    if rig.on_gpu:
        return torch.cuda.max_memory_allocated(rig.device)
    return decoder.nbytes + int(rows.cache.nbytes)
